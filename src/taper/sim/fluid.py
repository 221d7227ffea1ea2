"""What a controller can hope for: a fluid estimate from the law of the machine and the requests of one run.

In steady state every step carries R rows and takes T(R), and T is what a serial request pays for each of its tokens. So
serial requests with a factor f on their SLO are in time only if T <= f * SLO, and then

    goodput = share * R / T(R)     T(R) = f * SLO, or all branches running, whichever is fewer rows
    goodput <= share * offered     nobody gets more than is asked for

where `share` is that of the output tokens in requests that can be in time: all that branch (their rows are taken to
make up for a long step), and the serial ones at least as patient. Rows are worth more the more there are in a step, so
it is the best over the factors, and over giving all serial requests up and running everything.

It is an estimate, not a bound. Too high: it knows nothing of the fluctuation of the batch's composition, nor of the
SLOs of requests that branch. Too low: it has the same step for everybody at all times, while a run may give long steps
to spells with few serial requests; and it takes for the window's requests those that arrive in it, or at saturation
the first that the machine serves, while a window begins with work in hand. docs/simulator.md says how far off it is.
Where more requests may be in service than the machine's nominal number, it is that of an engine that admits no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper.core.types import StepLoad
from taper.sim.cost import Disturbance
from taper.sim.hardware import Hardware
from taper.sim.scenario import Scenario, settle
from taper.workload import Demand, Request

HALVINGS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The best steady state. `met_share` is of the output tokens."""

    rows: int
    step_s: float
    met_share: float
    goodput_tok_s: float


def fluid_estimate(scenario: Scenario, machine: Hardware, *, seed: int) -> Estimate:
    """Of the requests of that seed, disturbances counted with their mean."""
    setting = settle(scenario, machine)
    slowed = machine.scaled(mean_slowdown(scenario.disturbance, scenario.warm_share))
    coming = scenario.source_on(machine).requests(seed=seed, rate_rps=setting.rate_per_s, horizon_s=setting.duration_s)
    requests = list(coming)
    start_s = scenario.warm_share * setting.duration_s
    in_window = [one for one in requests if one.arrival_s >= start_s]
    served = requests[: max(1, round((setting.off.rate_per_s + setting.eager.rate_per_s) / 2 * setting.duration_s))]
    demand = Demand.of((one, 1 / len(served)) for one in served)
    narrow = float(min(scenario.engine_on(machine).max_requests, machine.nominal_requests))
    wide = narrow * demand.eager_width
    best = _point(slowed, demand, wide, _met_share(served, None))
    for factor in sorted({one.slo_factor for one in served if not one.branching}):
        rows = _rows_within(slowed, demand, factor * setting.slo.tpot_s, narrow, wide)
        if rows is not None:
            best = max(
                best, _point(slowed, demand, rows, _met_share(served, factor)), key=lambda one: one.goodput_tok_s
            )
    offered = sum(one.tokens for one in in_window) / (setting.duration_s - start_s) * best.met_share
    return Estimate(
        rows=best.rows,
        step_s=best.step_s,
        met_share=best.met_share,
        goodput_tok_s=min(best.goodput_tok_s, offered),
    )


def mean_slowdown(disturbance: Disturbance, warm_share: float) -> float:
    """Mean factor on a step within the measured window."""
    drift = 1.0 + (disturbance.drift_to - 1.0) * (1.0 + warm_share) / 2.0
    return drift * (1.0 + disturbance.spike_share * (disturbance.spike_factor - 1.0))


def _met_share(requests: Sequence[Request], factor: float | None) -> float:
    """Of the tokens: in requests that branch, and in serial ones with at least that factor; None: no serial one."""
    patient = (one.branching or (factor is not None and one.slo_factor >= factor) for one in requests)
    return sum(one.tokens for one, met in zip(requests, patient, strict=True) if met) / sum(r.tokens for r in requests)


def _seconds(machine: Hardware, demand: Demand, rows: float) -> float:
    """A step with this many rows, prompts computed as fast as their requests' tokens come out."""
    load = StepLoad(
        rows=round(rows),
        context_tokens=round(rows * demand.context_tokens),
        prefill_tokens=round(rows * demand.prompt_tokens / demand.tokens),
    )
    return machine.seconds(load)


def _rows_within(machine: Hardware, demand: Demand, step_s: float, narrow: float, wide: float) -> float | None:
    """Most rows between `narrow` and `wide` that a step of that length carries; None if not even `narrow`."""
    if _seconds(machine, demand, narrow) > step_s:
        return None
    low, high = narrow, wide
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _seconds(machine, demand, middle) <= step_s else (low, middle)
    return low


def _point(machine: Hardware, demand: Demand, rows: float, met_share: float) -> Estimate:
    step_s = _seconds(machine, demand, rows)
    return Estimate(
        rows=round(rows), step_s=step_s, met_share=met_share, goodput_tok_s=met_share * round(rows) / step_s
    )

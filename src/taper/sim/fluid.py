"""What no controller can beat: a fluid bound from the law of the machine alone.

In steady state every step carries R rows and takes T(R), and T is what a serial request pays for each of its tokens. So
serial requests of an SLO class with factor f are in time only if T <= f * SLO, and then

    goodput <= share * R / T(R)     T(R) = f * SLO, or all branches running, whichever is fewer rows
    goodput <= share * offered      nobody gets more than is asked for

where `share` is that of the output tokens in requests that can be in time: all that branch (their rows can always make
up for a long step), and the serial ones of every class at least as patient. Rows are worth more the more there are in a
step, so the bound is the best over the classes, and over giving all serial requests up and running everything.

It knows neither the fluctuation of the batch's composition nor the ramp nor that branching requests have SLOs as well,
so less than all of it is within reach of anybody, a clairvoyant included. Where more requests may be in service than
the machine's nominal number, it is the bound of an engine that admits no more than that.

It is taken from the mix's means: a run's own requests, and a window that begins with work in hand, differ from them by
some per cent, so measured goodput may come out as much above it.
"""

from __future__ import annotations

from dataclasses import dataclass

from taper.core.types import StepLoad
from taper.sim.cost import Disturbance
from taper.sim.hardware import Hardware
from taper.sim.scenario import Scenario, settle
from taper.workload import Demand, Synthetic

HALVINGS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The best steady state. `met_share` is of the output tokens."""

    rows: int
    step_s: float
    met_share: float
    goodput_tok_s: float


def fluid_bound(scenario: Scenario, machine: Hardware) -> Bound:
    """Of the mix on the machine, disturbances counted with their mean."""
    setting = settle(scenario, machine)
    slowed = machine.scaled(mean_slowdown(scenario.disturbance, scenario.warm_share))
    source = scenario.source_on(machine)
    demand = source.demand()
    branching = scenario.branching_share or 0.0
    serial_tokens = (1.0 - branching) * source.shared(0.0).demand().tokens / demand.tokens if branching < 1 else 0.0
    narrow = float(min(scenario.engine_on(machine).max_requests, machine.nominal_requests))
    wide = narrow * demand.eager_width
    best = _point(slowed, demand, wide, 1.0 - serial_tokens)
    if serial_tokens:
        for factor, patient in _classes(scenario):
            rows = _rows_within(slowed, demand, factor * setting.slo.tpot_s, narrow, wide)
            if rows is not None:
                point = _point(slowed, demand, rows, 1.0 - serial_tokens * (1.0 - patient))
                best = max(best, point, key=lambda bound: bound.goodput_tok_s)
    offered = setting.rate_per_s * demand.tokens * best.met_share
    return Bound(
        rows=best.rows,
        step_s=best.step_s,
        met_share=best.met_share,
        goodput_tok_s=min(best.goodput_tok_s, offered),
    )


def mean_slowdown(disturbance: Disturbance, warm_share: float) -> float:
    """Mean factor on a step within the measured window."""
    drift = 1.0 + (disturbance.drift_to - 1.0) * (1.0 + warm_share) / 2.0
    return drift * (1.0 + disturbance.spike_share * (disturbance.spike_factor - 1.0))


def _classes(scenario: Scenario) -> list[tuple[float, float]]:
    """(factor on the SLO, share of requests with at least that factor)."""
    classes = list(scenario.source.mix.slo_classes) if isinstance(scenario.source, Synthetic) else []
    classes.append((1.0 - sum(share for share, _ in classes), 1.0))
    return [(factor, sum(share for share, other in classes if other >= factor)) for _, factor in classes]


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


def _point(machine: Hardware, demand: Demand, rows: float, met_share: float) -> Bound:
    step_s = _seconds(machine, demand, rows)
    return Bound(rows=round(rows), step_s=step_s, met_share=met_share, goodput_tok_s=met_share * round(rows) / step_s)

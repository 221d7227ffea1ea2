"""One scenario x hardware x policy x seed -> one summary, and many of them in parallel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from taper.core.controller import Controller
from taper.core.policies import resolve
from taper.core.types import Knobs
from taper.goodput import Window
from taper.sim.ablations import ABLATIONS
from taper.sim.cost import StepCost
from taper.sim.hardware import Hardware
from taper.sim.loop import Simulation
from taper.sim.scenario import Scenario, settle
from taper.sim.summary import Summary, summarise
from taper.sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run to make."""

    scenario: Scenario
    machine: Hardware
    policy: str
    seed: int
    knobs: Knobs = field(default_factory=Knobs)


def simulate(case: Case) -> Trace:
    scenario, machine = case.scenario, case.machine
    setting = settle(scenario, machine)
    requests = scenario.source_on(machine).requests(
        seed=case.seed, rate_rps=setting.rate_per_s, horizon_s=setting.duration_s
    )
    return Simulation(
        controller=Controller(
            latency=machine.predictor(scenario.bias), policy=resolve(case.policy, ABLATIONS), knobs=case.knobs
        ),
        machine=machine,
        cost=StepCost(machine, scenario.disturbance, duration_s=setting.duration_s, seed=case.seed),
        engine=scenario.engine_on(machine),
        slo=setting.slo,
        requests=requests,
        duration_s=setting.duration_s,
    ).run()


def run(case: Case) -> Summary:
    """Figures over the window from the end of the ramp to the end of the load; the drain only judges."""
    duration_s = settle(case.scenario, case.machine).duration_s
    window = Window(start_s=case.scenario.warm_share * duration_s, end_s=duration_s)
    return summarise(simulate(case), window, policy=case.policy, seed=case.seed)


def run_all(cases: Iterable[Case], *, workers: int = 2) -> Iterator[Summary]:
    """Summaries in the order of the cases."""
    if workers == 1:
        yield from map(run, cases)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run, cases)

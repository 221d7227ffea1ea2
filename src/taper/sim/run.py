"""One scenario x hardware x policy x seed -> one run of a results file, and many of them in parallel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from taper.core.controller import Controller
from taper.core.latency import LinearLatency
from taper.core.policies import Policy, resolve
from taper.core.types import Knobs
from taper.goodput import Window
from taper.results import Conditions, Run
from taper.sim.ablations import ABLATIONS
from taper.sim.cost import StepCost
from taper.sim.fleet import Fleet, FleetSimulation
from taper.sim.hardware import Hardware
from taper.sim.loop import Simulation
from taper.sim.routers import ROUTERS
from taper.sim.scenario import Scenario, Setting, settle
from taper.sim.summary import summarise
from taper.sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run to make."""

    scenario: Scenario
    machine: Hardware
    policy: str
    seed: int
    knobs: Knobs = field(default_factory=Knobs)
    hold_steps: int = 1
    stage_clocks: bool = False
    fleet: Fleet = field(default_factory=Fleet)
    law: LinearLatency | None = None  # what the controller starts from; None: the machine's own


def policy_named(name: str) -> Policy:
    """A shipped policy or an ablation. Raises `ConfigError` naming what exists."""
    return resolve(name, ABLATIONS)


def simulate(case: Case, *, draw: int = 0) -> Trace:
    """`draw`: another noise on the same requests."""
    scenario, machine = case.scenario, case.machine
    setting = settle(scenario, machine)
    replica = build(case, setting, replica=draw)
    for request in scenario.source_on(machine).requests(
        seed=case.seed, rate_rps=setting.rate_per_s, horizon_s=setting.duration_s
    ):
        replica.submit(request)
    return replica.run()


def build(case: Case, setting: Setting, *, replica: int = 0, is_endless: bool = False) -> Simulation:
    """An engine of the case, without requests. Replicas differ in noise; `is_endless`: the caller stops the load."""
    scenario, machine = case.scenario, case.machine
    return Simulation(
        controller=Controller(
            latency=case.law or machine.predictor(scenario.bias),
            policy=policy_named(case.policy),
            knobs=case.knobs,
            promise_s=setting.slo.tpot_s,
        ),
        machine=machine,
        cost=StepCost(machine, scenario.disturbance, duration_s=setting.duration_s, seed=case.seed, replica=replica),
        engine=scenario.engine_on(machine),
        slo=setting.slo,
        duration_s=math.inf if is_endless else setting.duration_s,
        hold_steps=case.hold_steps,
        stage_clocks=case.stage_clocks,
    )


def build_fleet(case: Case, setting: Setting) -> FleetSimulation:
    """As many engines as the case says, with as many times the load."""
    replicas = case.fleet.replicas
    return FleetSimulation(
        [build(case, setting, replica=index, is_endless=True) for index in range(replicas)],
        ROUTERS[case.fleet.router](replicas),
        case.scenario.source_on(case.machine).requests(
            seed=case.seed, rate_rps=setting.rate_per_s * replicas, horizon_s=setting.duration_s
        ),
        duration_s=setting.duration_s,
    )


def window_of(case: Case, setting: Setting) -> Window:
    """From the end of the ramp to the end of the load; the drain only judges."""
    return Window(start_s=case.scenario.warm_share * setting.duration_s, end_s=setting.duration_s)


def conditions_of(case: Case, setting: Setting) -> Conditions:
    scenario = case.scenario
    return Conditions(
        policy=case.policy,
        load=scenario.load,
        rate_rps=setting.rate_per_s * case.fleet.replicas,
        share=scenario.branching_share,
        slo_tpot_s=setting.slo.tpot_s,
        slo_at=scenario.slo_at if scenario.tpot_slo_s is None else None,
        concurrency=scenario.engine_on(case.machine).max_requests,
        seed=case.seed,
        scenario=scenario.name,
        hardware=case.machine.name,
        replicas=case.fleet.replicas,
        router=case.fleet.router if case.fleet.replicas > 1 else None,
    )


def run(case: Case) -> Run:
    setting = settle(case.scenario, case.machine)
    if case.fleet.replicas > 1:
        fleet = build_fleet(case, setting)
        records = fleet.run()
        traces = [engine.trace for engine in fleet.engines]
        return summarise(conditions_of(case, setting), records, traces, window_of(case, setting))
    trace = simulate(case)
    return summarise(conditions_of(case, setting), trace.records, [trace], window_of(case, setting))


def run_all(cases: Iterable[Case], *, workers: int = 2) -> Iterator[Run]:
    """Runs in the order of the cases."""
    if workers == 1:
        yield from map(run, cases)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run, cases)

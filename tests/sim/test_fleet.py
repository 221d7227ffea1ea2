"""Fleets of small engines: a = 10 s, b = 1 s a row, d = 2 s a prompt token."""

from dataclasses import replace

import pytest

from taper.core.controller import Controller
from taper.core.types import ConfigError, Knobs, Slo
from taper.sim.cost import Disturbance, StepCost
from taper.sim.fleet import Fleet, FleetSimulation
from taper.sim.hardware import Hardware, hardware
from taper.sim.loop import Engine, Simulation
from taper.sim.routers import ROUTERS, Router, check_router
from taper.sim.run import Case, build_fleet, policy_named, simulate
from taper.sim.scenario import load, settle
from taper.workload import Request

MACHINE = Hardware(
    name="m", base_s=10.0, row_s=1.0, context_s=0.0, prefill_s=2.0, max_batched_tokens=64, max_rows=64, noise=0.0
)


def request(*stages: tuple[int, ...], at: float = 0.0, prompt: int = 4, index: int = 0) -> Request:
    return Request(seed=0, index=index, arrival_s=at, prompt_tokens=prompt, stages=stages)


def fleet(
    router: str, *requests: Request, replicas: int = 2, slots: int = 8, duration_s: float = 1e6
) -> FleetSimulation:
    engines = [
        Simulation(
            controller=Controller(latency=MACHINE.predictor(), policy=policy_named("eager"), knobs=Knobs()),
            machine=MACHINE,
            cost=StepCost(MACHINE, Disturbance(), duration_s=1e6, seed=0),
            engine=Engine(fork_prefill_tokens=1, max_requests=slots),
            slo=Slo(tpot_s=50.0, ttft_s=100.0),
            duration_s=float("inf"),
        )
        for _ in range(replicas)
    ]
    numbered = [replace(one, index=index) for index, one in enumerate(requests)]
    return FleetSimulation(engines, ROUTERS[router](replicas), numbered, duration_s=duration_s)


def prefills(simulation: FleetSimulation) -> list[int]:
    return [sum(engine.trace.prefill_tokens) for engine in simulation.engines]


def emitted(simulation: FleetSimulation) -> list[int]:
    return [sum(engine.trace.emitted) for engine in simulation.engines]


def test_round_robin_takes_turns() -> None:
    simulation = fleet("round-robin", *(request((2,), at=float(i)) for i in range(4)))
    assert [record.tokens for record in simulation.run()] == [2, 2, 2, 2]
    assert emitted(simulation) == [4, 4]


def test_least_loaded_avoids_the_busy_engine() -> None:
    simulation = fleet("least-loaded", request((50,)), request((2,), at=20.0), request((2,), at=100.0))
    simulation.run()
    assert emitted(simulation) == [50, 4]


def test_spread_branches_compute_the_prefix_on_every_engine() -> None:
    simulation = fleet("round-robin", request((3,), (5, 5), (2,)))
    (record,) = simulation.run()
    assert (record.tokens, record.kind, record.branches, record.index) == (15, "branching", 2, 0)
    assert [choice.tokens for choice in record.choices] == [3, 5, 5, 2]
    assert [choice.index for choice in record.choices] == [0, 1, 2, 3]
    # Serial on engine 0: 4. The fork's prefix of 7 on engine 1, then on engine 0, which holds all but the tail. The
    # last stage on engine 1: of 17 it holds the 7 and its own branch of 5.
    assert prefills(simulation) == [4 + 1, 7 + (17 - 12)]


def test_a_group_stays_on_one_engine_and_computes_its_prefix_once() -> None:
    simulation = fleet("group-affine", request((3,), (5, 5), (2,)))
    (record,) = simulation.run()
    assert record.tokens == 15
    assert prefills(simulation) == [4 + 1, 0]


def test_branches_that_meet_are_one_group() -> None:
    simulation = fleet("round-robin", request((3,), (5, 5, 5, 5)))
    simulation.run()
    assert [max(engine.trace.requests) for engine in simulation.engines] == [1, 1]
    assert emitted(simulation) == [3 + 10, 10]


def test_slack_aware_counts_requests_where_least_loaded_counts_branches() -> None:
    forked = request((30,) * 6)  # one request with six branches on engine 0
    pair = [request((30,), at=1.0), request((30,), at=2.0)]
    late = request((2,), at=60.0)
    by_branches = fleet("group-affine", forked, *pair, late)
    by_slack = fleet("slack-aware", forked, *pair, late)
    by_branches.run()
    by_slack.run()
    assert emitted(by_branches) == [180, 62]
    assert emitted(by_slack) == [180 + 30, 30 + 2]


def test_load_stops_and_spread_requests_in_service_go_on_to_their_end() -> None:
    waiting = [request((3,), (2, 2), (3,), at=float(index)) for index in range(4)]
    simulation = fleet("round-robin", *waiting, replicas=2, slots=1, duration_s=30.0)
    assert sorted(record.index for record in simulation.run()) == [0, 1]
    assert all(record.tokens == 10 for record in simulation.records)
    assert sum(engine.trace.unserved for engine in simulation.engines) == 2
    assert [engine.queue.slots_taken for engine in simulation.engines] == [0, 0]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_fleet_of_one_is_the_engine_alone(router: str) -> None:
    scenario = replace(load("saturated"), duration_steps=300, join_prefill=False)
    machine = hardware("a100x8-qwen3-32b")
    case = Case(scenario=scenario, machine=machine, policy="taper", seed=1, fleet=Fleet(replicas=1, router=router))
    setting = settle(scenario, machine)
    alone, together = simulate(case).records, build_fleet(case, setting).run()
    assert sorted(record.tokens for record in together) == sorted(record.tokens for record in alone)
    if ROUTERS[router](1).is_affine:
        assert together == alone


def test_routers_are_known_by_name() -> None:
    with pytest.raises(ConfigError, match="router must be one of round-robin, least-loaded, group-affine, slack-aware"):
        check_router("random")


def test_least_gives_the_branches_of_a_stage_to_different_engines() -> None:
    router: Router = ROUTERS["least-loaded"](3)
    assert [router.place() for _ in range(4)] == [0, 1, 2, 0]

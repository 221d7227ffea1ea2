"""Small runs worked out by hand: a = 10 s, b = 1 s a row, d = 2 s a prompt token; context is free unless said."""

from dataclasses import replace

import numpy as np
import pytest

from taper.core.controller import Controller
from taper.core.policies import resolve
from taper.core.types import Knobs, Plan, Slo, StepLoad, StepOutcome, StepView
from taper.records import RequestRecord
from taper.sim.cost import Disturbance, StepCost
from taper.sim.hardware import Hardware
from taper.sim.loop import Engine, Simulation
from taper.sim.trace import Trace
from taper.workload import Branching, Lengths, Mix, Request, Synthetic

MACHINE = Hardware(
    name="m", base_s=10.0, row_s=1.0, context_s=0.0, prefill_s=2.0, max_batched_tokens=8, max_rows=64, noise=0.0
)


def request(*stages: tuple[int, ...], at: float = 0.0, prompt: int = 4) -> Request:
    return Request(seed=0, index=0, arrival_s=at, prompt_tokens=prompt, stages=stages)


def run(
    *requests: Request,
    policy: str = "eager",
    machine: Hardware = MACHINE,
    engine: Engine | None = None,
    duration_s: float = 1e6,
    slo_s: float = 50.0,
    controller: Controller | None = None,
    stage_clocks: bool = False,
) -> Trace:
    return Simulation(
        controller=controller or Controller(latency=machine.predictor(), policy=resolve(policy), knobs=Knobs()),
        machine=machine,
        cost=StepCost(machine, Disturbance(), duration_s=duration_s, seed=0),
        engine=engine or Engine(fork_prefill_tokens=1),
        slo=Slo(tpot_s=slo_s, ttft_s=100.0),
        requests=[replace(one, index=index) for index, one in enumerate(requests)],
        duration_s=duration_s,
        stage_clocks=stage_clocks,
    ).run()


def times(record: RequestRecord) -> list[tuple[float, float, int]]:
    return [(c.first_token_s, c.last_token_s, c.tokens) for c in record.choices]


def test_one_serial_request() -> None:
    trace = run(request((3,), at=5.0))
    assert list(trace.step_s) == [18.0, 11.0, 11.0]  # the prompt, then two more tokens
    (record,) = trace.records
    assert (record.scheduled_s, record.sent_s, record.ended_s) == (5.0, 5.0, 45.0)
    assert times(record) == [(23.0, 45.0, 3)]
    assert (record.kind, record.tpot_s) == ("serial", 11.0)


def test_context_is_what_the_row_reads() -> None:
    trace = run(request((3,)), machine=replace(MACHINE, context_s=1.0))
    assert list(trace.step_s) == [18.0, 11.0 + 5, 11.0 + 6]


def test_a_prompt_beyond_the_step_comes_in_chunks() -> None:
    trace = run(request((1,), prompt=20))
    assert list(trace.prefill_tokens) == [8, 8, 4]
    assert list(trace.rows) == [0, 0, 0]


def test_prompt_tokens_share_the_step_with_decode_rows() -> None:
    trace = run(request((4,)), request((1,), at=20.0, prompt=20))
    assert list(zip(trace.rows, trace.prefill_tokens, strict=True)) == [(0, 4), (1, 0), (1, 7), (1, 7), (0, 6)]


def test_eager_runs_all_branches_of_an_arrival_fork_once_the_prompt_is_there() -> None:
    trace = run(request((3, 3, 2)))
    # prompt and first token of the first branch; it goes on while its siblings compute their one-token tails
    assert list(zip(trace.rows, trace.prefill_tokens, strict=True)) == [(0, 4), (1, 2), (3, 0), (1, 0)]
    assert list(trace.step_s) == [18.0, 15.0, 13.0, 11.0]
    (record,) = trace.records
    assert times(record) == [(18.0, 46.0, 3), (33.0, 46.0, 2), (33.0, 57.0, 3)]


def test_off_runs_one_row_per_request_whatever_forks() -> None:
    trace = run(request((2,), (3, 3), (2,)), request((8,)), policy="off")
    assert max(trace.rows) <= 2
    assert sorted(r.tokens for r in trace.records) == [8, 10]


def test_a_join_waits_for_the_longest_branch() -> None:
    trace = run(request((1,), (2, 5), (1,)))
    (record,) = trace.records
    ends = sorted(last for _, last, _ in times(record))
    assert [tokens for _, _, tokens in times(record)] == [1, 2, 5, 1]
    assert ends[-1] == record.ended_s > ends[-2]


def test_a_join_may_compute_the_other_children_again() -> None:
    spec = request((1,), (2, 5, 3), (1,))
    free = run(spec)
    paid = run(spec, engine=Engine(fork_prefill_tokens=1, join_prefill=True))
    assert sum(paid.prefill_tokens) - sum(free.prefill_tokens) == 2 + 3


def test_requests_beyond_the_bound_wait_in_order() -> None:
    trace = run(*(request((3,), at=float(i)) for i in range(4)), engine=Engine(max_requests=2))
    assert max(trace.requests) == 2
    assert [r.index for r in trace.records] == [0, 1, 2, 3]
    assert [r.sent_s for r in sorted(trace.records, key=lambda r: r.index)][2:] == [
        r.ended_s for r in trace.records[:2]
    ]


def test_resident_rows_are_bounded() -> None:
    trace = run(request((4,) * 8), machine=replace(MACHINE, max_rows=3))
    assert max(trace.rows) == 3
    assert sum(r.tokens for r in trace.records) == 32


def test_load_stops_at_the_end_and_what_is_in_service_drains() -> None:
    waiting = [request((5,), at=float(i)) for i in range(5)]
    trace = run(*waiting, engine=Engine(max_requests=1), duration_s=70.0)
    assert [r.index for r in trace.records] == [0, 1]  # 62 s each
    assert trace.records[-1].ended_s == 124.0


class Scripted:
    """A plug-in policy: does as eager does, but for what the test overrides."""

    name = "scripted"
    is_stock = False

    def __init__(self, **overrides: object) -> None:
        self._overrides = overrides

    def __call__(self, view: StepView, predict: object, knobs: Knobs, guidance: object) -> Plan:
        run_all = np.ones(len(view.request), dtype=bool)
        plan = Plan(
            run=run_all,
            protected=run_all,
            load=StepLoad(rows=len(run_all), context_tokens=0, prefill_tokens=0),
            baseline_s=1.0,
            predicted_s=3.0,
            budget_s=np.inf,
            slack_min_s=np.inf,
        )
        return replace(plan, **self._overrides)  # type: ignore[arg-type]


class Watched(Controller):
    """The shipped controller, with what it was told kept for the test."""

    def __init__(self, policy: Scripted) -> None:
        super().__init__(latency=MACHINE.predictor(), policy=policy, knobs=Knobs())  # type: ignore[arg-type]
        self.outcomes: list[StepOutcome] = []

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)


def test_the_plans_prefill_limit_is_kept() -> None:
    trace = run(request((1,), prompt=8), controller=Watched(Scripted(prefill_limit_tokens=3)))
    assert list(trace.prefill_tokens) == [3, 3, 2]


def test_a_plan_that_runs_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="runs nothing"):
        run(request((1,)), controller=Watched(Scripted(run=np.zeros(1, dtype=bool))))


def test_outcomes_tell_load_latency_and_what_finished() -> None:
    controller = Watched(Scripted())
    run(request((4, 2)), controller=controller)
    assert [o.load for o in controller.outcomes] == [
        StepLoad(rows=0, context_tokens=0, prefill_tokens=4),
        StepLoad(rows=1, context_tokens=5, prefill_tokens=1),  # the sibling's tail
        StepLoad(rows=2, context_tokens=6 + 5, prefill_tokens=0),
        StepLoad(rows=1, context_tokens=7, prefill_tokens=0),
    ]
    assert [o.measured_s for o in controller.outcomes] == [18.0, 13.0, 12.0, 11.0]
    (finished,) = controller.outcomes[-1].finished
    assert (finished.tokens, finished.serial_tokens, finished.critical_path_tokens) == (6, 0, 4)
    # Two steps of E = 3 - 1 while it had branches; with one branch left there is nothing to decide.
    assert (finished.residence_s, finished.externality_s) == (36.0, 4.0)


def test_observations_lag_by_as_many_steps_as_the_engine_is_told() -> None:
    controller = Watched(Scripted())
    run(request((3,)), controller=controller, engine=Engine(lag_steps=1))
    assert [o.measured_s for o in controller.outcomes] == [18.0, 11.0]


@pytest.mark.parametrize("policy", ["off", "cap:2", "eager", "taper-paper", "taper"])
def test_no_token_is_lost_and_none_is_invented(policy: str) -> None:
    branching = Branching(stage=Lengths(low=1, high=5), fanout=Lengths(low=2, high=6), branch=Lengths(low=1, high=12))
    mix = Mix(branching_share=0.5, prompt=Lengths(low=1, high=30), serial=Lengths(low=1, high=40), branching=branching)
    requests = list(Synthetic(mix=mix).requests(seed=3, rate_rps=0.02, horizon_s=5000.0))
    trace = run(*requests, policy=policy, slo_s=20.0, engine=Engine(max_requests=6))
    assert {r.index: r.tokens for r in trace.records} == {i: r.tokens for i, r in enumerate(requests)}
    assert sum(trace.emitted) == sum(r.tokens for r in requests)
    assert all(r.sent_s >= r.scheduled_s and r.ttft_s is not None and r.ttft_s > 0 for r in trace.records)
    assert [sorted(c.tokens for c in r.choices) for r in trace.records] == [
        sorted(n for stage in requests[r.index].stages for n in stage) for r in trace.records
    ]


def test_a_request_whose_new_branch_finds_no_room_goes_on_with_one_it_has() -> None:
    full = replace(MACHINE, max_rows=2)
    trace = run(request((40, 40)), request((40, 40)), policy="off", machine=full)
    assert list(trace.rows[:40]) == [0] + 39 * [2]  # both first branches to their end, past the quantum of 16
    assert sum(r.tokens for r in trace.records) == 160


def test_planning_takes_time_only_where_there_is_something_to_decide() -> None:
    slow = replace(MACHINE, planner_s=2.0)
    serial = run(request((3,)), policy="off", machine=slow)
    assert list(serial.end_s) == [20.0, 31.0, 42.0]  # while its prompt is computed
    eager = run(request((3, 3)), policy="eager", machine=slow)
    assert eager.end_s[-1] == sum(eager.step_s)
    off = run(request((3, 3)), policy="off", machine=slow)
    assert len(off.step_s) == 6
    assert off.end_s[-1] == sum(off.step_s)
    assert sum(off.step_s) == sum(run(request((3, 3)), policy="off").step_s) + 2.0 * 4  # until one branch has ended


def test_a_place_is_empty_until_the_next_request_is_in_the_engine() -> None:
    two = (request((2,)), request((2,), at=1.0))
    machine = replace(MACHINE, turnaround_s=4.0)
    first, second = run(*two, machine=machine, engine=Engine(max_requests=1)).records
    assert (first.ended_s, second.sent_s) == (29.0, 33.0)
    late = (request((2,)), request((2,), at=50.0))  # nobody waited: it is there at once
    assert run(*late, machine=machine, engine=Engine(max_requests=1)).records[1].sent_s == 50.0


@pytest.mark.parametrize("apart", [False, True], ids=["one clock", "stage clocks"])
def test_a_request_is_one_to_the_controller_or_one_for_each_of_its_stages(apart: bool) -> None:
    controller = Controller(latency=MACHINE.predictor(), policy=resolve("taper"), knobs=Knobs())
    told: list[tuple[int, int, int, float]] = []
    views: list[tuple[float, int]] = []
    observe, decide = controller.observe, controller.decide

    def watch(outcome: StepOutcome) -> None:
        told.extend(
            (one.tokens, one.serial_tokens, one.critical_path_tokens, one.residence_s) for one in outcome.finished
        )
        observe(outcome)

    def look(view: StepView) -> Plan:
        views.append((float(view.first_token_s[0]), int(view.tokens[0])))
        return decide(view)

    controller.observe, controller.decide = watch, look  # type: ignore[method-assign]
    trace = run(request((2,), (3, 3), (2,)), controller=controller, stage_clocks=apart)
    (record,) = trace.records
    assert record.tokens == 10  # judged over its whole life either way
    if not apart:
        assert told == [(10, 4, 7, record.ended_s - 18.0)]
        return
    assert [one[:3] for one in told] == [(2, 2, 2), (6, 0, 3), (2, 2, 2)]
    assert sum(one[3] for one in told) < record.ended_s - 18.0  # from its first token to its last, each of them
    assert sum(np.isnan(first) and not tokens for first, tokens in views) >= 2  # nothing is left of the stage before

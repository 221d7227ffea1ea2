"""KV that runs out, worked out by hand: a = 10 s, b = 1 s a row, d = 2 s a prompt token."""

from dataclasses import replace

import numpy as np
import pytest

from taper.core.controller import Controller
from taper.core.policies import resolve
from taper.core.types import ConfigError, Ending, Knobs, Slo, StepOutcome
from taper.sim.batch import Batch
from taper.sim.cost import Disturbance, StepCost
from taper.sim.enforce import Decision, enforce
from taper.sim.hardware import Hardware
from taper.sim.loop import Engine, Simulation
from taper.workload import Request

MACHINE = Hardware(
    name="m", base_s=10.0, row_s=1.0, context_s=0.0, prefill_s=2.0, max_batched_tokens=64, max_rows=64, noise=0.0
)
SLO = Slo(tpot_s=50.0, ttft_s=100.0)


def request(*stages: tuple[int, ...], prompt: int = 4, index: int = 0) -> Request:
    return Request(seed=0, index=index, arrival_s=0.0, prompt_tokens=prompt, stages=stages)


class Watched(Controller):
    """The shipped controller, with what it was told kept for the test."""

    def __init__(self, policy: str) -> None:
        super().__init__(latency=MACHINE.predictor(), policy=resolve(policy), knobs=Knobs())
        self.outcomes: list[StepOutcome] = []

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)
        super().observe(outcome)


def simulation(*requests: Request, kv: int, policy: str = "eager", tail: int = 1) -> tuple[Simulation, Watched]:
    machine, controller = replace(MACHINE, kv_tokens=kv), Watched(policy)
    built = Simulation(
        controller=controller,
        machine=machine,
        cost=StepCost(machine, Disturbance(), duration_s=1e6, seed=0),
        engine=Engine(fork_prefill_tokens=tail),
        slo=SLO,
        requests=[replace(one, index=index) for index, one in enumerate(requests)],
        duration_s=1e6,
    )
    return built, controller


def recount(batch: Batch) -> int:
    """KV from scratch: each held prefix once, and what resident branches have beyond it."""
    held = sum(one.prefix_tokens + one.kept_tokens for one in batch.active if one.holds_prefix)
    own = batch.context + batch.prefill - np.array([one.prefix_tokens for one in batch.active])[batch.request]
    return held + int(own[batch.resident].sum())


def test_the_youngest_row_is_preempted_and_computes_its_tokens_again() -> None:
    built, controller = simulation(request((6,)), request((6,)), kv=14)
    trace = built.run()
    # Prompts of 4 and 4 with a first token each, then two steps: 4 + 3 and 4 + 3 tokens fill the 14. The second goes.
    assert list(trace.rows) == [0, 2, 2, 1, 1, 1, 0, 1, 1]
    assert list(trace.prefill_tokens) == [8, 0, 0, 0, 0, 0, 7, 0, 0]
    assert (trace.preemptions, trace.recomputed_tokens) == (1, 7)
    assert [one.tokens for one in trace.records] == [6, 6]
    assert [one.ending for one in controller.outcomes].index(Ending.IGNORED) == 3
    assert list(trace.gap_s) == [11.0 + 11.0 + 11.0 + 24.0]  # the second request's fourth token after its third


def test_deferred_rows_are_the_first_victims() -> None:
    machine = replace(MACHINE, kv_tokens=13)
    batch = Batch(slo=SLO, fork_prefill_tokens=1)
    batch.admit(request((9, 9)), now_s=0.0)
    batch.admit(request((9,)), now_s=0.0)
    batch.prefill[:] = 0
    batch.context[:] = 4
    batch.active[0].started, batch.active[0].prefix_tokens = True, 4
    batch.active[1].started, batch.active[1].prefix_tokens = True, 4
    batch.add_siblings(0)
    batch.start(1)
    for branch, tokens in enumerate((2, 1, 1)):
        batch.context[branch] = 4 + tokens
        batch.prefill[branch] = 0
        batch.kv_tokens += tokens
    assert batch.kv_tokens == recount(batch) == 12
    # Branch 1, deferred, goes although branch 2 belongs to a younger request.
    decision = Decision(run=np.array([True, False, True]), protected=np.array([True, False, True]))
    rows = enforce(batch, machine, decision)
    assert (rows.preempted, rows.recomputed_tokens) == (1, 2)  # its token, and the tail where the prefix is held
    assert rows.decode.tolist() == [True, False, True]
    assert batch.resident.tolist() == [True, False, True]
    assert (batch.context[1], batch.prefill[1]) == (3, 2)
    assert batch.kv_tokens == recount(batch) == 11


def test_the_last_branch_of_a_request_takes_the_prefix_along() -> None:
    batch = Batch(slo=SLO, fork_prefill_tokens=1)
    batch.admit(request((9, 9)), now_s=0.0)
    batch.context[0], batch.prefill[0] = 4, 0
    batch.active[0].started, batch.active[0].prefix_tokens = True, 4
    batch.add_siblings(0)
    batch.preempt(0)
    assert batch.kv_tokens == recount(batch) == 0
    assert (batch.context.tolist(), batch.prefill.tolist()) == ([0, 0], [4, 4])  # whoever starts computes it
    assert batch.start_kv_tokens(1) == 4
    batch.start(1)
    batch.context[1], batch.prefill[1] = 4, 0
    batch.lend_prefix(0)
    assert (batch.context.tolist(), batch.prefill.tolist()) == ([3, 4], [1, 0])
    assert batch.kv_tokens == recount(batch) == 4


@pytest.mark.parametrize("policy", ["off", "cap:2", "eager", "taper-paper", "taper"])
def test_under_pressure_every_token_still_comes_and_the_account_holds(policy: str) -> None:
    requests = [request((3,), (8, 5, 9, 7), (4,), prompt=6 + index % 3) for index in range(8)]
    built, _ = simulation(*requests, kv=60, policy=policy, tail=2)
    while built.has_work:
        built.advance(np.nextafter(built.now_s, np.inf))
        assert built.batch.kv_tokens == recount(built.batch)
        # Only a join whose children were evicted meanwhile allocates beyond; the next step preempts for it.
        assert built.batch.kv_tokens <= 60 or built.batch.prefill.max() > 2
        assert built.batch.resident_rows == int(built.batch.resident.sum())
        assert built.batch.preempted_rows == int(built.batch.preempted.sum())
    assert [one.tokens for one in sorted(built.trace.records, key=lambda one: one.index)] == [36] * 8
    assert built.trace.preemptions > 0


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="request 0 needs 31 tokens of KV for one branch, m has 30"):
        simulation(request((9,), (3, 2), (13,)), kv=30)

"""Enforcement on the real vLLM scheduler: deferral, holds, order, bounds; the traps of its seams."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from taper.core.policies import Eager, FixedCap, resolve
from taper.core.types import Plan
from taper.engines.vllm import control
from tests.vllm.harness import BLOCK, fork, make_stock, request, server_config

OFF = server_config(policy="off")


@dataclass(frozen=True)
class Chosen:
    """A user's own policy: protects the first branch of each request and runs those named besides."""

    extras: frozenset[int] = frozenset()  # indices of branches in the view
    prefill_limit_tokens: int | None = None
    name: str = "chosen"
    is_stock: bool = False

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        plan = FixedCap(1)(view, predict, knobs, guidance)
        run = np.append(True, view.request[1:] != view.request[:-1])
        protected = run.copy()
        run[[index for index in self.extras if index < len(run)]] = True
        return replace(plan, run=run, protected=protected, prefill_limit_tokens=self.prefill_limit_tokens)


@dataclass(frozen=True)
class Random:
    """Any width for anyone, afresh at every step."""

    rng: random.Random
    name: str = "random"
    is_stock: bool = False

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        plan = FixedCap(1)(view, predict, knobs, guidance)
        extra = np.array([self.rng.random() < 0.4 for _ in plan.run], dtype=bool)
        return replace(plan, run=plan.run | extra)


class Broken:
    name = "broken"
    is_stock = False

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        raise ZeroDivisionError("a bug")


@dataclass(frozen=True)
class Starving:
    """Forgets the last request."""

    name: str = "starving"
    is_stock: bool = False

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        plan = FixedCap(1)(view, predict, knobs, guidance)
        return replace(plan, run=plan.run & (view.request != view.request[-1]))


class Unsure(Broken):
    @property
    def is_stock(self) -> bool:
        raise ZeroDivisionError("another bug")


@dataclass(frozen=True)
class Misled:
    """Width 1, priced by a predictor that is off by a factor."""

    factor: float
    name: str = "misled"
    is_stock: bool = False

    def predict(self, rows, context_tokens, prefill_tokens):
        return 0.01 * (rows + prefill_tokens) * self.factor

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        return FixedCap(1)(view, self, knobs, guidance)


@dataclass(frozen=True)
class Altered:
    """A sound plan but for one field."""

    field: str
    value: object
    name: str = "altered"
    is_stock: bool = False

    def __call__(self, view, predict, knobs, guidance) -> Plan:
        plan = FixedCap(1)(view, predict, knobs, guidance)
        return replace(plan, **{self.field: self.value(plan) if callable(self.value) else self.value})


def use(driver, policy):
    driver.taper.controller.replace(policy=policy)


def warm(driver, *requests, steps=4):
    """Everything resident and decoding, nothing deferred yet."""
    use(driver, Eager())
    driver.add(*requests)
    for _ in range(steps):
        driver.step()


def test_a_deferral_skips_exactly_one_step_and_frees_nothing(make):
    driver = make()
    warm(driver, *fork("p", 3, prompt=15), request("s"))
    use(driver, Chosen())
    held = {name: driver.blocks(name) for name in ("1_p", "2_p")}
    for _ in range(40):
        assert driver.step() == {"0_p": 1, "s": 1}
        assert {name: driver.blocks(name) for name in held} == held
    assert len(driver.blocks("0_p")[0]) > len(held["1_p"][0])
    use(driver, Eager())
    assert driver.step() == {"0_p": 1, "1_p": 1, "2_p": 1, "s": 1}


def test_the_number_of_blocks_in_use_grows_by_the_running_rows_alone(make):
    driver = make()
    warm(driver, *fork("p", 8, prompt=16))
    use(driver, Chosen())
    pool = driver.scheduler.kv_cache_manager.block_pool
    before, rows = pool.get_num_free_blocks(), len(driver.blocks("0_p")[0])
    for _ in range(2 * BLOCK):
        driver.step()
    assert before - pool.get_num_free_blocks() == len(driver.blocks("0_p")[0]) - rows == 2


def test_a_deferral_expires_by_itself(make):
    driver = make()
    warm(driver, *fork("p", 3))
    use(driver, Chosen())
    assert driver.step() == {"0_p": 1}
    use(driver, Broken())
    assert driver.step() == {"0_p": 1, "1_p": 1, "2_p": 1}


def test_unstarted_branches_are_held_in_order_and_a_lone_branch_never(make):
    driver = make(config=OFF)
    driver.add(*fork("p", 4), *fork("q", 3, arrival=1.0), request("s"))
    assert driver.step() == {"0_p": 20, "0_q": 20, "s": 20}
    waiting = [one.request_id for one in driver.scheduler.waiting]
    assert waiting == ["1_p", "2_p", "3_p", "1_q", "2_q"]
    assert all(one.status is RequestStatus.WAITING for one in driver.scheduler.waiting)
    assert driver.taper.table.parallel_groups == 2


def test_holds_leave_a_priority_queue_sound(make):
    driver = make(config=OFF, policy="priority")
    driver.add(*fork("p", 3, priority=1), request("s", priority=0))
    assert sorted(driver.step()) == ["0_p", "s"]
    assert sorted(one.request_id for one in driver.scheduler.waiting) == ["1_p", "2_p"]
    driver.run()
    assert driver.finished == {"0_p", "1_p", "2_p", "s"}


def test_running_rows_are_ordered_for_preemption(make):
    driver = make()
    warm(driver, *fork("p", 3), *fork("q", 3, arrival=1.0), request("s"))
    use(driver, Chosen(extras=frozenset({2, 4})))
    driver.step()
    order = [one.request_id for one in driver.scheduler.running]
    assert order == ["0_p", "0_q", "s", "2_p", "1_q", "1_p", "2_q"]


def test_the_victim_of_a_preemption_is_a_deferred_row(make):
    """16 blocks in all. Protected rows grow until one must go: not the serial request that came last."""
    driver = make(blocks=16, max_model_len=200)
    warm(driver, *fork("p", 4, prompt=30, tokens=150), request("s", prompt=30, tokens=150))
    use(driver, Chosen())
    preempted = []
    for _ in range(80):
        output = driver.schedule()
        preempted += sorted(output.preempted_req_ids or ())
        assert {"0_p", "s"} <= output.num_scheduled_tokens.keys() or not driver.taper.table.branches
        while len(driver.in_flight) > (1 if driver.is_async else 0):
            driver.update()
        if preempted:
            break
    assert preempted == ["3_p"]


def test_a_preempted_step_gives_no_sample(make):
    driver = make(blocks=16, max_model_len=200)
    warm(driver, *fork("p", 4, prompt=30, tokens=150), request("s", prompt=30, tokens=150), steps=5)
    use(driver, Chosen())
    while not driver.outputs[-1].preempted_req_ids:
        driver.step()
    while driver.in_flight:
        driver.update()
    assert driver.taper.last_step.ending.value == "ignored"
    assert not driver.taper.last_step.is_representative


def test_the_last_running_row_of_an_adapter_is_never_deferred(make):
    """Room for one adapter. Were all of its rows deferred, vLLM would let in the other, then fail an assertion."""
    driver = make(loras=1)
    tag = {"taper_group": "g"}
    warm(driver, request("plain", xargs=tag), request("a1", lora=1, xargs=tag), request("a2", lora=1, xargs=tag))
    use(driver, FixedCap(1))
    driver.add(request("b", lora=2))
    seen = set()
    for _ in range(30):
        scheduled = driver.step()
        if {"a1", "a2"} & {one.request_id for one in driver.scheduler.running}:
            assert {"a1", "a2"} & scheduled.keys()
            assert "b" not in scheduled
        seen |= scheduled.keys()
    assert {"a1", "a2"} <= seen
    driver.run()
    assert driver.finished == {"plain", "a1", "a2", "b"}
    assert driver.taper.fallbacks == 0


def test_every_request_has_a_row_in_every_step(make, is_async):
    """Random widths over a random mix, in little KV and few slots."""
    rng = random.Random(5)
    driver = make(rows=16, blocks=60, max_model_len=200)
    use(driver, Random(rng))
    for index in range(12):
        tokens = rng.randint(2, 60)
        driver.add(*fork(f"p{index}", rng.randint(1, 6), prompt=rng.randint(1, 60), tokens=tokens, arrival=index))
    steps = 0
    while driver.scheduler.has_requests() and steps < 5000:
        running = list(driver.scheduler.running)
        groups = {driver.taper.table.branches[one.request_id].group.key for one in running if can_run(one, is_async)}
        output = driver.schedule()
        rows = {driver.taper.table.branches[name].group.key for name in output.num_scheduled_tokens}
        if not output.preempted_req_ids:
            assert groups <= rows
        assert output.num_scheduled_tokens or not groups
        while len(driver.in_flight) > (1 if is_async else 0):
            driver.update()
        steps += 1
    assert steps < 5000
    assert len(driver.finished) == sum(1 for name in driver.tokens)
    assert driver.taper.fallbacks == 0
    assert not driver.taper.table.branches
    assert driver.scheduler.kv_cache_manager.usage == 0.0


def can_run(one, is_async):
    """Whether vLLM itself would schedule this running row (its last token may be in flight)."""
    ahead = one.num_output_placeholders
    return not ahead or one.num_computed_tokens + 2 - ahead < one.num_prompt_tokens + one.max_tokens


@pytest.mark.parametrize("policy", ["off", "cap:2", "taper", "taper-paper", "random"])
def test_outputs_are_complete_under_every_policy(make, policy):
    driver = make(config=server_config(policy="eager" if policy == "random" else policy), rows=32)
    if policy == "random":
        use(driver, Random(random.Random(1)))
    driver.add(*fork("p", 12, tokens=40), request("s", tokens=90), *fork("q", 5, prompt=100, tokens=7, arrival=1.0))
    driver.run()
    expected = {f"{i}_p": 40 for i in range(12)} | {f"{i}_q": 7 for i in range(5)} | {"s": 90}
    assert driver.tokens == expected
    assert driver.taper.fallbacks == 0


def test_aborts_in_any_state_release_everything(make):
    """500 aborts of held, deferred, running and unknown requests; then the engine is empty."""
    rng = random.Random(11)
    driver = make(rows=24, blocks=200)
    use(driver, Random(rng))
    alive, aborts, states = [], 0, set()
    while aborts < 500:
        if len(alive) < 40:
            width = rng.choice([1, 1, 4, 8])
            names = fork(f"p{len(driver.outputs)}", width, prompt=rng.randint(1, 80), arrival=aborts, tokens=100)
            driver.add(*names)
            alive += [one.request_id for one in names]
        output = driver.schedule()
        alive = [name for name in alive if name in driver.scheduler.requests]
        for name in rng.sample(alive, min(len(alive), rng.randint(0, 6))):
            one = driver.scheduler.requests[name]
            states.add("row" if name in output.num_scheduled_tokens else str(one.status))
            driver.abort(name)
            aborts += 1
        while len(driver.in_flight) > (1 if driver.is_async else 0):
            driver.update()
    assert states == {"row", "RUNNING", "WAITING"}  # running, deferred, held
    driver.abort(*alive, "never-there")
    driver.run()
    table = driver.taper.table
    assert (table.groups, table.branches, table.parallel_groups, table._silent) == ({}, {}, 0, {})
    assert driver.scheduler.kv_cache_manager.usage == 0.0
    assert driver.scheduler.get_request_counts() == (0, 0)
    assert driver.scheduler.requests == {}
    assert len(driver.taper.meter) == 0
    assert driver.taper.fallbacks == 0


def test_finishing_all_requests_at_once_empties_the_table(make):
    driver = make(config=OFF)
    driver.add(*fork("p", 4), request("s"))
    driver.step()
    driver.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not driver.taper.table.branches
    driver.run()


def test_a_request_that_ends_while_held_does_not_come_back(make):
    driver = make(config=OFF)
    driver.add(*fork("p", 3))
    driver.step()
    enforced = driver.taper.before_schedule()
    (aside,) = enforced.out_of_queue
    assert [one.request_id for one in aside.queue if one not in aside.kept] == ["1_p", "2_p"]
    driver.abort("1_p")
    driver.taper.restore(enforced)
    assert [one.request_id for one in driver.scheduler.waiting] == ["2_p"]
    driver.run()


@pytest.mark.parametrize("policy", [Broken(), Starving(), Unsure()])
def test_a_planner_fault_means_eager_counted_and_logged_once(make, caplog, policy):
    driver = make()
    use(driver, policy)
    with caplog.at_level(logging.ERROR, logger="taper"):
        driver.add(*fork("p", 4), request("s"))
        for _ in range(4):
            driver.step()
    assert sorted(driver.step()) == ["0_p", "1_p", "2_p", "3_p", "s"]
    assert driver.taper.fallbacks == 5
    assert driver.taper.window.fallbacks == 5
    assert len([record for record in caplog.records if record.name.startswith("taper")]) == 1
    driver.run()
    assert len(driver.finished) == 5


@pytest.mark.parametrize(
    "policy",
    [
        Misled(math.nan), Misled(math.inf), Misled(-math.inf),
        Altered("run", lambda plan: plan.run.astype(int)), Altered("protected", lambda plan: plan.protected[:-1]),
        Altered("predicted_s", math.inf), Altered("baseline_s", math.nan), Altered("budget_s", math.nan),
        Altered("slack_min_s", "soon"), Altered("prefill_limit_tokens", 7.5),
    ],
    ids=lambda policy: f"{policy.name} {getattr(policy, 'field', policy)}",
)  # fmt: skip
def test_a_plan_that_would_spoil_the_engine_or_its_figures_is_a_fault(make, policy):
    driver = make()
    use(driver, policy)
    driver.add(*fork("p", 4), request("s"))
    driver.run()
    assert driver.taper.fallbacks > 0
    assert len(driver.finished) == 5
    assert driver.taper.table.externality_s == 0.0
    json.dumps(control.snapshot(driver.taper), allow_nan=False)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e9])
def test_a_predictor_that_is_only_wrong_costs_no_step(make, factor):
    driver = make()
    use(driver, Misled(factor))
    driver.add(*fork("p", 4), request("s"))
    driver.run()
    assert (driver.taper.fallbacks, len(driver.finished)) == (0, 5)


def same_steps(driver, stock, script):
    """Both schedulers through the same script; the tokens of every step must be the same, in the same order."""
    for one in (driver, stock):
        for add in script:
            one.add(*add())
            for _ in range(3):
                one.step()
        one.run()
    assert [list(o.num_scheduled_tokens.items()) for o in driver.outputs] == [
        list(o.num_scheduled_tokens.items()) for o in stock.outputs
    ]
    assert [o.scheduled_cached_reqs for o in driver.outputs] == [o.scheduled_cached_reqs for o in stock.outputs]
    assert driver.tokens == stock.tokens


def serial(index):
    return lambda: [request(f"r{index}", prompt=5 + 7 * index % 50, tokens=10 + index, arrival=index)]


def test_without_branches_taper_is_stock(make, tmp_path, is_async):
    driver, stock = make(), make_stock(tmp_path, is_async=is_async)
    same_steps(driver, stock, [serial(index) for index in range(20)])
    assert driver.taper.window.deferred_row_steps == 0
    assert len(driver.taper.window.planner_s) == 0


def test_eager_is_stock_whatever_comes(make, tmp_path, is_async):
    driver = make(config=server_config(policy="eager"), rows=16, blocks=60, max_model_len=200)
    stock = make_stock(tmp_path, is_async=is_async, rows=16, blocks=60, max_model_len=200)
    forks = [lambda i=i: fork(f"p{i}", 1 + i % 7, prompt=10 * i + 1, tokens=20 + i, arrival=i) for i in range(10)]
    same_steps(driver, stock, [*forks, serial(1)])
    assert len(driver.taper.window.planner_s) == 0


def test_a_prompt_waits_for_the_limit_and_rows_do_not_wait_for_the_prompt(make, is_async):
    driver = make()
    warm(driver, *fork("p", 2))
    use(driver, Chosen(extras=frozenset({1}), prefill_limit_tokens=30))
    driver.add(request("long", prompt=100))
    steps = [driver.step() for _ in range(4)]
    assert steps == [{"0_p": 1, "1_p": 1, "long": 30}] * 3 + [{"0_p": 1, "1_p": 1, "long": 10}]
    assert driver.scheduler.max_num_scheduled_tokens == 256


def test_a_prompt_chunk_at_the_front_does_not_eat_the_tokens_of_rows_behind_it(make):
    driver = make()
    warm(driver, *fork("p", 2), steps=3)
    driver.add(request("long", prompt=500))
    driver.step()
    driver.scheduler.running.insert(0, driver.scheduler.running.pop())
    use(driver, Chosen(extras=frozenset({1}), prefill_limit_tokens=20))
    for _ in range(3):
        assert driver.step() == {"0_p": 1, "1_p": 1, "long": 20}


def test_the_bound_comes_back_after_an_engine_error(make, monkeypatch):
    driver = make()
    use(driver, Chosen(prefill_limit_tokens=1))
    driver.add(*fork("p", 3, prompt=100))
    driver.step()
    monkeypatch.setattr(driver.scheduler.kv_cache_manager, "new_step_starts", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        driver.schedule()
    assert driver.scheduler.max_num_scheduled_tokens == 256
    assert [one.request_id for one in driver.scheduler.waiting] == ["1_p", "2_p"]


def test_extras_leave_slots_to_newcomers(make):
    """16 slots, 2 of them reserved: 20 branches of one request take 14, and a serial request starts at once."""
    driver = make(rows=16)
    use(driver, FixedCap(20))
    driver.add(*fork("p", 20, tokens=400))
    for _ in range(6):
        driver.step()
    assert len(driver.scheduler.running) == 14
    driver.add(request("s"))
    assert driver.step()["s"] == 20


@pytest.mark.parametrize("limit", ["slots", "kv"])
def test_requests_that_queue_take_nothing_from_the_step(make, limit):
    """20 prompts of 200 tokens wait: they are no part of the step, of its price or of who is in service."""
    driver = make(rows=8) if limit == "slots" else make(blocks=24)
    serving = [*fork("p", 5, tokens=200), *(request(name, tokens=200) for name in "abc")]
    warm(driver, *serving)
    use(driver, resolve("taper"))
    queue = [request(f"q{at}", prompt=200, arrival=1.0) for at in range(20)]
    driver.add(*queue)
    for _ in range(6):
        assert len(driver.step()) == 8
    view, plan = driver.taper.onlooker.last_decision.frame.view, driver.taper.onlooker.last_decision.plan
    assert (len(view.tokens), len(view.request)) == (4, 8)
    assert (plan.load.rows, plan.load.prefill_tokens) == (8, 0)
    use(driver, Eager())
    driver.step()
    while driver.in_flight:
        driver.update()
    assert (driver.taper.last_step.groups, driver.taper.last_step.extra) == (4, 4)
    driver.abort(*(one.request_id for one in serving))
    assert set(driver.step()) <= {one.request_id for one in queue}
    driver.run()
    assert {one.request_id for one in queue} <= set(driver.finished)
    assert not driver.taper.fallbacks


def test_extras_do_not_start_without_kv(make):
    """24 blocks; each branch adds two of its own, and every running row may need one more."""
    driver = make(blocks=24, max_model_len=300)
    use(driver, FixedCap(30))
    driver.add(*fork("p", 30, prompt=100, tokens=20))
    driver.run()
    assert len(driver.finished) == 30
    assert not any(output.preempted_req_ids for output in driver.outputs)


def test_drafts_of_a_deferred_row_are_cleared_under_async_v1(make, is_async):
    driver = make(drafts=2)
    warm(driver, *fork("p", 2))
    use(driver, Chosen())
    shared = [-1, -1]
    for one in driver.scheduler.running:
        one.spec_token_ids = shared
    driver.taper.before_schedule()
    drafts = {one.request_id: list(one.spec_token_ids) for one in driver.scheduler.running}
    assert drafts == {"0_p": [-1, -1], "1_p": [] if is_async else [-1, -1]}
    assert shared == [-1, -1]


def test_a_step_that_came_out_empty_is_followed_by_a_free_one(make):
    driver = make()
    warm(driver, *fork("p", 3))
    use(driver, Chosen())
    while driver.in_flight:
        driver.update()
    stuck = driver.scheduler.running[0]
    stuck.next_decode_eligible_step = driver.scheduler.current_step + 2  # vLLM skips it for a reason of its own
    assert driver.step() == {}
    assert driver.step() == {"0_p": 1, "1_p": 1, "2_p": 1}


def test_a_request_keeps_a_decoding_row_while_another_of_its_branches_starts(make):
    """At width 1 a branch makes way for its sibling's start, but the start alone might fail."""
    driver = make(config=OFF)
    driver.add(*fork("p", 3, prompt=40, tokens=60))
    driver.step()
    starts = []
    for _ in range(40):
        output = driver.schedule()
        starts += [(new.req_id, sorted(output.num_scheduled_tokens)) for new in output.scheduled_new_reqs]
        while len(driver.in_flight) > (1 if driver.is_async else 0):
            driver.update()
    assert starts == [("1_p", ["0_p", "1_p"]), ("2_p", ["1_p", "2_p"])]


def test_starts_that_fail_are_tried_again_after_longer_and_longer_pauses(make):
    """A long prompt takes the step's prompt tokens, so vLLM cannot start the branch the plan names."""
    driver = make(config=OFF, max_model_len=2048)
    driver.add(*fork("p", 2, tokens=200), request("long", prompt=1500))
    driver.step()
    driver.step()
    use(driver, Chosen(extras=frozenset({0, 1, 2}), prefill_limit_tokens=16))
    held = []
    for _ in range(12):
        assert driver.step()["0_p"] == 1
        held.append(
            driver.scheduler.taper.meter._in_flight[-1].held if driver.is_async else driver.taper.last_step.held
        )
    assert held == [0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    driver.run()
    assert driver.finished == {"0_p", "1_p", "long"}

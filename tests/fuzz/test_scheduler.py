"""vLLM's real scheduler under our factory, whatever comes: arrivals, forks, aborts, too little KV, pauses, patches.

After every step: a row for every request that could have one (P1), a plan within its budget (P2) and carried out, stock
scheduling in lockstep where nothing branches (P8), every KV block accounted for, and no fault. After the last arrival
everything ends within `STEPS_PER_TOKEN` steps per token left.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from vllm.v1.core.sched.interface import PauseState

from taper.engines.vllm.control import configure
from taper.engines.vllm.enforce import with_stand_ins
from tests.fuzz.explore import Tally, explore
from tests.vllm.harness import BLOCK, PROFILE, Driver, fork, make, make_stock, request, server_config
from tests.vllm.test_scheduler import can_run

pytestmark = pytest.mark.vllm

MODEL_TOKENS = 128  # longest context: eight blocks
STEPS_PER_TOKEN = 2  # prompts are computed again after a preemption
PATIENCE_STEPS = 200  # a running request without a row: prompts may queue for the step's tokens
POLICIES = ("taper", "taper-paper", "off", "cap:3", "eager")

patches = st.one_of(
    st.fixed_dictionaries({"policy": st.sampled_from(POLICIES)}),
    st.fixed_dictionaries({"tpot_slo_s": st.sampled_from([1e-4, 0.012, 0.02, 0.05, 60.0])}),
    st.fixed_dictionaries({"knobs": st.fixed_dictionaries({"quantum_tokens": st.sampled_from([1, 16, 4096])})}),
    st.fixed_dictionaries({"knobs": st.fixed_dictionaries({"prefill_floor_tokens": st.sampled_from([1, 64])})}),
    st.fixed_dictionaries({"profile": st.sampled_from([None, PROFILE])}),
    st.dictionaries(
        st.sampled_from(["policy", "tpot_slo_s", "ttft_slo_s", "knobs", "profile", "more"]),
        st.sampled_from([[], {}, "cap:0", "cap:" + "9" * 30, "", True, -1, float("nan"), 10**400, {"rho": "x"}]),
        min_size=1,
    ),
)
claims = st.one_of(
    st.none(),
    st.fixed_dictionaries({"taper_tpot_slo_ms": st.sampled_from([50, 60.0, 500])}),
    st.dictionaries(
        st.sampled_from(["taper_group", "taper_tpot_slo_ms", "taper_priority", "taper_more", "other"]),
        st.sampled_from([None, [], "", "g", "\n", 0, -5, 2**63, float("inf"), float("nan"), True, {"a": 1}]),
    ),
)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self, tally: Tally, folder: Path) -> None:
        super().__init__()
        self.tally = tally.counts
        self.folder = folder
        self.arrivals = 0
        self.waited: Counter[Any] = Counter()  # steps a running group has gone without a row
        self.expected: dict[str, int] = {}  # output tokens of every request that was not aborted
        self.twin: Driver | None = None  # stock, in lockstep for as long as nothing branches

    @initialize(
        is_async=st.booleans(),
        rows=st.sampled_from([3, 12, 24]),
        spare_blocks=st.sampled_from([1, 4, 12, 200]),
        step_tokens=st.sampled_from([32, 128, 256]),
        queue=st.sampled_from(["fcfs", "priority"]),
        loras=st.sampled_from([0, 0, 1, 2]),
        drafts=st.sampled_from([0, 0, 2]),
        policy=st.sampled_from(POLICIES),
        profile=st.sampled_from([None, PROFILE]),
        is_serial=st.sampled_from([True, False, False]),
    )
    def start(
        self,
        is_async: bool,
        rows: int,
        spare_blocks: int,
        step_tokens: int,
        queue: str,
        loras: int,
        drafts: int,
        policy: str,
        profile: dict[str, Any] | None,
        is_serial: bool,
    ) -> None:
        self.is_serial, self.loras, self.rows, self.queue = is_serial, loras, rows, queue
        engine: dict[str, Any] = {
            "is_async": is_async,
            "rows": rows,
            "step_tokens": max(step_tokens, rows * (1 + drafts)),
            "max_model_len": MODEL_TOKENS,
            "policy": queue,
            "loras": loras,
            "drafts": drafts,
            "blocks": 1 + MODEL_TOKENS // BLOCK + spare_blocks,  # vLLM keeps one block for itself
        }
        with pytest.MonkeyPatch.context() as patch:
            config = server_config(policy=policy, profile=profile)
            self.driver = make(patch, self.folder, config=config, **engine)
        self.twin = make_stock(self.folder, **engine)
        self.driver.drafts = self.twin.drafts = drafts
        self.scheduler = self.driver.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool

    # --- what comes from outside ---

    @precondition(lambda self: len(self.expected) < 60)
    @rule(
        width=st.sampled_from([1, 1, 2, 4, 9]),
        prompt=st.integers(1, 70),
        tokens=st.integers(1, 50),
        tag=st.sampled_from([None, None, "a", "b"]),
        lora=st.integers(0, 4),
        priority=st.integers(-1, 1),
        asks=claims,
        odd_name=st.sampled_from(["", "", "", "7_", "07_", "9" * 5000 + "_"]),
    )
    def arrive(
        self,
        width: int,
        prompt: int,
        tokens: int,
        tag: str | None,
        lora: int,
        priority: int,
        asks: dict[str, Any] | None,
        odd_name: str,
    ) -> None:
        self.arrivals += 1
        name = f"{odd_name}r{self.arrivals}"
        xargs = asks if tag is None else {**(asks or {}), "taper_group": tag}
        if self.is_serial:
            width, xargs = 1, {key: value for key, value in (xargs or {}).items() if key != "taper_group"}
        given: dict[str, Any] = {
            "prompt": prompt,
            "tokens": tokens,
            "arrival": float(self.arrivals),
            "xargs": xargs,
            "lora": lora if self.loras else 0,
            "priority": priority,
        }
        for driver in self.drivers():
            driver.add(*(fork(name, width, **given) if width > 1 else [request(name, **given)]))
        names = [f"{index}_{name}" for index in range(width)] if width > 1 else [name]
        self.expected |= dict.fromkeys(names, tokens)
        self.tally["forks"] += width > 1
        self.tally["with an adapter"] += given["lora"] > 0
        self.tally["with a priority"] += self.queue == "priority" and priority != 0
        self.check_table()

    @precondition(lambda self: self.scheduler.requests)
    @rule(which=st.sets(st.integers(0, 40), min_size=1, max_size=6))
    def abort(self, which: set[int]) -> None:
        alive = list(self.scheduler.requests)
        names = {alive[index % len(alive)] for index in which}
        self.tally["aborts"] += len(names)
        for driver in self.drivers():
            driver.abort(*sorted(names), "never-there")
        for name in names:
            del self.expected[name]
        self.check_table()
        self.check_blocks()

    @rule(patch=patches)
    def patch(self, patch: dict[str, Any]) -> None:
        before = (self.driver.taper.controller.policy, self.driver.taper.slo, self.driver.taper.controller.knobs)
        answer = configure(self.driver.taper, patch)
        self.tally["patches"] += 1
        if "error" in answer:
            self.tally["refused patches"] += 1
            after = (self.driver.taper.controller.policy, self.driver.taper.slo, self.driver.taper.controller.knobs)
            assert before == after

    @rule(state=st.sampled_from([PauseState.UNPAUSED, PauseState.PAUSED_NEW, PauseState.PAUSED_ALL]))
    def pause(self, state: PauseState) -> None:
        for driver in self.drivers():
            driver.scheduler.set_pause_state(state)
        self.tally["pauses"] += state != PauseState.UNPAUSED

    @rule()
    def evict(self) -> None:
        """The engine drops all KV, that of running requests too."""
        for driver in self.drivers():
            driver.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.check_blocks()

    @rule(seconds=st.sampled_from([0.06, 5.0, 3600.0]))
    def hang(self, seconds: float) -> None:
        for driver in self.drivers():
            driver.now_s += seconds

    @rule(step_s=st.sampled_from([0.0, 1e-4, 0.01, 0.02, 0.3]))
    def take(self, step_s: float) -> None:
        for driver in self.drivers():
            driver.step_s = step_s

    # --- steps ---

    @rule(count=st.integers(1, 60))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @rule()
    def land(self) -> None:
        """What is in flight comes back, as before an idle engine."""
        for driver in self.drivers():
            while driver.in_flight:
                driver.update()
        self.check_blocks()

    def step(self) -> None:
        taper = self.driver.taper
        if taper.table.parallel_groups and not taper.controller.policy.is_stock:
            self.twin = None
        running = list(self.scheduler.running)
        could = {one.request_id for one in running if self.runs_in_stock(one)}
        idle = not self.scheduler.running and not self.driver.in_flight
        waiting = idle and self.scheduler.has_unfinished_requests()
        openings = {next(iter(group.unstarted)) for group in taper.table.groups.values() if not group.started}
        output = self.driver.schedule()
        self.tally["steps"] += 1
        self.tally["drafts"] += len(output.scheduled_spec_decode_tokens)
        self.tally["preemptions"] += len(output.preempted_req_ids or ())
        self.check_rows(output, could, openings)
        if self.scheduler.pause_state == PauseState.UNPAUSED:
            assert output.num_scheduled_tokens or output.preempted_req_ids or not (could or waiting), "an empty step"
        self.check_blocks()
        if self.twin is not None:
            self.check_twin(output, self.twin.schedule())
        for driver in self.drivers():
            if len(driver.in_flight) > (1 if driver.is_async else 0):
                driver.update()
        self.check_blocks()
        self.check_table()

    def runs_in_stock(self, one: Any) -> bool:
        """Whether vLLM itself would give this running request tokens."""
        left = min(one.num_tokens_with_spec + one.num_output_placeholders, MODEL_TOKENS - 1) - one.num_computed_tokens
        return can_run(one, self.driver.is_async) and left > 0

    def check_rows(self, output: Any, could: set[str], openings: set[str]) -> None:
        """P1 and P2, and that the step is the planned one: what is out of sight only opens its request."""
        taper, scheduled = self.driver.taper, set(output.num_scheduled_tokens)
        if self.scheduler.pause_state == PauseState.PAUSED_ALL:
            assert not scheduled
            return
        key_of = {name: branch.group.key for name, branch in taper.table.branches.items()}
        with_row = {key_of[name] for name in scheduled}
        decision = taper.onlooker.last_decision
        whole = not output.preempted_req_ids
        if decision is None:  # a stock step
            if whole and output.total_num_scheduled_tokens < self.scheduler.max_num_scheduled_tokens:
                assert could <= scheduled
        else:
            frame, plan, view = decision.frame, decision.plan, decision.frame.view
            run, _ = with_stand_ins(view, plan)
            ids = np.array([frame.columns.ids[index] for index in frame.branch])
            decodes = set(ids[run & view.resident & (view.prefill_tokens == 0)])
            assert scheduled <= set(ids[run]) | openings.difference(ids)
            assert plan.predicted_s <= plan.budget_s * (1 + 1e-9) or np.array_equal(plan.run, plan.protected)  # P2
            if whole:
                assert decodes <= scheduled
                assert {key_of[name] for name in decodes} <= with_row  # P1
            self.tally["plans"] += 1
            self.tally["deferrals"] += int(np.count_nonzero(~run & view.resident))
            self.tally["holds"] += int(np.count_nonzero(~run & ~view.resident)) + len(frame.withheld)
        for key in {key_of[name] for name in could}:
            self.waited[key] = 0 if key in with_row or not whole else self.waited[key] + 1
            assert self.waited[key] <= PATIENCE_STEPS, f"{key} starves"
        self.tally["longest wait"] = max([self.tally["longest wait"], *self.waited.values()])

    def check_twin(self, ours: Any, stock: Any) -> None:
        """P8."""
        assert list(ours.num_scheduled_tokens.items()) == list(stock.num_scheduled_tokens.items())
        assert ours.scheduled_cached_reqs == stock.scheduled_cached_reqs
        assert [one.block_ids for one in ours.scheduled_new_reqs] == [one.block_ids for one in stock.scheduled_new_reqs]
        assert ours.scheduled_spec_decode_tokens == stock.scheduled_spec_decode_tokens
        assert ours.preempted_req_ids == stock.preempted_req_ids
        self.tally["lockstep steps"] += 1

    def check_blocks(self) -> None:
        """free + held = all, and every block is held exactly as often as it is used."""
        names = self.scheduler.requests
        uses = Counter(block for name in names for group in self.driver.blocks(name) for block in group)
        uses.update(block.block_id for _, blocks in getattr(self.scheduler, "deferred_frees", ()) for block in blocks)
        held = {block.block_id: block.ref_cnt for block in self.pool.blocks if block.ref_cnt and not block.is_null}
        assert held == uses
        assert self.pool.get_num_free_blocks() + len(held) == self.pool.num_gpu_blocks - 1

    def check_table(self) -> None:
        taper = self.driver.taper
        assert taper.fallbacks == 0
        assert taper.table.branches.keys() == self.scheduler.requests.keys()
        groups = {id(branch.group) for branch in taper.table.branches.values()}
        assert len(groups) == len(taper.table.groups)
        assert taper.table.parallel_groups == sum(len(group.branches) > 1 for group in taper.table.groups.values())

    def drivers(self) -> list[Driver]:
        return [self.driver] if self.twin is None else [self.driver, self.twin]

    def teardown(self) -> None:
        """No more arrivals: everything ends, with all its tokens and all blocks free."""
        if not hasattr(self, "driver"):
            return
        self.pause(PauseState.UNPAUSED)
        left = sum(one.num_prompt_tokens + one.max_tokens for one in self.scheduler.requests.values())
        bound, steps = STEPS_PER_TOKEN * left + 10, 0
        while self.scheduler.requests:
            assert steps <= bound, f"{list(self.scheduler.requests)} do not end"
            self.step()
            steps += 1
        self.tally["worst steps per 1000 tokens"] = max(
            self.tally["worst steps per 1000 tokens"], 1000 * steps // (left + 10)
        )
        self.land()
        assert {name: self.driver.tokens.get(name, 0) for name in self.expected} == self.expected
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert self.driver.taper.table.parallel_groups == 0
        if self.twin is not None:
            assert self.twin.tokens == self.driver.tokens


def test_scheduler(tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    machine: Callable[[Tally], RuleBasedStateMachine] = lambda found: SchedulerMachine(found, tmp_path)  # noqa: E731
    wanted = ["preemptions", "deferrals", "holds", "aborts", "forks", "pauses", "refused patches", "lockstep steps"]
    wanted += ["with an adapter", "with a priority", "drafts"]
    explore(machine, tally, steps=2000, wanted=wanted, examples=20, rules=30)

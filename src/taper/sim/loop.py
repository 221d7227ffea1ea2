"""The event loop: one iteration per engine step, driving the shipped controller.

A step is decided, enforced (rows, prompt tokens, residence), priced by the ground truth, and lands: tokens are
emitted at its end, stages fork and join, finished requests leave, and the controller observes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from taper.core.controller import Controller
from taper.core.types import Bools, Ending, FinishedRequest, Ints, Plan, StepLoad, StepOutcome
from taper.records import ChoiceRecord, RequestRecord
from taper.sim import batch as cols
from taper.sim.batch import Active, Batch
from taper.sim.cost import Hardware, StepCost
from taper.sim.workload import Request

OVERRUN_FACTOR = 3.0  # a step this far above prediction says nothing about the law


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the simulated engine is set up; the same for every policy."""

    max_requests: int = 64  # admitted at once; the others wait, first come first served
    fork_prefill_tokens: int = 8  # prompt tail each new sibling computes (the rest is shared)
    join_prefill: bool = False  # all children but the longest are computed again after a join
    lag_steps: int = 0  # 1: asynchronous scheduling, a step is decided before the last one's end


@dataclass(slots=True, kw_only=True)
class Trace:
    """Everything a run leaves behind; one entry per step in each of the lists."""

    records: list[RequestRecord] = field(default_factory=list)  # in order of completion
    end_s: list[float] = field(default_factory=list)  # when the step ended
    step_s: list[float] = field(default_factory=list)
    predicted_s: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    prefill_tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)


class Simulation:
    """One run: requests x hardware x controller. Load stops at `duration_s`: what waits then is never served, what is
    in service drains. `run()` is deterministic."""

    def __init__(
        self,
        *,
        controller: Controller,
        machine: Hardware,
        cost: StepCost,
        engine: Engine,
        requests: Sequence[Request],
        duration_s: float,
        seed: int = 0,
    ) -> None:
        self._controller = controller
        self._machine = machine
        self._cost = cost
        self._engine = engine
        self._requests = requests
        self._duration_s = duration_s
        self._seed = seed  # for the records only
        self._now_s = 0.0
        self._arrived = 0
        self._waiting: deque[int] = deque()
        self._batch = Batch()
        self._unobserved: deque[StepOutcome] = deque()
        self._trace = Trace()

    def run(self) -> Trace:
        while True:
            if self._now_s < self._duration_s:
                self._admit()
            if len(self._batch):
                self._step()
            elif self._now_s < self._duration_s and self._arrived < len(self._requests):
                self._now_s = self._requests[self._arrived].arrival_s
            else:
                return self._trace

    def _admit(self) -> None:
        requests, engine = self._requests, self._engine
        while self._arrived < len(requests) and requests[self._arrived].arrival_s <= self._now_s:
            self._waiting.append(self._arrived)
            self._arrived += 1
        while (
            self._waiting
            and len(self._batch) < engine.max_requests
            and self._batch.resident_rows < self._machine.max_rows
        ):
            index = self._waiting.popleft()
            self._batch.admit(index, requests[index], now_s=self._now_s)

    def _step(self) -> None:
        batch, machine = self._batch, self._machine
        kv_free = machine.kv_tokens - batch.kv_tokens
        plan = self._controller.decide(
            batch.view(now_s=self._now_s, kv_free_tokens=kv_free, max_prefill_tokens=machine.max_batched_tokens)
        )
        decode, chunks = self._enforce(plan)
        branches = batch.branches
        load = StepLoad(
            rows=int(np.count_nonzero(decode)),
            context_tokens=int(branches[cols.CONTEXT][decode].sum()),
            prefill_tokens=sum(tokens for _, tokens in chunks),
        )
        measured_s = self._cost.seconds(load, self._now_s)
        self._now_s += measured_s
        in_service = len(batch)
        emitted = self._land(decode, chunks, plan)
        finished = self._advance()
        self._note(load, measured_s, plan, emitted)
        late = measured_s > OVERRUN_FACTOR * self._controller.latency.predict_load(load)
        outcome = StepOutcome(
            load=load,
            requests=in_service,
            measured_s=measured_s,
            ending=Ending.OVERRUN if late else Ending.CLEAN,
            finished=tuple(finished),
        )
        self._unobserved.append(outcome)
        if len(self._unobserved) > self._engine.lag_steps:
            self._controller.observe(self._unobserved.popleft())

    def _enforce(self, plan: Plan) -> tuple[Bools, list[tuple[int, int]]]:
        """The plan within the engine's own limits: decode rows, and (branch, prompt tokens) chunks."""
        branches, machine = self._batch.branches, self._machine
        run = plan.run
        fresh = run & (branches[cols.RESIDENT] == 0)
        if fresh.any():
            room = machine.max_rows - self._batch.resident_rows
            run = self._without(run, np.flatnonzero(fresh)[max(room, 0) :])
        prefilling = run & (branches[cols.PREFILL] > 0)
        decode = run & ~prefilling
        chunks = []
        if prefilling.any():
            left = machine.max_batched_tokens - int(np.count_nonzero(decode))
            if plan.prefill_limit_tokens is not None:
                left = min(left, plan.prefill_limit_tokens)
            for branch in np.flatnonzero(prefilling).tolist():
                tokens = min(int(branches[cols.PREFILL, branch]), left)
                if tokens <= 0:
                    break
                chunks.append((branch, tokens))
                left -= tokens
        if not chunks and not decode.any():
            raise RuntimeError("the plan runs nothing: an engine would spin")
        return decode, chunks

    def _without(self, run: Bools, refused: Ints) -> Bools:
        """The rows left when new branches find no room; a request left without any runs one that it has."""
        branches = self._batch.branches
        run = run.copy()
        run[refused] = False
        rows = np.bincount(branches[cols.REQUEST][run], minlength=len(self._batch))
        for group in np.unique(branches[cols.REQUEST, refused]).tolist():
            if not rows[group]:
                own = (branches[cols.REQUEST] == group) & (branches[cols.RESIDENT] == 1)
                run[np.flatnonzero(own)[:1]] = True
        return run

    def _land(self, decode: Bools, chunks: list[tuple[int, int]], plan: Plan) -> int:
        """Tokens appear at the end of the step; returns how many."""
        batch, branches = self._batch, self._batch.branches
        emitting = decode
        branches[cols.RAN] = decode
        if chunks:
            emitting = decode.copy()
            for branch, tokens in chunks:
                branches[cols.CONTEXT, branch] += tokens
                branches[cols.PREFILL, branch] -= tokens
                branches[cols.RESIDENT, branch] = 1
                branches[cols.RAN, branch] = 1
                emitting[branch] = branches[cols.PREFILL, branch] == 0
        branches[cols.CONTEXT] += emitting
        branches[cols.PROGRESS] += emitting
        branches[cols.FIRST_STEP][emitting & (branches[cols.PROGRESS] == 1)] = len(self._trace.end_s)
        gained = np.bincount(branches[cols.REQUEST][emitting], minlength=len(batch))
        requests = batch.requests
        requests[cols.TOKENS] += gained
        running = ~np.isnan(requests[cols.FIRST])
        requests[cols.EXTERNALITY] += np.where(running, plan.externality_s, 0.0)
        if not running.all():
            requests[cols.FIRST][(gained > 0) & ~running] = self._now_s
        if chunks:
            self._fork(emitting, chunks)
        return int(gained.sum())

    def _fork(self, emitting: Bools, chunks: list[tuple[int, int]]) -> None:
        """Siblings of an arrival fork exist once the first branch has computed the prompt."""
        groups = [int(self._batch.branches[cols.REQUEST, branch]) for branch, _ in chunks if emitting[branch]]
        for group in groups:
            active = self._batch.active[group]
            if not active.started:
                active.started = True
                active.context_tokens = active.spec.prompt_tokens
                self._add_siblings(group, active)

    def _add_siblings(self, group: int, active: Active) -> None:
        siblings = active.spec.stages[active.stage][1:]
        if siblings:
            tail = min(self._engine.fork_prefill_tokens, active.context_tokens)
            self._batch.add_siblings(group, siblings, context=active.context_tokens, prefill=tail)

    def _advance(self) -> list[FinishedRequest]:
        """Ended branches leave; their requests join, enter the next stage, or finish."""
        batch = self._batch
        done = batch.branches[cols.PROGRESS] >= batch.branches[cols.TARGET]
        if not done.any():
            return []
        ended = np.bincount(batch.branches[cols.REQUEST][done], minlength=len(batch))
        self._note_choices(done)
        batch.drop_branches(done)
        leaving, finished = [], []
        for group in np.flatnonzero(ended).tolist():
            active = batch.active[group]
            active.live -= int(ended[group])
            if active.live:
                continue
            if active.stage + 1 < len(active.spec.stages):
                self._next_stage(group, active)
            else:
                leaving.append(group)
                finished.append(self._finish(group, active))
        if leaving:
            batch.remove(leaving)
        return finished

    def _note_choices(self, done: Bools) -> None:
        batch = self._batch
        for group, tokens, step in batch.branches[[cols.REQUEST, cols.TARGET, cols.FIRST_STEP]][:, done].T.tolist():
            choices = batch.active[group].choices
            choices.append(
                ChoiceRecord(
                    index=len(choices),
                    tokens=tokens,
                    first_token_s=self._landed_s(step),
                    last_token_s=self._now_s,
                )
            )

    def _landed_s(self, step: int) -> float:
        ends = self._trace.end_s
        return ends[step] if step < len(ends) else self._now_s

    def _next_stage(self, group: int, active: Active) -> None:
        produced = active.spec.stages[active.stage]
        active.context_tokens += sum(produced)
        again = sum(produced) - max(produced) if self._engine.join_prefill else 0
        active.stage += 1
        active.started = True
        self._batch.restart(group, active.spec.stages[active.stage][0], context=active.context_tokens, prefill=again)
        self._add_siblings(group, active)

    def _finish(self, group: int, active: Active) -> FinishedRequest:
        spec, column = active.spec, self._batch.requests[:, group]
        first_s = float(column[cols.FIRST])
        self._trace.records.append(self._record(active))
        return FinishedRequest(
            tokens=spec.tokens,
            serial_tokens=spec.serial_tokens,
            critical_path_tokens=spec.critical_path_tokens,
            residence_s=self._now_s - first_s,
            externality_s=float(column[cols.EXTERNALITY]),
            tpot_slo_s=spec.tpot_slo_s,
        )

    def _record(self, active: Active) -> RequestRecord:
        spec = active.spec
        return RequestRecord(
            id=str(active.index),
            policy=self._controller.policy.name,
            round=0,
            seed=self._seed,
            index=active.index,
            kind="branching" if spec.branching else "serial",
            branches=max(map(len, spec.stages)),
            prompt_tokens=spec.prompt_tokens,
            scheduled_s=spec.arrival_s,
            sent_s=active.admitted_s,
            ended_s=self._now_s,
            tpot_slo_s=spec.tpot_slo_s,
            choices=tuple(active.choices),
        )

    def _note(self, load: StepLoad, measured_s: float, plan: Plan, emitted: int) -> None:
        trace = self._trace
        trace.end_s.append(self._now_s)
        trace.step_s.append(measured_s)
        trace.predicted_s.append(plan.predicted_s)
        trace.rows.append(load.rows)
        trace.prefill_tokens.append(load.prefill_tokens)
        trace.emitted.append(emitted)
        trace.requests.append(len(self._batch))

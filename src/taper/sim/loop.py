"""The event loop: one iteration per decision, driving the shipped controller.

A step is decided, enforced (slots, KV, prompt tokens), priced by the ground truth, and lands: tokens are emitted at
its end, stages fork and join, finished requests leave, and the controller observes it.

Two things save work without changing a result. As in the engine, the controller is not asked where there is nothing to
decide: a stock policy, or one branch per request and no prompt in sight. And a decision that depends on the
composition of the batch alone (stock, a fixed cap) is kept while the composition lasts and no row in competition
with a deferred sibling ends its quantum: a row that runs only moves forward in its request's order, a deferred one only
backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from taper.core.controller import Controller
from taper.core.latency import LinearLatency
from taper.core.policies import FixedCap
from taper.core.types import ConfigError, Ending, FinishedRequest, Slo, StepLoad, StepOutcome
from taper.sim.batch import Batch
from taper.sim.cost import StepCost
from taper.sim.enforce import Decision, Rows, enforce
from taper.sim.hardware import Hardware
from taper.sim.landing import Landing
from taper.sim.queue import Queue
from taper.sim.trace import Trace
from taper.workload import Request

# As the engine's step meter has it: a step this far above prediction is a hiccup, unless that many come in a row.
OVERRUN_RATIO = 5.0
OVERRUN_STREAK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How the simulated engine is set up; the same for every policy."""

    max_requests: int = 64  # admitted at once; the others wait, first come first served
    fork_prefill_tokens: int = 8  # prompt tail each new sibling computes (the rest is shared)
    join_prefill: bool = False  # all children but the longest are computed again after a join
    lag_steps: int = 0  # 1: asynchronous scheduling, a step is decided before the last one's end

    def __post_init__(self) -> None:
        for name, least in (("max_requests", 1), ("fork_prefill_tokens", 1), ("lag_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"engine: {name} must be at least {least}, not {getattr(self, name)!r}")


class Simulation:
    """One engine replica under one policy. Load stops at `duration_s`: what waits then is never served, what is in
    service drains. Deterministic."""

    def __init__(
        self,
        *,
        controller: Controller,
        machine: Hardware,
        cost: StepCost,
        engine: Engine,
        slo: Slo,
        requests: Iterable[Request] = (),
        duration_s: float,
        hold_steps: int = 1,
        stage_clocks: bool = False,
        reuse: bool = True,
    ) -> None:
        """With `hold_steps` above 1 a decision is kept that long while the batch's composition lasts: an approximation.
        With `stage_clocks` each stage of a request is a new one to the controller, as on the engine.
        `reuse` False asks the controller before every single step: the same results, slower."""
        self.now_s = 0.0
        self.batch = Batch(slo=slo, fork_prefill_tokens=engine.fork_prefill_tokens)
        self.trace = Trace()
        self.queue = Queue(machine, slots=engine.max_requests)
        self._landing = Landing(
            self.batch,
            self.queue,
            self.trace,
            policy=controller.policy.name,
            join_prefill=engine.join_prefill,
            stage_clocks=stage_clocks,
        )
        self._controller = controller
        self._machine = machine
        self._cost = cost
        self._lag_steps = engine.lag_steps
        self._duration_s = duration_s
        self._is_composed = reuse and (controller.policy.is_stock or isinstance(controller.policy, FixedCap))
        self._reuse = reuse
        self._hold_steps = hold_steps
        self._rows: Rows | None = None  # of the last step
        self._decision: Decision | None = None
        self._repeats = 0  # further steps for which the last decision is known to hold
        self._externality_s = 0.0  # the run's clock of it
        self._overruns = 0
        self._unobserved: deque[StepOutcome] = deque()
        for request in requests:
            self.submit(request)

    @property
    def waiting(self) -> int:
        """Requests that have come, or are to come, and are not in service."""
        return len(self.queue) + self.queue.coming

    @property
    def latency(self) -> LinearLatency:
        """The controller's law, as corrected so far."""
        return self._controller.latency

    @property
    def has_work(self) -> bool:
        return bool(len(self.batch) or self.waiting)

    def submit(self, request: Request, *, held_tokens: int = 0, continues: bool = False) -> None:
        """A request to come, in order of arrival; of its prompt the engine holds the first `held_tokens`.

        One that `continues` a request in service, here or on another engine, takes no slot of `max_requests` and goes
        before those that wait for one. Raises `ConfigError` for a request that can never fit.
        """
        self.queue.submit(request, held_tokens=held_tokens, continues=continues)

    def withdraw(self, stays: Callable[[Request], bool] | None = None) -> None:
        """Forget the requests that wait, all of them or those that do not stay: they are unserved."""
        if self.queue.arrive(self.now_s):  # during the last step
            self._repeats = 0
        self.trace.unserved += self.queue.withdraw(stays)

    def run(self) -> Trace:
        """To the end: the load, then the drain."""
        self.advance(np.inf)
        self.trace.unserved = self.waiting
        return self.trace

    def advance(self, until_s: float, *, stop_at_finish: bool = False) -> None:
        """Run steps until the clock has reached `until_s`, nothing is left to do before it or, if so told, a request
        has ended."""
        finished = len(self.trace.records)
        while self.now_s < until_s and not (stop_at_finish and len(self.trace.records) > finished):
            if self.now_s < self._duration_s:
                self._admit()
            if len(self.batch):
                self._step(until_s)
            elif self.queue.next_event_s < self._duration_s:
                self.now_s = min(self.queue.next_event_s, until_s)
            else:
                return

    def _admit(self) -> None:
        batch, machine = self.batch, self._machine
        if self.queue.arrive(self.now_s) and not self._is_composed:
            self._repeats = 0  # with somebody waiting there is something to decide
        while (first := self.queue.first) is not None:
            needed = first.spec.prompt_tokens + batch.resident_rows + 1
            fits = needed <= machine.kv_tokens - batch.kv_tokens or not len(batch)
            # Preempted branches are in front.
            if batch.resident_rows >= machine.max_rows or batch.preempted_rows or not fits:
                return
            self.queue.enter()
            batch.admit(first.spec, now_s=self.now_s, held_tokens=first.held_tokens, continues=first.continues)

    # --- a step ---

    def _step(self, until_s: float) -> None:
        decision, rows = self._next()
        steps, outcome = self._run_for(rows, decision, until_s)
        self._landing.land(rows, steps, externality_s=self._externality_s)
        finished: list[FinishedRequest] = []
        if not rows.is_steady or not rows.steps_left:
            finished = self._landing.advance(now_s=self.now_s, externality_s=self._externality_s)
        self._tell(replace(outcome, finished=tuple(finished)) if finished else outcome)

    def _next(self) -> tuple[Decision, Rows]:
        """What the coming step is to run, and what of it does."""
        decision, rows = self._decision, self._rows
        if rows is not None and rows.version != self.batch.version:
            rows = None
        is_short = rows is not None and rows.rows > self._machine.kv_tokens - self.batch.kv_tokens
        if decision is None or rows is None or not self._repeats or is_short:
            decision = self._decide()
            if rows is None or is_short or not rows.is_steady or rows.run_bytes != decision.run.tobytes():
                rows = enforce(self.batch, self._machine, decision)
            self._decision, self._rows = decision, rows
            self._repeats = self._horizon(rows)
        return decision, rows

    def _decide(self) -> Decision:
        batch, machine = self.batch, self._machine
        if self._reuse and self._is_stock_step():
            everything = np.ones(len(batch.request), dtype=np.bool_)
            return Decision(run=everything, protected=everything)
        plan = self._controller.decide(
            batch.view(
                now_s=self.now_s,
                kv_free_tokens=machine.kv_tokens - batch.kv_tokens,
                max_prefill_tokens=machine.max_batched_tokens,
            )
        )
        self.trace.decisions += 1
        return Decision(
            run=plan.run,
            protected=plan.protected,
            prefill_limit_tokens=plan.prefill_limit_tokens,
            externality_s=plan.externality_s,
            is_planned=not self._is_stock_step(),
        )

    def _is_stock_step(self) -> bool:
        """Whether there is nothing to decide."""
        if self._controller.policy.is_stock:
            return True
        batch = self.batch
        return len(batch.request) == len(batch) and not len(self.queue) and not batch.prefill.any()

    def _horizon(self, rows: Rows) -> int:
        """Steps for which this decision is known to hold, this one included."""
        batch = self.batch
        if not rows.is_steady:
            return 1
        steps = rows.steps_left
        if not self._is_composed:
            return steps if self._reuse and self._is_stock_step() else min(steps, self._hold_steps)
        if rows.rows < len(batch.request):  # not with all branches running
            competing = np.bincount(batch.request[~rows.decode], minlength=len(batch)) > 0
            progress = batch.progress[rows.decode & competing[batch.request]]
            quantum = int(self._controller.knobs.quantum_tokens)
            if len(progress):
                steps = min(steps, quantum - int((progress % quantum).max()))
        return steps

    def _run_for(self, rows: Rows, decision: Decision, until_s: float) -> tuple[int, StepOutcome]:
        """As many steps as the decision, time and KV allow: (their number, the last one's outcome)."""
        free = self._machine.kv_tokens - self.batch.kv_tokens
        most = max(1, min(self._repeats, free // max(1, rows.rows)))
        stop_s = until_s
        if self.now_s < self._duration_s:
            stop_s = min(stop_s, self.queue.next_event_s, self._duration_s)
        for step in range(1, most + 1):
            outcome = self._elapse(rows, decision)
            rows.context_tokens += rows.rows
            if self.now_s >= stop_s or step == most:
                break
            self._tell(outcome)
        self._repeats -= step
        rows.steps_left -= step
        return step, outcome

    def _elapse(self, rows: Rows, decision: Decision) -> StepOutcome:
        """One step passes: priced, and noted. Where there was something to decide, that took part of it."""
        trace, in_service = self.trace, len(self.batch)
        load = StepLoad(rows=rows.rows, context_tokens=rows.context_tokens, prefill_tokens=rows.prefill_tokens)
        measured_s = self._cost.seconds(load, self.now_s) + self._machine.planner_s * decision.is_planned
        predicted_s = self._controller.latency.predict_load(load)
        self.now_s += measured_s
        self._externality_s += decision.externality_s
        trace.end_s.append(self.now_s)
        trace.step_s.append(measured_s)
        trace.predicted_s.append(predicted_s)
        trace.rows.append(rows.rows)
        trace.prefill_tokens.append(load.prefill_tokens)
        trace.requests.append(in_service)
        trace.deferred.append(rows.deferred)
        trace.emitted.append(rows.tokens)
        trace.followed.append(rows.tokens)  # the first step of new rows is put right when it lands
        ending = Ending.IGNORED if rows.preempted else self._ending(measured_s, predicted_s)
        return StepOutcome(load=load, requests=in_service, measured_s=measured_s, ending=ending)

    def _ending(self, measured_s: float, predicted_s: float) -> Ending:
        if measured_s <= OVERRUN_RATIO * predicted_s:
            self._overruns = 0
            return Ending.CLEAN
        self._overruns += 1
        return Ending.OVERRUN if self._overruns <= OVERRUN_STREAK else Ending.CLEAN

    def _tell(self, outcome: StepOutcome) -> None:
        self._unobserved.append(outcome)
        if len(self._unobserved) > self._lag_steps:
            self._controller.observe(self._unobserved.popleft())

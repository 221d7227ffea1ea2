"""Between vLLM's scheduler and the controller: bookkeeping, planning and enforcement of one engine replica.

Nothing that goes wrong here may cost a request: every hook runs guarded. A fault is counted and logged once,
and the step runs as stock vLLM would run it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from taper.claims import Claims, parse_claims
from taper.config import ServerConfig, resolve_policy
from taper.core.controller import Controller
from taper.core.latency import LinearLatency
from taper.core.policies import Policy
from taper.core.types import ConfigError, FinishedRequest, Knobs, Slo, StepLoad, StepOutcome
from taper.engines.vllm import compat, enforce, view
from taper.engines.vllm.enforce import Enforced
from taper.engines.vllm.groups import GroupTable
from taper.engines.vllm.meter import Step, StepMeter, Window
from taper.engines.vllm.onlooker import Onlooker
from taper.engines.vllm.seam import SchedulerSeam, preempted, step_rows
from taper.profile import Profile, parse_profile

logger = logging.getLogger(__name__)

# A guess for a machine nobody has measured: rows are dear, so little is admitted until steps were seen.
UNCALIBRATED = LinearLatency(base_s=0.02, row_s=5e-4, context_s=2e-6, prefill_s=4e-4)
TOKENS_PER_ROW_RATE = 0.05  # weight of one step in the running mean, with speculative decoding
MAX_START_PAUSE_STEPS = 32


class Regulator:
    """State and hooks; `TaperScheduler` calls them around vLLM's own methods."""

    def __init__(self, seam: SchedulerSeam, config: ServerConfig, clock: Callable[[], float]) -> None:
        """Raises `ConfigError` for an unknown policy, a broken profile or a trace that cannot be written."""
        self.seam = seam
        self.config = config
        self.clock = clock
        self.slo: Slo = config.slo
        self.seam_report = compat.check_seams()
        self.profile: Profile | None = parse_profile(config.profile) if config.profile else None
        self.controller = self._controller(resolve_policy(config.policy), config.knobs)
        self.table = GroupTable(
            block_tokens=seam.block_tokens,
            hash_block_tokens=seam.hash_block_tokens,
            caches_prefixes=seam.caches_prefixes,
            max_rows=seam.max_rows,
        )
        self.meter = StepMeter()
        self.window = Window(since_s=clock())
        self.records: deque[dict[str, Any]] = deque(maxlen=config.record_steps)
        self.onlooker = Onlooker(seam, config, clock)
        self.last_step: Step | None = None
        self.steps = 0
        self.fallbacks = 0
        self.rejected_claims = 0
        self._finished: list[FinishedRequest] = []
        self.ran_last: dict[str, int] = {}  # request id -> tokens in the last scheduled step
        self._spins = False  # the last step came out empty although rows had been kept from it
        self._tokens_per_row = 1.0
        self._start_pause_steps = 0  # steps for which no extra branch may start
        self._next_start_pause_steps = 1

    # --- settings of a running engine ---

    def use_slo(self, slo: Slo) -> None:
        """A new default; requests in flight are held to it too, within what they claimed."""
        self.slo = slo
        self.controller.promise_s = slo.tpot_s
        for group in self.table.groups.values():
            try:
                claims = self._parsed(group.extra_args)
            except ConfigError:
                claims = replace(group.claims, slo=slo)
            self.table.set_claims(group, claims)

    def use_profile(self, profile: Profile | None) -> None:
        """Another calibrated law; None forgets the law and learns one online."""
        self.profile = profile
        if profile is not None:
            self.controller.replace(latency=profile.latency())
        else:
            self.controller = self._controller(self.controller.policy, self.controller.knobs)

    # --- requests come and go ---

    def added(self, request: Any) -> None:
        with self._guarded():
            now_s = self.clock()
            self.table.add(request, self.claims_of(request), now_s)
            self.onlooker.added(self.table.branches[request.request_id], now_s)

    def continued(self, request: Any) -> None:
        """The next chunk of a streaming-input session came in."""
        with self._guarded():
            self.table.changed(request.request_id)

    def aborted(self, request_ids: list[str] | None) -> None:
        """After vLLM ended these requests (None: all of them) from outside."""
        with self._guarded():
            for name in list(self.table.branches) if request_ids is None else request_ids:
                branch = self.table.branches.get(name)
                if branch is not None and compat.is_over(branch.request):
                    self._end(name, self.clock(), is_whole=False)

    def claims_of(self, request: Any) -> Claims:
        """The request's claims; refused ones count, and the defaults hold instead.

        Behind `ClaimsMiddleware` none are refused here: the client got its HTTP 400.
        """
        try:
            return self._parsed(compat.extra_args(request))
        except ConfigError as error:
            if not self.rejected_claims:
                logger.warning("claims of %s refused, later ones only count: %s", request.request_id, error)
            self.rejected_claims += 1
            return Claims(group=None, slo=self.slo, priority=0.0)

    def _parsed(self, extra_args: dict[str, Any] | None) -> Claims:
        sealed_only = self.config.group_secret is not None
        return parse_claims(extra_args, self.config.limits, self.slo, sealed_only=sealed_only)

    # --- around schedule() ---

    def before_schedule(self) -> Enforced:
        """Plan the coming step and make vLLM's scheduler carry it out. Never raises."""
        enforced = Enforced()
        start_s = self.clock()
        with self._guarded():
            self.onlooker.unplanned()
            if self._is_stock_step():
                return enforced
            try:
                self._regulate(enforced, start_s)
            except Exception:
                self.restore(enforced)
                enforced.plan = None
                self.onlooker.unplanned()
                raise
        enforced.planner_s = self.clock() - start_s
        return enforced

    def restore(self, enforced: Enforced) -> None:
        enforce.restore(self.seam, enforced)

    def after_schedule(self, enforced: Enforced, output: Any) -> None:
        with self._guarded():
            now_s = self.clock()
            self.ran_last = output.num_scheduled_tokens
            self.table.note_starts(new.req_id for new in output.scheduled_new_reqs)
            if not output.total_num_scheduled_tokens:
                self._spins = bool(enforced.deferred or enforced.held)
                self.meter.interrupted()
                return
            self._spins = False
            self._note_starts(enforced)
            self.meter.scheduled(self._step(enforced, output, now_s), output, self.clock())

    # --- around update_from_output() ---

    def after_update(self, output: Any, engine_outputs: dict[int, Any], now_s: float) -> None:
        """Book a step that came back at `now_s`, and let the controller observe it."""
        with self._guarded():
            for batch in engine_outputs.values():
                self.table.note_first_tokens((one.request_id for one in batch.outputs), now_s)
                for one in batch.outputs:
                    if one.finish_reason is not None:
                        self._note_end(one.request_id, now_s)
            step = self.meter.updated(output, now_s)
            if self.seam.is_empty:
                self.table.clear()
                self.onlooker.unplanned()
                self.meter.interrupted()
            if step is None:
                return
            self._note_tokens(engine_outputs, step)
            self.table.externality_s += step.externality_s
            self._book(step, now_s)
            finished, self._finished = tuple(self._finished), []
            self.controller.observe(
                StepOutcome(
                    load=step.load,
                    requests=step.groups,
                    measured_s=step.measured_s,
                    ending=step.ending,
                    finished=finished,
                    tokens_per_row=self._tokens_per_row,
                )
            )

    # --- inside ---

    def _controller(self, policy: Policy, knobs: Knobs) -> Controller:
        learn = self.profile is None
        if self.profile is not None:
            latency = self.profile.latency()
        else:
            latency = replace(UNCALIBRATED, capture_sizes=tuple(self.seam.facts["capture_sizes"]))
        return Controller(latency=latency, policy=policy, knobs=knobs, learn=learn, promise_s=self.slo.tpot_s)

    def _is_stock_step(self) -> bool:
        """Whether there is nothing to decide, so that vLLM runs as stock.

        With one branch per request every branch is its request's protected row.
        """
        return self.controller.policy.is_stock or self._spins or not self.table.parallel_groups

    def _regulate(self, enforced: Enforced, now_s: float) -> None:
        frame = view.build(
            self.table,
            self.seam,
            now_s=now_s,
            ran_last=self.ran_last,
            tokens_per_row=self._tokens_per_row,
            may_start=self._start_pause_steps == 0,
        )
        self._start_pause_steps = max(self._start_pause_steps - 1, 0)
        if not len(frame.branch):
            enforce.hold(self.seam, frame, frame.withheld, enforced)
            return
        plan = self.controller.decide(frame.view)
        enforce.check(plan, frame.view)
        enforced.plan = plan
        self.onlooker.planned(frame, plan, self.controller, self.steps + 1)
        enforced.groups = len(frame.view.tokens)
        enforce.apply(self.seam, frame, plan, enforced)

    def _note_starts(self, enforced: Enforced) -> None:
        """Where vLLM could not start what the plan started, wait: 1, 2, 4 ... steps.

        Otherwise a branch that cannot start would stand for its request step after step.
        """
        if not enforced.starts:
            return
        if all(name in self.ran_last for name in enforced.starts):
            self._next_start_pause_steps = 1
            return
        self._start_pause_steps = self._next_start_pause_steps
        self._next_start_pause_steps = min(2 * self._next_start_pause_steps, MAX_START_PAUSE_STEPS)

    def _step(self, enforced: Enforced, output: Any, now_s: float) -> Step:
        rows, context_tokens, prefill_tokens = step_rows(output)
        load = StepLoad(rows=rows, context_tokens=context_tokens, prefill_tokens=prefill_tokens)
        plan, in_service = enforced.plan, self.table.in_service
        self.steps += 1
        step = Step(
            step=self.steps,
            time_s=now_s,
            policy=self.controller.policy.name,
            load=load,
            groups=enforced.groups or in_service,
            protected=min(in_service, rows),
            extra=max(rows - in_service, 0),
            deferred=enforced.deferred,
            held=enforced.held,
            predicted_s=self.controller.latency.predict_load(load),
            planner_s=enforced.planner_s,
            is_representative=not preempted(output),
        )
        if not self.table.parallel_groups:
            step.baseline_s = step.predicted_s
        if plan is not None:
            step.protected = int(np.count_nonzero(plan.protected))
            step.extra = int(np.count_nonzero(plan.run)) - step.protected
            step.baseline_s = plan.baseline_s
            step.budget_s = plan.budget_s
            step.slack_min_s = plan.slack_min_s
            step.externality_s = max(plan.externality_s, 0.0)
        self.onlooker.scheduled(step, is_parallel=self.table.parallel_groups > 0)
        return step

    def _note_end(self, request_id: str, now_s: float) -> None:
        branch = self.table.branches.get(request_id)
        if branch is None:
            return
        if not compat.is_over(branch.request):
            self.table.changed(request_id)  # a streaming-input session reports an end and lives on
            return
        self._end(request_id, now_s, is_whole=compat.ended_well(branch.request))

    def _end(self, request_id: str, now_s: float, *, is_whole: bool) -> None:
        branch = self.table.branches[request_id]
        finished = self.table.end(request_id, now_s, is_whole=is_whole)
        if finished is not None:
            self._finished.append(finished)
        self.onlooker.ended(branch, finished, now_s)

    def _note_tokens(self, engine_outputs: dict[int, Any], step: Step) -> None:
        step.tokens = sum(len(one.new_token_ids) for batch in engine_outputs.values() for one in batch.outputs)
        if self.seam.spec_tokens and step.load.rows and not step.load.prefill_tokens:
            rate = TOKENS_PER_ROW_RATE
            self._tokens_per_row += rate * (max(step.tokens / step.load.rows, 1.0) - self._tokens_per_row)

    def _book(self, step: Step, now_s: float) -> None:
        self.window.add(step)
        self.onlooker.updated(step, now_s)
        self.records.append(step.record())
        self.last_step = step

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self.fallbacks:
                logger.exception("TAPER fault, later ones only count: this step runs as stock vLLM's would")
            self.fallbacks += 1
            self.window.fallbacks += 1

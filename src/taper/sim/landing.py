"""What the end of a step brings: tokens, forks and joins, finished requests and their records."""

from __future__ import annotations

import numpy as np

from taper.core.types import FinishedRequest
from taper.records import ChoiceRecord, RequestRecord
from taper.sim.batch import FIRST, TPOT, Active, Batch
from taper.sim.enforce import Rows
from taper.sim.queue import Queue
from taper.sim.trace import Trace


class Landing:
    """Puts what a step produced into the batch, the queue's slots and the trace."""

    def __init__(
        self, batch: Batch, queue: Queue, trace: Trace, *, policy: str, join_prefill: bool, stage_clocks: bool
    ) -> None:
        self.batch = batch
        self.trace = trace
        self._queue = queue
        self._policy = policy
        self._join_prefill = join_prefill
        self._stage_clocks = stage_clocks

    def land(self, rows: Rows, steps: int, *, externality_s: float) -> None:
        """The tokens of `steps` equal steps appear."""
        batch = self.batch
        if rows.is_new:
            self._land_first(rows, len(self.trace.end_s) - steps, externality_s)
        growth = rows.emitted if steps == 1 else rows.emitted * steps
        batch.context += growth
        batch.progress += growth
        batch.tokens += rows.gained if steps == 1 else rows.gained * steps
        batch.kv_tokens += rows.tokens * steps
        batch.last_step[rows.emits] = len(self.trace.end_s) - 1
        if rows.chunks:
            self._fork(rows)

    def _land_first(self, rows: Rows, step: int, externality_s: float) -> None:
        """What only the first step of new rows can do: begin branches and requests, end gaps, compute prompts."""
        rows.is_new = False
        batch, trace = self.batch, self.trace
        end_s = trace.end_s[step]
        batch.ran[:] = rows.decode
        for branch, tokens in rows.chunks:
            batch.context[branch] += tokens
            batch.prefill[branch] -= tokens
            batch.ran[branch] = True
        for branch in (rows.emits & (batch.last_step != step - 1)).nonzero()[0].tolist():
            trace.followed[step] -= 1
            if batch.progress[branch]:
                trace.gap_step.append(step)
                trace.gap_s.append(end_s - trace.end_s[batch.last_step[branch]])
            else:
                batch.first_step[branch] = step
        first_s = batch.requests[FIRST]
        silent = np.isnan(first_s)
        if silent.any():
            for group in np.flatnonzero(silent & (rows.gained > 0)).tolist():
                first_s[group] = end_s
                batch.active[group].externality_before_s = externality_s
        trace.preemptions += rows.preempted
        trace.recomputed_tokens += rows.recomputed_tokens

    def _fork(self, rows: Rows) -> None:
        """Siblings of an arrival fork exist once the first branch has computed the prompt."""
        batch = self.batch
        for group in [int(batch.request[branch]) for branch, _ in rows.chunks if rows.emits[branch]]:
            active = batch.active[group]
            if active.started:
                batch.lend_prefix(group)
                continue
            active.started = True
            active.prefix_tokens = active.spec.prompt_tokens
            batch.add_siblings(group)

    def advance(self, *, now_s: float, externality_s: float) -> list[FinishedRequest]:
        """Ended branches leave; their requests join, enter the next stage, or finish."""
        batch = self.batch
        done = batch.progress >= batch.target
        if not done.any():
            return []
        ended = np.bincount(batch.request[done], minlength=len(batch))
        self._note_choices(np.flatnonzero(done).tolist(), now_s)
        batch.drop_branches(done)
        leaving, finished = [], []
        for group in np.flatnonzero(ended).tolist():
            active = batch.active[group]
            active.live -= int(ended[group])
            if active.live:
                continue
            if active.stage + 1 < len(active.spec.stages):
                if self._stage_clocks:
                    finished.append(self._account(group, active, now_s, externality_s))
                    batch.restart_clock(group, now_s=now_s)
                produced = active.spec.stages[active.stage]
                batch.restart(group, recomputed_tokens=sum(produced) - max(produced) if self._join_prefill else 0)
            else:
                leaving.append(group)
                finished.append(self._finish(group, active, now_s, externality_s))
        if leaving:
            batch.remove(leaving)
        return finished

    def _note_choices(self, ended: list[int], now_s: float) -> None:
        batch = self.batch
        for branch in ended:
            choices = batch.active[batch.request[branch]].choices
            choices.append(
                ChoiceRecord(
                    index=len(choices),
                    tokens=int(batch.target[branch]),
                    first_token_s=self.trace.end_s[batch.first_step[branch]],
                    last_token_s=now_s,
                )
            )

    def _finish(self, group: int, active: Active, now_s: float, externality_s: float) -> FinishedRequest:
        if not active.continues:
            self._queue.leave(now_s)
        account = self._account(group, active, now_s, externality_s)
        self.trace.records.append(self._record(active, account.tpot_slo_s, now_s))
        return account

    def _account(self, group: int, active: Active, now_s: float, externality_s: float) -> FinishedRequest:
        """What the controller is told of a request that has ended or, with stage clocks, of its stage."""
        spec = active.spec.part(active.stage) if self._stage_clocks else active.spec
        return FinishedRequest(
            tokens=spec.tokens,
            serial_tokens=spec.serial_tokens,
            critical_path_tokens=spec.critical_path_tokens,
            residence_s=now_s - float(self.batch.requests[FIRST, group]),
            externality_s=externality_s - active.externality_before_s,
            tpot_slo_s=float(self.batch.requests[TPOT, group]),
        )

    def _record(self, active: Active, tpot_slo_s: float, now_s: float) -> RequestRecord:
        spec = active.spec
        return RequestRecord(
            id=str(spec.index),
            policy=self._policy,
            round=0,
            seed=spec.seed,
            index=spec.index,
            kind="branching" if spec.branching else "serial",
            branches=max(map(len, spec.stages)),
            prompt_tokens=spec.prompt_tokens,
            scheduled_s=spec.arrival_s,
            sent_s=active.admitted_s,
            ended_s=now_s,
            tpot_slo_s=tpot_slo_s,
            choices=tuple(active.choices),
        )

"""The admitted requests and their live branches as columns, kept in the order the controller wants.

Request columns have shape (G,), branch columns shape (B,) with branches of a request adjacent. Steps change
the columns in place; only a fork, a join, an admission or a completion changes their length.

KV is counted in tokens: a request's prefix once while any of its branches holds it, and of every resident branch
what it has beyond the prefix, prompt tokens it has yet to compute included (they are reserved when it starts). Ended
branches keep theirs for the join; what of it was evicted meanwhile is computed again there, and allocated first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from taper.core.types import Bools, Floats, Ints, Slo, StepView
from taper.records import ChoiceRecord
from taper.workload import Request

# Rows of the three tables behind the columns.
REQUEST, CONTEXT, PROGRESS, PREFILL, TARGET, FIRST_STEP, LAST_STEP = range(7)
RESIDENT, RAN, PREEMPTED, PINNED = range(4)
NEVER = -2  # not even in the step before the first
ARRIVAL, FIRST, TPOT, TTFT, PRIORITY = range(5)


@dataclass(slots=True)
class Active:
    """What the columns do not say about an admitted request."""

    spec: Request
    admitted_s: float
    continues: bool = False  # a request that another engine, or an earlier part, began
    stage: int = 0
    started: bool = False  # the stage's first branch is past its prompt, so its siblings may exist
    prefix_tokens: int = 0  # KV the request's branches share
    holds_prefix: bool = True
    kept_tokens: int = 0  # KV of this stage's ended branches, for the join
    live: int = 1
    externality_before_s: float = 0.0  # the run's externality clock at the first token
    choices: list[ChoiceRecord] = field(default_factory=list)  # of ended branches


class Batch:
    """G admitted requests with B live branches."""

    def __init__(self, *, slo: Slo, fork_prefill_tokens: int) -> None:
        self.active: list[Active] = []
        self.resident_rows = 0
        self.preempted_rows = 0  # preempted and not yet started again
        self.kv_tokens = 0
        self.version = 0  # another one whenever a branch comes or goes
        self._slo = slo
        self._tail_tokens = fork_prefill_tokens  # what a branch computes again even where its prefix is held
        self.tokens: Ints = np.zeros(0, dtype=np.int64)
        self.requests: Floats = np.empty((5, 0))
        self._set(np.empty((7, 0), dtype=np.int64), np.empty((4, 0), dtype=np.bool_))

    def __len__(self) -> int:
        return len(self.active)

    def _set(self, branches: Ints, flags: Bools) -> None:
        self.version += 1
        self.branches, self.flags = branches, flags
        self.request, self.context, self.progress, self.prefill, self.target, self.first_step, self.last_step = branches
        self.resident, self.ran, self.preempted, self.pinned = flags

    def view(self, *, now_s: float, kv_free_tokens: int, max_prefill_tokens: int) -> StepView:
        """The batch as the controller sees it; its columns are the batch's own, valid until the step lands."""
        requests = self.requests
        return StepView(
            now_s=now_s,
            arrival_s=requests[ARRIVAL],
            first_token_s=requests[FIRST],
            tokens=self.tokens,
            tpot_slo_s=requests[TPOT],
            ttft_slo_s=requests[TTFT],
            priority=requests[PRIORITY],
            request=self.request,
            context_tokens=self.context,
            progress_tokens=self.progress,
            prefill_tokens=self.prefill,
            resident=self.resident,
            ran_last=self.ran,
            pinned=self.pinned,
            kv_free_tokens=kv_free_tokens,
            max_prefill_tokens=max_prefill_tokens,
        )

    # --- requests and branches come and go ---

    def admit(self, spec: Request, *, now_s: float, held_tokens: int = 0, continues: bool = False) -> None:
        """Append a request; its first stage begins with one branch, which computes what is not held of the prompt."""
        self.active.append(Active(spec=spec, admitted_s=now_s, continues=continues))
        held = min(held_tokens, max(0, spec.prompt_tokens - self._tail_tokens))
        column = [spec.arrival_s, np.nan, self._slo.tpot_s * spec.slo_factor, self._slo.ttft_s, 0.0]
        self.requests = np.column_stack([self.requests, column])
        self.tokens = np.append(self.tokens, 0)
        last, prefill = len(self.active) - 1, spec.prompt_tokens - held
        self._insert(len(self.request), last, spec.stages[0][:1], held, prefill, resident=True)
        self.kv_tokens += spec.prompt_tokens

    def add_siblings(self, group: int) -> None:
        """The held branches of a fork, placed after the request's first."""
        active = self.active[group]
        targets = active.spec.stages[active.stage][1:]
        if targets:
            at = int(np.searchsorted(self.request, group, side="right"))
            tail = min(self._tail_tokens, active.prefix_tokens)
            self._insert(at, group, targets, active.prefix_tokens - tail, tail, resident=False)
            active.live += len(targets)

    def restart(self, group: int, *, recomputed_tokens: int) -> None:
        """The request's next stage: one resident branch (the last of the stage before is gone)."""
        active = self.active[group]
        produced = sum(active.spec.stages[active.stage])
        lost = produced - active.kept_tokens
        self.kv_tokens += lost
        recomputed_tokens = max(recomputed_tokens, lost)
        active.prefix_tokens += produced
        active.kept_tokens = 0
        active.stage += 1
        active.live = 1
        at = int(np.searchsorted(self.request, group))
        first = active.spec.stages[active.stage][:1]
        self._insert(at, group, first, active.prefix_tokens - recomputed_tokens, recomputed_tokens, resident=True)
        self.add_siblings(group)

    def restart_clock(self, group: int, *, now_s: float) -> None:
        """To the controller the request has just come."""
        self.requests[ARRIVAL, group], self.requests[FIRST, group] = now_s, np.nan
        self.tokens[group] = 0

    def drop_branches(self, done: Bools) -> None:
        """Ended branches, resident all of them, leave; what they hold stays until the join, if one is to come."""
        for branch in done.nonzero()[0].tolist():
            active = self.active[self.request[branch]]
            self.resident_rows -= 1
            if active.stage + 1 < len(active.spec.stages):
                active.kept_tokens += self._own_tokens(branch)
            else:
                self.kv_tokens -= self._own_tokens(branch)
        kept = (~done).nonzero()[0]
        self._set(self.branches.take(kept, axis=1), self.flags.take(kept, axis=1))

    def remove(self, groups: list[int]) -> None:
        """Forget finished requests; their branches are dropped already."""
        keep = np.ones(len(self.active), dtype=np.bool_)
        keep[groups] = False
        self.kv_tokens -= sum(self.active[g].prefix_tokens for g in groups if self.active[g].holds_prefix)
        self.active = [a for a, kept in zip(self.active, keep, strict=True) if kept]
        kept = keep.nonzero()[0]
        self.requests, self.tokens = self.requests.take(kept, axis=1), self.tokens.take(kept)
        self.request[:] = (np.cumsum(keep) - 1)[self.request]

    # --- KV ---

    def start_kv_tokens(self, branch: int) -> int:
        """KV that a branch without any takes when it starts."""
        active = self.active[self.request[branch]]
        return self._own_tokens(branch) + (0 if active.holds_prefix else active.prefix_tokens)

    def start(self, branch: int) -> None:
        active = self.active[self.request[branch]]
        self.kv_tokens += self.start_kv_tokens(branch)
        active.holds_prefix = True
        self.preempted_rows -= int(self.preempted[branch])
        self.preempted[branch] = False
        self.resident[branch] = True
        self.resident_rows += 1

    def preempt(self, branch: int) -> None:
        """Free a resident branch; it computes its own tokens again, and the last of a request the prefix too."""
        group = int(self.request[branch])
        self.kv_tokens -= self._own_tokens(branch)
        self.resident[branch] = False
        self.preempted[branch] = True
        self.resident_rows -= 1
        self.preempted_rows += 1
        total = int(self.context[branch] + self.prefill[branch])
        self.context[branch] = self._lent_tokens(group)
        self.prefill[branch] = total - self.context[branch]
        if not self.resident[self.request == group].any():
            self.evict_prefix(group)

    def evict_prefix(self, group: int) -> None:
        """Free the prefix of a request without a resident branch; whichever starts next computes it."""
        active = self.active[group]
        active.holds_prefix = False
        self.kv_tokens -= active.prefix_tokens + active.kept_tokens
        active.kept_tokens = 0
        own = self.request == group
        self.prefill[own] += self.context[own]
        self.context[own] = 0

    def lend_prefix(self, group: int) -> None:
        """A branch has computed the request's prefix again: the others find it."""
        lent = self._lent_tokens(group)
        short = (self.request == group) & (self.context < lent)
        self.prefill[short] -= lent - self.context[short]
        self.context[short] = lent

    def idle_prefixes(self) -> list[int]:
        """Requests that hold a prefix and have no resident branch, in order: what an engine evicts first."""
        rows = np.bincount(self.request[self.resident], minlength=len(self))
        return [g for g in np.flatnonzero(rows == 0).tolist() if self.active[g].holds_prefix]

    def _own_tokens(self, branch: int) -> int:
        return int(self.context[branch] + self.prefill[branch] - self.active[self.request[branch]].prefix_tokens)

    def _lent_tokens(self, group: int) -> int:
        return max(self.active[group].prefix_tokens - self._tail_tokens, 0)

    def _insert(
        self, at: int, group: int, targets: tuple[int, ...], context: int, prefill: int, *, resident: bool
    ) -> None:
        fresh = np.empty((7, len(targets)), dtype=np.int64)
        fresh[:] = np.array([[group], [context], [0], [prefill], [0], [0], [NEVER]])
        fresh[TARGET] = targets
        flags = np.zeros((4, len(targets)), dtype=np.bool_)
        flags[RESIDENT] = resident
        self.resident_rows += len(targets) * resident
        self._set(
            np.concatenate([self.branches[:, :at], fresh, self.branches[:, at:]], axis=1),
            np.concatenate([self.flags[:, :at], flags, self.flags[:, at:]], axis=1),
        )

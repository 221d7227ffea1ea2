"""The admitted requests and their live branches as columns, kept in the order the controller wants.

Request columns have shape (G,), branch columns shape (B,) with branches of a request adjacent. Steps change
the columns in place; only a fork, a join, an admission or a completion changes their length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from taper.core.types import Bools, StepView
from taper.records import ChoiceRecord
from taper.sim.workload import Request

# Rows of the branch table.
REQUEST, CONTEXT, PROGRESS, PREFILL, TARGET, RESIDENT, RAN, FIRST_STEP = range(8)
# Rows of the request table.
ARRIVAL, FIRST, TPOT, TTFT, EXTERNALITY, TOKENS = range(6)


@dataclass(slots=True)
class Active:
    """What the columns do not say about an admitted request."""

    index: int  # in the run's request list
    spec: Request
    admitted_s: float
    stage: int = 0
    started: bool = False  # the stage's first branch is past its prompt, so its siblings may exist
    context_tokens: int = 0  # KV the request's stages share
    live: int = 1
    choices: list[ChoiceRecord] = field(default_factory=list)  # of ended branches


class Batch:
    """G admitted requests with B live branches."""

    def __init__(self) -> None:
        self.active: list[Active] = []
        self.requests = np.empty((6, 0))
        self.branches = np.empty((8, 0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.active)

    @property
    def resident_rows(self) -> int:
        return int(self.branches[RESIDENT].sum())

    @property
    def kv_tokens(self) -> int:
        """Distinct tokens held: each request's shared prefix once, and every resident branch's own."""
        own = self.branches[PROGRESS] * self.branches[RESIDENT]
        return sum(a.context_tokens for a in self.active) + int(own.sum())

    def admit(self, index: int, spec: Request, *, now_s: float) -> None:
        """Append a request; its first stage begins with one branch, which computes the prompt."""
        self.active.append(Active(index=index, spec=spec, admitted_s=now_s))
        column = [spec.arrival_s, np.nan, spec.tpot_slo_s, spec.ttft_slo_s, 0.0, 0.0]
        self.requests = np.column_stack([self.requests, column])
        branch = [len(self.active) - 1, 0, 0, spec.prompt_tokens, spec.stages[0][0], 1, 0, 0]
        self.branches = np.column_stack([self.branches, np.array(branch, dtype=np.int64)])

    def add_siblings(self, group: int, targets: tuple[int, ...], *, context: int, prefill: int) -> None:
        """Held branches of a fork, placed after the request's own."""
        at = int(np.searchsorted(self.branches[REQUEST], group, side="right"))
        fresh = np.empty((8, len(targets)), dtype=np.int64)
        fresh[:] = np.array([[group], [context - prefill], [0], [prefill], [0], [0], [0], [0]])
        fresh[TARGET] = targets
        self.branches = np.concatenate([self.branches[:, :at], fresh, self.branches[:, at:]], axis=1)
        self.active[group].live += len(targets)

    def drop_branches(self, done: Bools) -> None:
        self.branches = self.branches[:, ~done]

    def restart(self, group: int, target: int, *, context: int, prefill: int) -> None:
        """The request's next stage: one resident branch (the last of the stage before is gone)."""
        at = int(np.searchsorted(self.branches[REQUEST], group))
        branch = np.array([[group], [context - prefill], [0], [prefill], [target], [1], [1], [0]])
        self.branches = np.concatenate([self.branches[:, :at], branch, self.branches[:, at:]], axis=1)
        self.active[group].live = 1

    def remove(self, groups: list[int]) -> None:
        """Forget finished requests; their branches are dropped already."""
        keep = np.ones(len(self.active), dtype=bool)
        keep[groups] = False
        self.active = [a for a, kept in zip(self.active, keep, strict=True) if kept]
        self.requests = self.requests[:, keep]
        renumbered = np.cumsum(keep) - 1
        self.branches[REQUEST] = renumbered[self.branches[REQUEST]]

    def view(self, *, now_s: float, kv_free_tokens: int, max_prefill_tokens: int) -> StepView:
        requests, branches = self.requests.copy(), self.branches.copy()
        return StepView(
            now_s=now_s,
            arrival_s=requests[ARRIVAL],
            first_token_s=requests[FIRST],
            tokens=requests[TOKENS].astype(np.int64),
            tpot_slo_s=requests[TPOT],
            ttft_slo_s=requests[TTFT],
            priority=np.zeros(len(self)),
            request=branches[REQUEST],
            context_tokens=branches[CONTEXT],
            progress_tokens=branches[PROGRESS],
            prefill_tokens=branches[PREFILL],
            resident=branches[RESIDENT].astype(bool),
            ran_last=branches[RAN].astype(bool),
            pinned=np.zeros(branches.shape[1], dtype=bool),
            kv_free_tokens=kv_free_tokens,
            max_prefill_tokens=max_prefill_tokens,
        )

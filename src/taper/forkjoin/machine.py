"""The state machine under every front end: fork, branch end, join, abort; budgets and deadlines.

    running --fork all--> waiting --last child over--> running (Resume) or over
    running --fork sync/none--> running        sync: waiting at its own end, while children live
    any     --end, abort, budget, deadline--> over, once

No I/O and no clock: time is an argument. Calls return what has to be done now, in order: `Begin` and `Resume` ask
for a run on the engine, `Over` says that a branch will never run again (and any run it has must be stopped).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from taper.forkjoin.plan import Budget, Ending, Join, OnError

ROOT = "0"


class BudgetExceeded(Exception):
    """A fork that the program's budget does not cover; the message names the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    branch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """The join of `branch` is complete; `children` are those that belong to it, in fork order."""

    branch: str
    children: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    branch: str
    ending: Ending
    detail: str | None = None


Action = Begin | Resume | Over


@dataclass(slots=True, eq=False)
class _Branch:
    name: str
    parent: _Branch | None
    depth: int
    join: Join = Join.NONE  # how its parent waits for it
    is_waiting: bool = False
    run_began_s: float = 0.0
    ending: Ending | None = None
    forked: int = 0  # children so far
    children: list[_Branch] = field(default_factory=list)  # in fork order
    unjoined: list[_Branch] = field(default_factory=list)  # those a join of ours still has to take

    @property
    def is_live(self) -> bool:
        return self.ending is None


class Machine:
    """One program. A branch is named by its path: "0" the root, "0.2" its second child."""

    def __init__(self, budget: Budget, *, on_error: OnError = OnError.FAIL) -> None:
        self.budget = budget
        self.tokens = 0  # generated so far, over all branches
        self.failures: list[Over] = []  # in order; the first one is the cause
        self._on_error = on_error
        self._branches: dict[str, _Branch] = {}
        self._live: dict[str, _Branch] = {}
        self._deadline_s = math.inf

    @property
    def is_over(self) -> bool:
        return bool(self._branches) and not self._live

    @property
    def started(self) -> int:
        return len(self._branches)

    @property
    def tokens_left(self) -> int:
        return self.budget.max_total_tokens - self.tokens

    @property
    def next_deadline_s(self) -> float:
        """When `tick` has something to do; infinite when never."""
        if not self._live:
            return math.inf
        if self.budget.branch_s is None:
            return self._deadline_s
        runs = [branch.run_began_s for branch in self._live.values() if not branch.is_waiting]
        return min(self._deadline_s, min(runs, default=math.inf) + self.budget.branch_s)

    def is_running(self, name: str) -> bool:
        branch = self._live.get(name)
        return branch is not None and not branch.is_waiting

    def ending(self, name: str) -> Ending | None:
        return self._branches[name].ending

    def start(self, now_s: float) -> list[Action]:
        self._deadline_s = now_s + self.budget.wall_s
        return [self._begin(_Branch(name=ROOT, parent=None, depth=0), now_s)]

    def fork(self, name: str, count: int, join: Join, now_s: float, *, parent_continues: bool) -> list[Action]:
        """Split a running branch. Raises `BudgetExceeded`, and changes nothing then."""
        parent = self._running(name)
        if self.started + count > self.budget.max_branches:
            raise BudgetExceeded(
                f"a fork into {count} would make {self.started + count} branches; "
                f"budget.max_branches is {self.budget.max_branches}"
            )
        if parent.depth + 1 > self.budget.max_depth:
            raise BudgetExceeded(f"a fork at depth {parent.depth + 1}; budget.max_depth is {self.budget.max_depth}")
        actions: list[Action] = []
        for _ in range(count):
            parent.forked += 1
            child = _Branch(name=f"{name}.{parent.forked}", parent=parent, depth=parent.depth + 1, join=join)
            parent.children.append(child)
            if join is not Join.NONE:
                parent.unjoined.append(child)
            actions.append(self._begin(child, now_s))
        if join is Join.ALL:
            parent.is_waiting = True
        elif not parent_continues:
            actions += self._over(parent, Ending.STOP, None, now_s)
        return actions

    def grew(self, name: str, tokens: int, now_s: float) -> list[Action]:
        """A running branch has generated `tokens` more."""
        self._running(name)
        self.tokens += tokens
        if self.tokens_left >= 0:
            return []
        return self._end_all(Ending.BUDGET, f"budget.max_total_tokens is {self.budget.max_total_tokens}")

    def end(self, name: str, ending: Ending, now_s: float, detail: str | None = None) -> list[Action]:
        """A running branch is over by itself or by failure; where it owes a join, it waits for that instead."""
        branch = self._running(name)
        if ending.is_failure or not branch.unjoined:
            return self._over(branch, ending, detail, now_s)
        branch.is_waiting = True
        return self._try_join(branch, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Let deadlines at or before `now_s` take effect."""
        if now_s >= self._deadline_s:
            return self._end_all(Ending.TIMEOUT, f"budget.wall_s is {self.budget.wall_s:g} s")
        limit = self.budget.branch_s
        if limit is None:
            return []
        late = [b for b in self._live.values() if not b.is_waiting and b.run_began_s + limit <= now_s]
        actions: list[Action] = []
        for branch in late:
            if branch.is_live:  # an earlier one may have taken it along
                actions += self._over(branch, Ending.TIMEOUT, f"budget.branch_s is {limit:g} s", now_s)
        return actions

    def abort(self, detail: str | None = None) -> list[Action]:
        """End everything that lives."""
        return self._end_all(Ending.ABORTED, detail)

    def _running(self, name: str) -> _Branch:
        branch = self._live.get(name)
        if branch is None or branch.is_waiting:
            raise ValueError(f"branch {name!r} is not running")
        return branch

    def _begin(self, branch: _Branch, now_s: float) -> Begin:
        branch.run_began_s = now_s
        self._branches[branch.name] = self._live[branch.name] = branch
        return Begin(branch=branch.name)

    def _over(self, branch: _Branch, ending: Ending, detail: str | None, now_s: float) -> list[Action]:
        """End one branch, and let the join it belongs to know."""
        actions = self._close(branch, ending, detail)
        if ending.is_failure:
            for child in branch.children:
                actions += self._close_tree(child, Ending.ABORTED)
        parent = branch.parent
        if parent is None or not parent.is_live or branch not in parent.unjoined:
            return actions
        if not ending.is_failure:
            return actions + (self._try_join(parent, now_s) if parent.is_waiting else [])
        if self._on_error is OnError.FAIL:
            cause = f"branch {branch.name} {ending.value}" + (f": {detail}" if detail else "")
            return actions + self._over(parent, Ending.JOIN_FAILED, cause, now_s)
        parent.unjoined.remove(branch)
        return actions + (self._try_join(parent, now_s) if parent.is_waiting else [])

    def _try_join(self, parent: _Branch, now_s: float) -> list[Action]:
        if any(child.is_live for child in parent.unjoined):
            return []
        children = tuple(child.name for child in parent.unjoined)
        parent.unjoined.clear()
        parent.is_waiting = False
        parent.run_began_s = now_s
        return [Resume(branch=parent.name, children=children)]

    def _close(self, branch: _Branch, ending: Ending, detail: str | None) -> list[Action]:
        branch.ending = ending
        del self._live[branch.name]
        over = Over(branch=branch.name, ending=ending, detail=detail)
        if ending.is_failure:
            self.failures.append(over)
        return [over]

    def _close_tree(self, branch: _Branch, ending: Ending) -> list[Action]:
        actions = self._close(branch, ending, None) if branch.is_live else []
        for child in branch.children:
            actions += self._close_tree(child, ending)
        return actions

    def _end_all(self, ending: Ending, detail: str | None) -> list[Action]:
        return [action for branch in list(self._live.values()) for action in self._close(branch, ending, detail)]

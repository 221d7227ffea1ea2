"""Nouns of fork and join: what a branch is asked to do, when it forks, and what a program may spend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from taper.core.types import ConfigError, check_range

Message = Mapping[str, Any]  # one chat message: role and content


class Join(StrEnum):
    """When a forked branch meets its children again."""

    ALL = "all"  # it waits for them at once
    SYNC = "sync"  # it goes on, and waits for them when it has nothing more to say
    NONE = "none"  # never


class OnError(StrEnum):
    """What a child that failed does to the join it belongs to."""

    FAIL = "fail"  # the join fails; what the others said so far is kept as a partial result
    SKIP = "skip"  # the child is left out


class Ending(StrEnum):
    """Why a branch is over. Every started branch gets exactly one."""

    STOP = "stop"  # said all it had to say
    LENGTH = "length"  # reached its token limit
    ERROR = "error"  # the engine refused or failed it
    TIMEOUT = "timeout"
    BUDGET = "budget"
    JOIN_FAILED = "join_failed"
    ABORTED = "aborted"

    @property
    def is_failure(self) -> bool:
        return self not in (Ending.STOP, Ending.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one program may spend; past it the program ends with a partial result that says which limit it met."""

    max_branches: int = 64  # started over the program's life, the root included
    max_depth: int = 4  # forks above one branch
    max_total_tokens: int = 32_768  # generated, over all branches
    wall_s: float = 600.0
    branch_s: float | None = None  # per uninterrupted run of one branch

    def __post_init__(self) -> None:
        for name, high in (("max_branches", 4096), ("max_depth", 16), ("max_total_tokens", 10_000_000)):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ConfigError(f"budget.{name} must be an integer, not {value!r}")
            check_range(f"budget.{name}", value, low=1, high=high, unit="")
        check_range("budget.wall_s", self.wall_s, low=0.001, high=86_400, unit="s")
        if self.branch_s is not None:
            check_range("budget.branch_s", self.branch_s, low=0.001, high=86_400, unit="s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What a branch says between two forks: one run on the engine, or several where a fork did not come about.

    max_tokens: None leaves it to what is left of context and budget; 0 asks for nothing: the leg is over at once.
    stop: strings that end it. forks_at: strings at which it may fork; where it does not, it goes on. Both are text.
    sampling: what this leg wants different from the program's own sampling parameters.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    forks_at: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    is_visible: bool = True  # does its text belong to the answer

    @property
    def kept_stops(self) -> tuple[str, ...]:
        return (*self.forks_at, *self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchSpec:
    """A child to be: its prompt is the parent's tokens so far, or `messages` if given, and then `header`.

    closing: how the child's text ends in a join; what it has not said of that itself is appended.
    """

    label: str  # unique among its siblings
    header: str = ""
    leg: Leg = field(default_factory=Leg)
    messages: tuple[Message, ...] | None = None
    closing: str = ""
    plan: object | None = None  # what the front end wants to know again when the child starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """How a branch goes on after a join: its own tokens, the children in order, `text`, and then `leg`.

    longest_first: the order of the children is free, so the one with the most tokens comes first: its KV is reused.
    """

    text: str = ""
    leg: Leg = field(default_factory=Leg)
    separator: str = ""
    longest_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A branch splits. `at` is the offset in its text (characters, over its life) behind the trigger.

    parent_continues goes with `sync` and `none`; a parent that neither continues nor joins ends at the fork.
    lead: text that the fork appends to the parent's own before the children's headers.
    resume: None ends the parent at the join.
    """

    at: int
    branches: tuple[BranchSpec, ...]
    lead: str = ""
    join: Join = Join.ALL
    parent_continues: bool = False
    resume: Resume | None = None

    def __post_init__(self) -> None:
        if not self.branches:
            raise ConfigError("a fork needs at least one branch")
        if self.join is Join.ALL and self.parent_continues:
            raise ConfigError("join must be 'sync' or 'none' where the parent continues, not 'all'")
        if self.join is Join.SYNC and not self.parent_continues:
            raise ConfigError("join 'sync' needs a parent that continues")


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A branch said that it is over, at this offset of its text."""

    at: int


Event = Fork | End

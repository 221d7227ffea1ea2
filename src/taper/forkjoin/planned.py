"""A program known before it runs: stages that fork into stages. Explicit programs and scripted profiles are both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from taper.core.types import ConfigError
from taper.forkjoin.plan import BranchSpec, Budget, Event, Fork, Join, Leg, Message, Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a branch says, and then how it forks. `leg.max_tokens` is always set; 0 forks at once.

    messages: a prompt of its own instead of its parent's tokens, and how many tokens that is.
    """

    label: str
    leg: Leg
    header: str = ""
    messages: tuple[Message, ...] | None = None
    messages_tokens: int = 0
    fork: StageFork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFork:
    """`then`: what the parent says after the join, headed by `then.header`; None ends it there."""

    branches: tuple[Stage, ...]
    join: Join = Join.ALL
    separator: str = ""
    longest_first: bool = False
    then: Stage | None = field(default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The front end of a planned program."""

    root: Stage
    name: str = "program"
    keeps_special_tokens: bool = False

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        return BranchSpec(
            label="", messages=tuple(messages) or None, header=self.root.header, leg=self.root.leg, plan=self.root
        )

    def parser(self, spec: BranchSpec, *, is_root: bool) -> PlannedParser:
        assert isinstance(spec.plan, Stage)  # noqa: S101 - narrows the type, checks no input
        return PlannedParser(spec.plan)


class PlannedParser:
    """Forks where the plan says, at the end of a run; what the branch says does not matter."""

    def __init__(self, stage: Stage) -> None:
        self.malformed = 0
        self._stage: Stage | None = stage
        self._chars = 0

    def feed(self, text: str) -> list[Event]:
        self._chars += len(text)
        return []

    def close(self) -> list[Event]:
        fork = self._stage.fork if self._stage else None
        if fork is None:
            return []
        self._stage = fork.then
        branches = tuple(
            BranchSpec(label=stage.label, header=stage.header, leg=stage.leg, messages=stage.messages, plan=stage)
            for stage in fork.branches
        )
        resume = None
        if fork.then is not None:
            resume = Resume(
                text=fork.then.header,
                leg=fork.then.leg,
                separator=fork.separator,
                longest_first=fork.longest_first,
            )
        return [Fork(at=self._chars, branches=branches, join=fork.join, resume=resume)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The most a planned program can come to. `context_tokens`: its longest branch, joins included."""

    branches: int
    depth: int
    generated_tokens: int
    width: int  # branches that run at once
    context_tokens: int


def extent(root: Stage, prompt_tokens: int, header_tokens: dict[str, int]) -> Extent:
    """header_tokens: tokens of every header and separator in the plan (see `texts`)."""

    def grow(stage: Stage, context: int) -> Extent:
        """Context: tokens before the stage's header. The result's context is the longest it or a child of it gets."""
        own = header_tokens[stage.header] + (stage.leg.max_tokens or 0)
        here = (context if stage.messages is None else stage.messages_tokens) + own
        if stage.fork is None:
            return Extent(branches=1, depth=0, generated_tokens=stage.leg.max_tokens or 0, width=1, context_tokens=here)
        parts = [grow(child, here) for child in stage.fork.branches]
        after = None
        if stage.fork.then is not None:
            texts = sum(longest_text(child, header_tokens) for child in stage.fork.branches)
            gaps = header_tokens[stage.fork.separator] * len(parts)
            after = grow(stage.fork.then, here + texts + gaps)
        later = [after] if after else []
        return Extent(
            branches=1 + sum(part.branches for part in parts) + (after.branches - 1 if after else 0),
            depth=max([1 + part.depth for part in parts] + [part.depth for part in later]),
            generated_tokens=(stage.leg.max_tokens or 0) + sum(part.generated_tokens for part in parts + later),
            width=max([sum(part.width for part in parts)] + [part.width for part in later]),
            context_tokens=max([here] + [part.context_tokens for part in parts + later]),
        )

    return grow(root, prompt_tokens)


def longest_text(stage: Stage, header_tokens: dict[str, int]) -> int:
    """Most tokens a branch can bring to a join: its headers, what it says, and what its own joins brought it."""
    total = header_tokens[stage.header] + (stage.leg.max_tokens or 0)
    if stage.fork is not None and stage.fork.then is not None:
        total += sum(
            longest_text(child, header_tokens) + header_tokens[stage.fork.separator] for child in stage.fork.branches
        )
        total += longest_text(stage.fork.then, header_tokens)
    return total


def texts(stage: Stage) -> Iterator[str]:
    """Every text of ours in the plan."""
    yield stage.header
    if stage.fork is not None:
        yield stage.fork.separator
        for part in (*stage.fork.branches, *((stage.fork.then,) if stage.fork.then else ())):
            yield from texts(part)


def refuse_unfit(need: Extent, budget: Budget, *, max_rows: int, max_model_tokens: int) -> None:
    """Raise `ConfigError` for a program that cannot end well, naming the limit it would break."""
    limits = (
        (need.branches, budget.max_branches, "branches in all", "budget.max_branches is"),
        (need.depth, budget.max_depth, "forks on top of each other", "budget.max_depth is"),
        (need.generated_tokens, budget.max_total_tokens, "generated tokens", "budget.max_total_tokens is"),
        (need.width, max_rows, "branches at once", "the rows this server holds are"),
        (need.context_tokens, max_model_tokens, "tokens in one context", "this model's context is"),
    )
    for needs, limit, what, whose in limits:
        if needs > limit:
            raise ConfigError(f"the program may come to {needs} {what}; {whose} {limit}")

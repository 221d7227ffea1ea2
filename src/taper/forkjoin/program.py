"""One program as it is handed to a run, and the state of each of its branches while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from taper.forkjoin.context import Context
from taper.forkjoin.plan import BranchSpec, Budget, Leg, OnError, Resume
from taper.forkjoin.protocol import FrontEnd, Parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Everything a run needs to know. prompt_ids: the root's prompt, without its header.

    sampling: for every run; a leg's own wins. root_tokens, branch_tokens: limits of a run of the root and of any other
    branch, where its leg sets none.
    """

    id: str
    front: FrontEnd
    root: BranchSpec
    prompt_ids: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    opening_sampling: Mapping[str, Any] = field(default_factory=dict)  # for the root's first run only
    root_tokens: int | None = None
    branch_tokens: int | None = None
    budget: Budget = field(default_factory=Budget)
    on_error: OnError = OnError.FAIL
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    replica: int | None = None

    def sampling_of(self, leg: Leg, *, is_opening: bool) -> dict[str, Any]:
        """Of one run, without its `max_tokens`: the leg's own stops and the client's."""
        merged = {**self.sampling, **(self.opening_sampling if is_opening else {}), **leg.sampling}
        return {
            **merged,
            "stop": [*leg.kept_stops, *merged.get("stop", ())],
            "skip_special_tokens": not self.front.keeps_special_tokens,
        }


@dataclass(slots=True, eq=False)
class LiveBranch:
    name: str
    parent: str | None
    spec: BranchSpec
    parser: Parser
    context: Context
    leg: Leg
    kind: str  # of the current run: see `Usage.add_prefill`
    leg_tokens: int = 0  # generated in the current leg
    task: asyncio.Task[None] | None = None
    run: int = 0  # number of the current run; what an earlier one still sends is dropped
    has_begun: bool = False  # the current run has sent its first chunk
    text_end: str = ""  # last characters of its text: enough to see its closing
    resume: Resume | None = None  # of the join it is going to


class ContextFull(Exception):
    """A branch or a join does not fit the model's context."""


class Silence:
    """The chunk of a run that asks for nothing."""

    token_ids: Sequence[int] = ()
    text = ""
    finish: str | None = "stop"
    stop: str | None = None
    cached_tokens = 0

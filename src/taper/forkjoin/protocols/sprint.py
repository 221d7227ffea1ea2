"""SPRINT: a plan with prompts forks one execution per prompt; all executions of the stage are joined in order.

    <Plan_1> ... <prompt_1.1> ... </prompt_1.1> <prompt_1.2> ... </prompt_1.2> </Plan_1>

A plan without prompts is the planner thinking on: no fork.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from taper.forkjoin.plan import BranchSpec, End, Event, Fork, Leg, Message, Resume
from taper.forkjoin.protocol import Options, no_options
from taper.forkjoin.protocols.items import Items
from taper.forkjoin.protocols.tagged import TaggedParser
from taper.forkjoin.tags import Tag

_CHILD_STOP = "</execution_"
_NUMBER = re.compile(r"\d+")


class Sprint:
    """Stage numbers are the model's own: the engine stops at every `</Plan_i>` the server can foresee.

    The planner's next plan is one of `</Plan_1>` ... `</Plan_n>`; `_MAX_STAGES` bounds n.
    """

    name = "sprint"
    keeps_special_tokens = True
    _MAX_STAGES = 32

    @classmethod
    def from_options(cls, options: Options) -> Sprint:
        no_options(cls.name, options)
        return cls()

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        return BranchSpec(label="", messages=tuple(messages), leg=self._planner())

    def parser(self, spec: BranchSpec, *, is_root: bool) -> SprintParser:
        return SprintParser(self, is_root=is_root)

    def fork(self, at: int, plan: str, items: Items) -> Fork:
        branches = tuple(
            BranchSpec(
                label=label,
                header=f"<execution_{label}>\n",
                leg=Leg(stop=(_CHILD_STOP,)),
                closing=f"</execution_{label}>\n",
            )
            for label, _ in items
        )
        return Fork(
            at=at,
            branches=branches,
            lead=f"\n<Execution_{plan}>\n",
            resume=Resume(text=f"</Execution_{plan}>\n", leg=self._planner()),
        )

    def _planner(self) -> Leg:
        return Leg(forks_at=tuple(f"</Plan_{stage}>" for stage in range(1, self._MAX_STAGES + 1)))


class SprintParser(TaggedParser):
    """Only the root plans; an execution that writes a plan has it left as text."""

    def __init__(self, family: Sprint, *, is_root: bool) -> None:
        super().__init__(("Plan", "prompt", "execution"), is_root=is_root)
        self._family = family
        self._plan: str | None = None  # the open plan's number
        self._items = Items()
        self._prompt: tuple[str | None, list[str]] | None = None  # the open prompt's id and text

    def _on_text(self, text: str) -> None:
        if self._prompt is not None:
            self._prompt[1].append(text)

    def _on_tag(self, tag: Tag) -> Event | None:
        if tag.name == "execution":
            if tag.is_closing and not self._is_root:
                return End(at=tag.end)
            self._stray(tag)
        elif not self._is_root:
            self._stray(tag)
        elif tag.name == "prompt":
            self._on_prompt_tag(tag)
        elif tag.is_closing:
            return self._close_plan(tag)
        else:
            self._open_plan(tag)
        return None

    def _open_plan(self, tag: Tag) -> None:
        if tag.id is None or not _NUMBER.fullmatch(tag.id):
            self._stray(tag)
            return
        self._drop_plan()
        self._plan, self._items = tag.id, Items(f"{tag.id}.")

    def _close_plan(self, tag: Tag) -> Fork | None:
        if self._plan is None or tag.id != self._plan:
            self._stray(tag)
            return None
        if self._prompt is not None:
            self.malformed += 1
            self._add_prompt()
        plan, items = self._plan, self._items
        self.malformed += items.faults
        self._plan = None
        return self._family.fork(tag.end, plan, items) if items else None

    def _on_prompt_tag(self, tag: Tag) -> None:
        if self._plan is None or (tag.is_closing and self._prompt is None):
            self._stray(tag)
            return
        if self._prompt is not None:
            self.malformed += not tag.is_closing or tag.id != self._prompt[0]
            self._add_prompt()
        if not tag.is_closing:
            self._prompt = (tag.id, [])

    def _add_prompt(self) -> None:
        assert self._prompt is not None  # noqa: S101 - narrows the type, checks no input
        label, text = self._prompt
        self._prompt = None
        self._items.add(label, "".join(text).strip())

    def _drop_plan(self) -> None:
        """A plan that was never closed."""
        self.malformed += self._plan is not None
        self._plan = self._prompt = None

    def _on_close(self) -> None:
        self._drop_plan()

"""HPD-style token fork: at every `<FORK>` a child starts from the text so far, and the parent goes on.

The child's header is `<CHILD>`; it ends at its end-of-sequence token. No join: its text is spliced in at the fork.
"""

from __future__ import annotations

from collections.abc import Sequence

from taper.forkjoin.plan import BranchSpec, Event, Fork, Join, Leg, Message
from taper.forkjoin.protocol import Options, no_options
from taper.forkjoin.protocols.tagged import TaggedParser
from taper.forkjoin.tags import Tag


class Hpd:
    name = "hpd"
    keeps_special_tokens = True

    @classmethod
    def from_options(cls, options: Options) -> Hpd:
        no_options(cls.name, options)
        return cls()

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        return BranchSpec(label="", messages=tuple(messages), leg=Leg())

    def parser(self, spec: BranchSpec, *, is_root: bool) -> HpdParser:
        return HpdParser(is_root=is_root)


class HpdParser(TaggedParser):
    def __init__(self, *, is_root: bool) -> None:
        super().__init__(("FORK", "CHILD"), is_root=is_root)
        self._forks = 0

    def _on_tag(self, tag: Tag) -> Event | None:
        if tag.name != "FORK" or tag.is_closing or tag.id is not None:
            self._stray(tag)
            return None
        self._forks += 1
        child = BranchSpec(label=str(self._forks), header="<CHILD>")
        return Fork(at=tag.end, branches=(child,), join=Join.NONE, parent_continues=True)

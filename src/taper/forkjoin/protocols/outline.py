"""Multiverse and ThreadWeaver: a list of outlines forks one branch per outline; all are joined in outline order.

<Goal> <Outline> 1: ... </Outline> <Outline> 2: ... </Outline> </Goal>     Multiverse; ids may nest, 1.2
<Outlines> <Outline> 1: ... </Outline> ... </Outlines>                     ThreadWeaver
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from taper.forkjoin.plan import BranchSpec, End, Event, Fork, Leg, Message, Resume
from taper.forkjoin.protocol import Options, no_options
from taper.forkjoin.protocols.items import Items
from taper.forkjoin.protocols.tagged import TaggedParser
from taper.forkjoin.tags import Tag

_ITEM = "Outline"
_ID = re.compile(r"\s*(\d+(?:\.\d+)*)\s*:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A protocol of this family: the tag around the list, the tag of a branch, and the text after the last branch."""

    name: str
    list_tag: str
    branch_tag: str
    join_text: str
    keeps_special_tokens: bool = True

    @property
    def _fork_stop(self) -> str:
        return f"</{self.list_tag}>"

    @property
    def branch_end(self) -> str:
        return f"</{self.branch_tag}>"

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        return BranchSpec(label="", messages=tuple(messages), leg=Leg(forks_at=(self._fork_stop,)))

    def parser(self, spec: BranchSpec, *, is_root: bool) -> OutlineParser:
        return OutlineParser(self, is_root=is_root)

    def fork(self, at: int, items: Items, *, is_root: bool) -> Fork:
        of_branch = Leg(forks_at=(self._fork_stop,), stop=(self.branch_end,))
        branches = tuple(
            BranchSpec(label=label, header=f"\n<{self.branch_tag}>\n{label}:", leg=of_branch, closing=self.branch_end)
            for label, _ in items
        )
        onwards = Leg(forks_at=(self._fork_stop,)) if is_root else of_branch
        return Fork(at=at, branches=branches, resume=Resume(text=self.join_text, leg=onwards))


class OutlineParser(TaggedParser):
    def __init__(self, family: Outline, *, is_root: bool) -> None:
        super().__init__((family.list_tag, _ITEM, family.branch_tag), is_root=is_root)
        self._family = family
        self._items: Items | None = None  # inside the list
        self._item: list[str] | None = None  # text inside an item

    def _on_text(self, text: str) -> None:
        if self._item is not None:
            self._item.append(text)

    def _on_tag(self, tag: Tag) -> Event | None:
        if tag.id is not None:
            self._stray(tag)
        elif tag.name == self._family.list_tag:
            if tag.is_closing:
                return self._close_list(tag)
            self._drop_list()
            self._items = Items()
        elif tag.name == _ITEM:
            self._on_item_tag(tag)
        elif tag.is_closing and not self._is_root:
            self._drop_list()
            return End(at=tag.end)
        else:
            self._stray(tag)
        return None

    def _close_list(self, tag: Tag) -> Fork | None:
        items, self._items = self._items, None
        if items is None:
            self._stray(tag)
            return None
        if self._item is not None:
            self.malformed += 1
            self._add_item(items)
        self.malformed += items.faults
        if not items:
            self._stray(tag)
            return None
        return self._family.fork(tag.end, items, is_root=self._is_root)

    def _on_item_tag(self, tag: Tag) -> None:
        if self._items is None or (tag.is_closing and self._item is None):
            self._stray(tag)
            return
        if self._item is not None:
            self.malformed += not tag.is_closing  # the one before was never closed
            self._add_item(self._items)
        if not tag.is_closing:
            self._item = []

    def _add_item(self, items: Items) -> None:
        text = "".join(self._item or [])
        self._item = None
        match = _ID.match(text)
        items.add(match[1] if match else None, text[match.end() :].strip() if match else text.strip())

    def _drop_list(self) -> None:
        """A list that was never closed."""
        self.malformed += self._items is not None
        self._items = self._item = None

    def _on_close(self) -> None:
        self._drop_list()


def multiverse(options: Options) -> Outline:
    no_options("multiverse", options)
    return Outline(name="multiverse", list_tag="Goal", branch_tag="Path", join_text="\n<Conclusion>\n")


def threadweaver(options: Options) -> Outline:
    no_options("threadweaver", options)
    return Outline(name="threadweaver", list_tag="Outlines", branch_tag="Thread", join_text="\n")

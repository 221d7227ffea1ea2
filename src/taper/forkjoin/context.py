"""The tokens of a branch, and where in them its text was cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Context:
    """All tokens of a branch in order: inherited, header, generated, given at joins.

    chars: characters it has *generated*, over its life; offsets of forks count in them.
    """

    ids: list[int] = field(default_factory=list)
    chars: int = 0
    inherited: int = 0  # tokens before its header
    run_begins: int = 0  # tokens before what the current run has generated
    run_chars: int = 0  # `chars` when the current run began
    fork_point: int = 0  # tokens that children of the current fork inherit

    def open(self, inherited: Sequence[int], header: Sequence[int]) -> None:
        self.ids = [*inherited, *header]
        self.inherited = len(inherited)
        self.begin_run()

    def begin_run(self) -> None:
        self.run_begins, self.run_chars = len(self.ids), self.chars

    def grow(self, ids: Sequence[int], text: str) -> None:
        """Generated."""
        self.ids += ids
        self.chars += len(text)

    def give(self, ids: Sequence[int]) -> None:
        """Put there by the server; its characters do not count."""
        self.ids += ids

    def cut(self, tokens: int) -> None:
        """Drop what a run generated behind its fork."""
        del self.ids[tokens:]

    def fork_at(self, tokens: int) -> None:
        self.fork_point = tokens

    def forked_ids(self) -> list[int]:
        return self.ids[: self.fork_point]

    def own_ids(self) -> list[int]:
        """What it brings to a join: header and all after it."""
        return self.ids[self.inherited :]


def tokens_before(context: Context, at: int, decode: Callable[[Sequence[int]], str]) -> int:
    """Tokens of `context` up to the one that completes character `at` of its generated text.

    Only a fork inside a run has to look: a run that stopped at its trigger ends with it.
    """
    if at >= context.chars:
        return len(context.ids)
    # Some tokenizers drop the space before a first token, so decode behind a few others.
    lead = context.ids[max(context.run_begins - 4, 0) : context.run_begins]
    base = len(decode(lead))
    low, high = context.run_begins, len(context.ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode([*lead, *context.ids[context.run_begins : middle]])) - base >= at - context.run_chars:
            high = middle
        else:
            low = middle + 1
    return low


def missing_end(text: str, closing: str) -> str:
    """What `text` lacks to end in `closing`."""
    for said in range(min(len(closing), len(text)), 0, -1):
        if text.endswith(closing[:said]):
            return closing[said:]
    return closing

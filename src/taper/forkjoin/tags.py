"""Find tags in text that arrives in pieces, cut anywhere.

A tag is `<Name>`, `</Name>`, `<Name_3>` or `<Name_3.1>`, at most 48 characters. Everything else is text, also what
looks like the beginning of a tag and turns out not to be one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

MAX_TAG_CHARS = 48
_TAG = re.compile(r"<(/?)([A-Za-z]{1,32})(?:_(\d[\d.]*))?>")
_BEGINNING = re.compile(r"<(?:/?(?:[A-Za-z]{1,32}(?:_(?:\d[\d.]*)?)?)?)?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A known tag: `<name_id>` or `</name_id>`, and where it ends in the text (characters)."""

    name: str
    id: str | None
    is_closing: bool
    end: int
    text: str


class TagScanner:
    """Text in pieces -> text runs and tags in order. Unknown tags are text."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""  # may be the beginning of a tag
        self._at = 0  # offset of the end of what was handed out

    def feed(self, piece: str) -> Iterator[str | Tag]:
        text, self._held = self._held + piece, ""
        done = 0
        for match in _TAG.finditer(text):
            if match[2] not in self._names or len(match[0]) > MAX_TAG_CHARS:
                continue
            if match.start() > done:
                yield self._text(text[done : match.start()])
            done = match.end()
            self._at += len(match[0])
            yield Tag(name=match[2], id=match[3], is_closing=bool(match[1]), end=self._at, text=match[0])
        beginning = _BEGINNING.search(text, max(done, len(text) - MAX_TAG_CHARS))
        rest = beginning.start() if beginning else len(text)
        self._held = text[rest:]
        if rest > done:
            yield self._text(text[done:rest])

    def close(self) -> Iterator[str]:
        """No more text: what was held back is text after all."""
        held, self._held = self._held, ""
        if held:
            yield self._text(held)

    def _text(self, text: str) -> str:
        self._at += len(text)
        return text

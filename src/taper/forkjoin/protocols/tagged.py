"""Base of the parsers whose grammar is tags in the text."""

from __future__ import annotations

from collections.abc import Collection

from taper.forkjoin.plan import Event
from taper.forkjoin.tags import Tag, TagScanner


class TaggedParser:
    """Feeds a `TagScanner`; a subclass says what tags and the text between them mean."""

    def __init__(self, names: Collection[str], *, is_root: bool) -> None:
        self.malformed = 0
        self._is_root = is_root
        self._scanner = TagScanner(names)

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for part in self._scanner.feed(text):
            if isinstance(part, str):
                self._on_text(part)
                continue
            event = self._on_tag(part)
            if event is not None:
                events.append(event)
        return events

    def close(self) -> list[Event]:
        for text in self._scanner.close():
            self._on_text(text)
        self._on_close()
        return []

    def _on_text(self, text: str) -> None: ...

    def _on_tag(self, tag: Tag) -> Event | None:
        raise NotImplementedError

    def _on_close(self) -> None: ...

    def _stray(self, tag: Tag) -> None:
        """A tag that does not fit here: it is text, and counted."""
        self.malformed += 1
        self._on_text(tag.text)

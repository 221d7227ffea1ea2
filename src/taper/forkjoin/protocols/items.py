"""Items of a fork as the model lists them, each with an id that it may have forgotten or given twice."""

from __future__ import annotations

from collections.abc import Iterator


class Items:
    """Rules: a missing id is filled by position; a duplicate is left out. Both are counted.

    A filled id that is already taken leaves its item out too.
    """

    def __init__(self, prefix: str = "") -> None:
        self.faults = 0
        self._prefix = prefix
        self._texts: dict[str, str] = {}
        self._seen = 0

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._texts.items())

    def add(self, item_id: str | None, text: str) -> None:
        self._seen += 1
        if item_id is None:
            self.faults += 1
            item_id = f"{self._prefix}{self._seen}"
            if item_id in self._texts:
                return
        elif item_id in self._texts:
            self.faults += 1
            return
        self._texts[item_id] = text

"""Waiting for what a real server will show some time: its machine may be slow, and its figures a moment old."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 180.0
ValueT = TypeVar("ValueT")


def eventually(reading: Callable[[], ValueT], holds: Callable[[ValueT], bool]) -> ValueT:
    """The first reading that holds. Fails with the last one."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds(found := reading()):
        assert time.monotonic() < deadline, f"still {found!r}"
        time.sleep(0.2)
    return found

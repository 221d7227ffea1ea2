"""Asking the engines how they are, at a bounded price, whoever and however many want to know.

One question is in flight at a time and its answer is shared. What an answer cost the engine sets how soon the
next question may be put, so that even a full house of open pages takes at most a hundredth of its time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from taper.engines.vllm.tally import TIMELINE_S

ENGINE_SHARE = 0.01  # of the engine's time that answers may take
PERIOD_S = 0.3
PATIENCE_S = 2.0  # an engine in a long step, or gone: what was known before is shown, with its age

logger = logging.getLogger(__name__)

Ask = Callable[..., Awaitable[list[Any]]]


class EnginesAway(RuntimeError):
    """No engine has ever answered."""


class Poll:
    """The latest answers of all engines to one question, one entry per replica."""

    def __init__(self, ask: Callable[[], Awaitable[list[Any]]], *, period_s: float = PERIOD_S) -> None:
        self._ask = ask
        self._period_s = period_s
        self._next_s = 0.0
        self._answered_s = 0.0
        self._answers: list[Any] | None = None
        self._flight: asyncio.Task[None] | None = None
        self._failing = False

    async def latest(self) -> tuple[list[Any], float]:
        """(answers, their age in seconds). Raises `EnginesAway` while there are none."""
        now_s = time.monotonic()
        if self._flight is None and now_s >= self._next_s:
            self._flight = asyncio.create_task(self._fly())
        if self._flight is not None:
            await asyncio.wait([self._flight], timeout=PATIENCE_S)
        if self._answers is None:
            raise EnginesAway("the engines have not answered yet")
        return self._answers, time.monotonic() - self._answered_s

    async def _fly(self) -> None:
        try:
            answers = await self._ask()
        except Exception as error:  # a dead engine, in whatever way vLLM says so: readers see the answer's age
            answers = None
            if not self._failing:
                logger.warning("the engines did not answer, later failures are not logged: %s", error)
        self._failing = answers is None
        now_s = time.monotonic()
        self._next_s = now_s + self._period_s
        if answers is not None:
            self._answers, self._answered_s = answers, now_s
            costs = [one.get("cost_s", 0.0) for one in answers if isinstance(one, dict)]
            self._next_s = now_s + max(self._period_s, max(costs, default=0.0) / ENGINE_SHARE)
        self._flight = None


class Shared:
    """One question in flight: who asks meanwhile gets the same answer, or the same error."""

    def __init__(self, ask: Callable[[], Awaitable[list[Any]]]) -> None:
        self._ask = ask
        self._flight: asyncio.Future[list[Any]] | None = None

    async def latest(self) -> list[Any]:
        if self._flight is None or self._flight.done():
            self._flight = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._flight)


class LiveFeed:
    """`taper_live` of every engine, with the timeline of each kept here: the engine only sends what is new."""

    def __init__(self, ask: Ask, *, period_s: float = PERIOD_S) -> None:
        self._ask = ask
        self._timelines: list[deque[list[float | None]]] = []
        self._poll = Poll(self._refresh, period_s=period_s)

    async def latest(self, since: int) -> tuple[list[dict[str, Any]], float]:
        """(one state per engine with its timeline from second `since` on, age in seconds)."""
        answers, age_s = await self._poll.latest()
        views = []
        for answer, timeline in zip(answers, self._timelines, strict=True):
            views.append({**answer, "timeline": [row for row in timeline if (row[0] or 0) >= since]})
        return views, age_s

    async def _refresh(self) -> list[Any]:
        # Engines of one server share a machine's clock only by chance: the furthest behind decides.
        since = min((int(line[-1][0] or 0) if line else 0 for line in self._timelines), default=0)
        answers = await self._ask("taper_live", since)
        if len(self._timelines) != len(answers):
            self._timelines = [deque(maxlen=TIMELINE_S) for _ in answers]
        for answer, timeline in zip(answers, self._timelines, strict=True):
            rows = answer.get("timeline", [])
            while rows and timeline and timeline[-1][0] >= rows[0][0]:
                timeline.pop()
            timeline.extend(rows)
        return answers

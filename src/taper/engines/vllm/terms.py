"""What claims are measured against in an API process: the limits, and the SLO that the engines have now."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from taper.config import ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.watch import EnginesAway, Poll

PERIOD_S = 1.0  # a change of the SLO that did not come through this process is known here so much later


class Terms:
    """Until `follow`, and while no engine answers, the SLO is the one last known; at first the configured one."""

    def __init__(self, config: ServerConfig) -> None:
        self.limits = config.limits
        self._slo = config.slo
        self._heard_s = float("-inf")
        self._poll: Poll | None = None

    def follow(self, ask: Callable[[], Awaitable[list[Any]]]) -> None:
        """`ask` for the snapshots of all engines, at most once a second and only when a claim has to be judged."""
        self._poll = Poll(ask, period_s=PERIOD_S)

    def heard(self, answers: list[Any], *, age_s: float = 0.0) -> None:
        """Snapshots, the newest of which counts; the engines of one server share their SLO."""
        at_s = time.monotonic() - age_s
        if at_s < self._heard_s:
            return
        for answer in answers:
            if isinstance(answer, dict) and "tpot_slo_s" in answer:
                self._slo = Slo(tpot_s=answer["tpot_slo_s"], ttft_s=answer["ttft_slo_s"])
                self._heard_s = at_s
                return

    async def slo(self) -> Slo:
        if self._poll is not None:
            with suppress(EnginesAway):
                answers, age_s = await self._poll.latest()
                self.heard(answers, age_s=age_s)
        return self._slo

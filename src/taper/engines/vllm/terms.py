"""What claims are measured against in an API process: the limits, and the SLO that the engines have now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from taper.config import ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.watch import EnginesAway, Poll

PERIOD_S = 1.0  # a change of the SLO through another API process is known here so much later


class Terms:
    """Until `follow`, and while no engine answers, the SLO is the one last known; at first the configured one."""

    def __init__(self, config: ServerConfig) -> None:
        self.limits = config.limits
        self._slo = config.slo
        self._poll: Poll | None = None

    def follow(self, ask: Callable[[], Awaitable[list[Any]]]) -> None:
        """`ask` for the snapshots of all engines, at most once a second and only when a claim has to be judged."""
        self._poll = Poll(ask, period_s=PERIOD_S)

    def heard(self, answers: list[Any]) -> None:
        """Snapshots that came in on another occasion; the engines of one server share their SLO."""
        for answer in answers:
            if isinstance(answer, dict) and "tpot_slo_s" in answer:
                self._slo = Slo(tpot_s=answer["tpot_slo_s"], ttft_s=answer["ttft_slo_s"])
                return

    async def slo(self) -> Slo:
        if self._poll is not None:
            with suppress(EnginesAway):
                self.heard((await self._poll.latest())[0])
        return self._slo

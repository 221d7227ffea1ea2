"""Open-loop arrival times: a renewal process with gamma gaps (Poisson where their variation is 1), steady or bursty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from taper.core.types import ConfigError, check_range

_STREAM = 1  # keeps gaps independent of the request drawn from the same (seed, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests are spread in time; the mean rate is the caller's.

    `cv` is the coefficient of variation of the gaps: 1 is Poisson, 0 a metronome, above 1 clusters. With
    `burst_period_s` all requests of a period come in its first `burst_share`, at the same mean rate.
    """

    cv: float = 1.0
    burst_period_s: float = 0.0  # 0: steady
    burst_share: float = 1.0

    def __post_init__(self) -> None:
        check_range("cv", self.cv, low=0, high=100, unit="")
        check_range("burst_period_s", self.burst_period_s, low=0, high=1e6, unit="s")
        check_range("burst_share", self.burst_share, low=1e-6, high=1, unit="of the period")

    def times(self, *, seed: int, rate_rps: float, horizon_s: float) -> Iterator[float]:
        """Seconds from the start of the run, ascending, all below `horizon_s`.

        Gap i depends on (seed, i) alone, so a longer horizon only adds arrivals. Raises ConfigError for a rate
        out of range.
        """
        if not 0 < rate_rps < 1e6:
            raise ConfigError(f"rate_rps must be above 0 and below 1e6 requests/s, not {rate_rps!r}")
        at_s, index = 0.0, 0
        while True:
            at_s += self._gap(seed, index) / rate_rps
            due_s = self._squeezed(at_s)
            if due_s >= horizon_s:
                return
            yield due_s
            index += 1

    def _gap(self, seed: int, index: int) -> float:
        """In mean gaps."""
        if self.cv == 0:
            return 1.0
        shape = 1.0 / self.cv**2
        return float(np.random.default_rng((seed, index, _STREAM)).gamma(shape)) / shape

    def _squeezed(self, at_s: float) -> float:
        if not self.burst_period_s:
            return at_s
        period, inside_s = divmod(at_s, self.burst_period_s)
        return period * self.burst_period_s + inside_s * self.burst_share

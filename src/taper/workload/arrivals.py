"""Open-loop arrival times: a renewal process with gamma gaps, Poisson where the variation is 1."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from taper.core.types import ConfigError

_STREAM = 1  # keeps gaps independent of the request drawn from the same (seed, index)


def arrival_times(*, seed: int, rate_rps: float, cv: float = 1.0, horizon_s: float) -> Iterator[float]:
    """Seconds from the start of the window, ascending, all below `horizon_s`.

    `cv` is the coefficient of variation of the gaps: 1 is Poisson, 0 a metronome, above 1 bursts. Gap i
    depends on (seed, i) alone, so a longer horizon only adds arrivals. Raises ConfigError for a rate or cv
    out of range.
    """
    if not 0 < rate_rps < 1e6:
        raise ConfigError(f"rate_rps must be above 0 and below 1e6 requests/s, not {rate_rps!r}")
    if not 0 <= cv <= 100:
        raise ConfigError(f"arrival_cv must be between 0 and 100, not {cv!r}")
    at_s, index = 0.0, 0
    while True:
        at_s += _gap_s(seed, index, rate_rps, cv)
        if at_s >= horizon_s:
            return
        yield at_s
        index += 1


def _gap_s(seed: int, index: int, rate_rps: float, cv: float) -> float:
    if cv == 0:
        return 1.0 / rate_rps
    shape = 1.0 / cv**2
    draw = np.random.default_rng((seed, index, _STREAM)).gamma(shape)
    return float(draw) / (shape * rate_rps)

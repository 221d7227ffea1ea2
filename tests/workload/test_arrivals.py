"""Arrivals are seeded, ordered, and have the rate and variation they were asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from taper.core.types import ConfigError
from taper.workload import Arrivals


def times(
    arrivals: Arrivals | None = None, *, seed: int = 1, rate_rps: float = 5.0, horizon_s: float = 400.0
) -> list[float]:
    return list((arrivals or Arrivals()).times(seed=seed, rate_rps=rate_rps, horizon_s=horizon_s))


def test_the_same_seed_gives_the_same_times() -> None:
    assert times() == times()
    assert times() != times(seed=2)


def test_a_longer_horizon_only_adds_arrivals() -> None:
    short = times(horizon_s=20.0)
    assert times()[: len(short)] == short
    assert short[-1] < 20.0


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_rate_and_variation(cv: float) -> None:
    gaps = np.diff([0.0, *times(Arrivals(cv=cv), horizon_s=1000.0)])
    assert gaps.min() >= 0
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.12)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.12)


def test_a_metronome() -> None:
    assert list(itertools.islice(times(Arrivals(cv=0.0)), 3)) == pytest.approx([0.2, 0.4, 0.6])


def test_bursts_keep_the_rate_and_come_in_the_first_part_of_each_period() -> None:
    # a metronome of 2 per second squeezed into the first fifth of every 10 s
    squeezed = times(Arrivals(cv=0.0, burst_period_s=10.0, burst_share=0.2), rate_rps=2.0, horizon_s=100.0)
    assert squeezed[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert squeezed[19:21] == pytest.approx([10.0, 10.1])
    assert len(squeezed) == 199
    assert max(at % 10.0 for at in squeezed) == pytest.approx(1.9)


@pytest.mark.parametrize("rate_rps", [0.0, float("nan"), 1e7])
def test_a_rate_out_of_range_is_refused(rate_rps: float) -> None:
    with pytest.raises(ConfigError, match="rate_rps"):
        times(rate_rps=rate_rps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"cv": -1.0}, "cv"), ({"burst_period_s": -1.0}, "burst_period_s"), ({"burst_share": 0.0}, "burst_share")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Arrivals(**settings)

"""Arrivals are seeded, ordered, and have the rate and variation they were asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from taper.core.types import ConfigError
from taper.workload.arrivals import arrival_times


def times(**settings: float) -> list[float]:
    return list(arrival_times(**{"seed": 1, "rate_rps": 5.0, "horizon_s": 400.0, **settings}))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_times() -> None:
    assert times() == times()
    assert times() != times(seed=2)


def test_a_longer_horizon_only_adds_arrivals() -> None:
    short = times(horizon_s=20.0)
    assert times()[: len(short)] == short
    assert short[-1] < 20.0


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_rate_and_variation(cv: float) -> None:
    gaps = np.diff([0.0, *times(cv=cv, horizon_s=1000.0)])
    assert gaps.min() >= 0
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.12)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.12)


def test_a_metronome() -> None:
    assert list(itertools.islice(times(cv=0.0), 3)) == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize(("name", "value"), [("rate_rps", 0.0), ("rate_rps", float("nan")), ("cv", -1.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        times(**{name: value})

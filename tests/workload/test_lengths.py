"""Distributions: their draws, means, scaling, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from taper.core.types import ConfigError
from taper.workload.lengths import Draw, Lengths, Quantiles, Weighted, parse_draw

UNIFORM = Lengths(low=10, high=20)
LOGNORMAL = Lengths(low=40, high=500, shape="lognormal")
HISTOGRAM = Weighted(values=(1, 4), weights=(3.0, 1.0))
PERCENTILES = Quantiles(points=((0.0, 10.0), (0.5, 100.0), (1.0, 1000.0)))


def drawn(one: Draw, count: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([one.draw(rng) for _ in range(count)])


@pytest.mark.parametrize("one", [UNIFORM, LOGNORMAL, HISTOGRAM, PERCENTILES])
def test_the_mean_is_the_mean_of_the_draws(one: Draw) -> None:
    assert drawn(one).mean() == pytest.approx(one.mean, rel=0.03)
    assert drawn(one, 5).tolist() == drawn(one, 5).tolist()


def test_means_by_hand() -> None:
    assert UNIFORM.mean == 15
    assert HISTOGRAM.mean == 1.75
    assert PERCENTILES.mean == pytest.approx(0.5 * (90 + 900) / np.log(10))


def test_what_a_distribution_was_given_comes_back() -> None:
    assert (drawn(UNIFORM).min(), drawn(UNIFORM).max()) == (10, 20)
    assert np.percentile(drawn(LOGNORMAL), [5, 95]) == pytest.approx([40, 500], rel=0.06)
    assert np.mean(drawn(HISTOGRAM) == 4) == pytest.approx(0.25, abs=0.01)
    assert np.percentile(drawn(PERCENTILES), [50, 75]) == pytest.approx([100, 316], rel=0.05)
    assert PERCENTILES.at(0.25) == pytest.approx(10**1.5)


def test_scaling_keeps_the_shape_and_one_token() -> None:
    assert UNIFORM.scaled(0.5) == Lengths(low=5, high=10)
    assert UNIFORM.scaled(0.001) == Lengths(low=1, high=1)
    assert HISTOGRAM.scaled(2).values == (2, 8)
    assert PERCENTILES.scaled(0.05).points == ((0.0, 1.0), (0.5, 5.0), (1.0, 50.0))


def test_how_they_are_written() -> None:
    assert parse_draw(3, "x") == Lengths(low=3, high=3)
    assert parse_draw({"low": 1, "high": 2, "shape": "lognormal"}, "x") == Lengths(low=1, high=2, shape="lognormal")
    assert parse_draw({"values": [1, 4], "weights": [3.0, 1.0]}, "x") == HISTOGRAM
    assert parse_draw({"points": [[0.0, 10.0], [0.5, 100.0], [1.0, 1000.0]]}, "x") == PERCENTILES
    assert [str(one) for one in (UNIFORM, parse_draw(3, "x"), HISTOGRAM, PERCENTILES)] == [
        "10-20",
        "3",
        "1-4",
        "10-1000",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"low": 0, "high": 5}, "1 <= low <= high"),
        ({"low": 6, "high": 5}, "1 <= low <= high"),
        ({"low": 1, "high": 10**30}, "1 <= low <= high"),
        ({"low": 1.5, "high": 3}, "1 <= low <= high"),
        ({"values": [1], "weights": [float("nan")]}, "weights must lie"),
        ({"low": 1, "high": 2, "shape": "flat"}, "uniform or lognormal"),
        ({"low": 1}, "high"),
        ({"values": [], "weights": []}, "at least one"),
        ({"values": [1, 2], "weights": [1.0]}, "as many weights"),
        ({"values": [0], "weights": [1.0]}, "at least 1"),
        ({"points": [[0.1, 5.0], [1.0, 9.0]]}, "from share 0 to share 1"),
        ({"points": [[0.0, 5.0], [1.0, 4.0]]}, "must not fall"),
        ("many", "a number or a table"),
    ],
)
def test_what_is_no_distribution_is_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mix: serial.*{message}"):
        parse_draw(value, "mix: serial")

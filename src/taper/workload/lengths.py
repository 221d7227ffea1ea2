"""Distributions of small counts: tokens of a stage, branches of a fork. Each draws from a generator it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import numpy as np

from taper.core.types import ConfigError

MOST = 10**9
_TO_95TH = 1.645  # standard deviations from a normal's median to its 95th percentile


class Draw(Protocol):
    """A distribution over the integers from 1 up."""

    def draw(self, rng: np.random.Generator) -> int: ...
    def scaled(self, factor: float) -> Self:
        """The same shape with every value times `factor`, at least 1."""
        ...

    @property
    def mean(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Uniform on [low, high], or lognormal with that range as its 5th and 95th percentile."""

    low: int
    high: int
    shape: Literal["uniform", "lognormal"] = "uniform"

    def __post_init__(self) -> None:
        if not (_is_count(self.low) and _is_count(self.high) and self.low <= self.high):
            raise ConfigError(
                f"lengths must be whole numbers, 1 <= low <= high <= {MOST:g}, not {self.low!r}..{self.high!r}"
            )
        if self.shape not in ("uniform", "lognormal"):
            raise ConfigError(f"lengths: shape must be uniform or lognormal, not {self.shape!r}")

    def __str__(self) -> str:
        return _range(self.low, self.high)

    def scaled(self, factor: float) -> Lengths:
        low = max(1, round(self.low * factor))
        return replace(self, low=low, high=max(low, round(self.high * factor)))

    def draw(self, rng: np.random.Generator) -> int:
        if self.shape == "uniform":
            return int(rng.integers(self.low, self.high + 1))
        return max(1, int(np.exp(rng.normal(*self._log_normal))))

    @property
    def mean(self) -> float:
        if self.shape == "uniform":
            return (self.low + self.high) / 2
        mu, sigma = self._log_normal
        return float(np.exp(mu + sigma**2 / 2))

    @property
    def _log_normal(self) -> tuple[float, float]:
        low, high = np.log(self.low), np.log(self.high)
        return float((low + high) / 2), float((high - low) / (2 * _TO_95TH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A histogram: each value with its weight."""

    values: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.weights):
            raise ConfigError("a histogram needs as many weights as values, and at least one")
        if not all(map(_is_count, self.values)):
            raise ConfigError(
                f"a histogram's values must be whole numbers, at least 1 and at most {MOST:g}, not {self.values!r}"
            )
        if not (all(0 <= weight <= MOST for weight in self.weights) and sum(self.weights) > 0):
            raise ConfigError(f"a histogram's weights must lie between 0 and {MOST:g}, not all 0: {self.weights!r}")

    def __str__(self) -> str:
        return _range(min(self.values), max(self.values))

    def scaled(self, factor: float) -> Weighted:
        return replace(self, values=tuple(max(1, round(value * factor)) for value in self.values))

    def draw(self, rng: np.random.Generator) -> int:
        edges = np.cumsum(self.weights)
        at = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
        return self.values[min(at, len(self.values) - 1)]

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Known percentiles as points (share, value), from share 0 to share 1; between two points log-linear."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        values = [value for _, value in self.points]
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or shares != sorted(set(shares)):
            raise ConfigError(f"quantile points must rise from share 0 to share 1, not {shares}")
        if not all(1 <= value <= MOST for value in values) or values != sorted(values):
            raise ConfigError(f"quantile values must lie between 1 and {MOST:g} and must not fall, not {values}")

    def __str__(self) -> str:
        return _range(round(self.points[0][1]), round(self.points[-1][1]))

    def scaled(self, factor: float) -> Quantiles:
        return replace(self, points=tuple((share, max(1.0, value * factor)) for share, value in self.points))

    def at(self, share: float) -> float:
        """The value that `share` of the draws stay below."""
        shares, values = zip(*self.points, strict=True)
        return float(np.exp(np.interp(share, shares, np.log(values))))

    def draw(self, rng: np.random.Generator) -> int:
        return max(1, round(self.at(float(rng.random()))))

    @property
    def mean(self) -> float:
        total = 0.0
        for (share, low), (next_share, high) in zip(self.points, self.points[1:], strict=False):
            # the mean of a log-uniform variable on [low, high]
            middle = low if high == low else (high - low) / np.log(high / low)
            total += (next_share - share) * middle
        return float(total)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def parse_draw(value: object, where: str) -> Draw:
    """`{low, high[, shape]}`, `{values, weights}`, `{points}` or a whole number. Raises ConfigError naming `where`."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"low": value, "high": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a number or a table, not {value!r}")
    table: dict[str, Any] = {
        key: tuple(tuple(one) if isinstance(one, list) else one for one in entry) if isinstance(entry, list) else entry
        for key, entry in value.items()
    }
    kind = Quantiles if "points" in table else Weighted if "values" in table else Lengths
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise ConfigError(f"{where}: {error}") from error

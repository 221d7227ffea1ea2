"""Step load -> predicted seconds.

    T = s * (a + b * pad(rows) + e * max(pad(rows) - k, 0) + c * context_tokens + q * d * prefill_tokens)

a, b, c are the published linear law (arXiv 2605.06914); d prices the prompt tokens mixed into a step;
pad() is the CUDA-graph staircase (a decode batch is padded up to the next captured size); k and e are the knee
of the roofline: up to k rows the arithmetic hides behind the reading of the weights, beyond it each row costs e
more (on one H200 with a 32B model at about 128 rows; results/gpu). s and q are the online corrections of the
whole and of the prefill term.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, overload

import numpy as np

from taper.core.types import ConfigError, Floats, Ints, StepLoad

MOST_S = 1e9  # any coefficient
MOST_ROWS = 1 << 20  # of a captured batch: the staircase is a table


class LatencyModel(Protocol):
    """Anything that prices a step. Must be non-decreasing in each argument: admission relies on it."""

    @overload
    def predict(self, rows: int, context_tokens: int, prefill_tokens: int) -> float: ...
    @overload
    def predict(self, rows: Ints, context_tokens: Ints, prefill_tokens: Ints) -> Floats: ...

    def prefill_tokens_within(self, seconds: float) -> float:
        """Prompt tokens that fit into `seconds` on top of a decode step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLatency:
    """The law above. Coefficients in seconds per unit, all >= 0, base > 0; linear without a knee (steep_s = 0)."""

    base_s: float
    row_s: float
    context_s: float
    prefill_s: float
    knee_rows: float = 0.0
    steep_s: float = 0.0  # of a row beyond the knee, on top of row_s
    capture_sizes: tuple[int, ...] = ()  # ascending; empty without CUDA graphs
    scale: float = 1.0
    prefill_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("base_s", "row_s", "context_s", "prefill_s", "knee_rows", "steep_s", "scale", "prefill_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_S:
                raise ConfigError(f"latency model: {name} must be a number from 0 to {MOST_S:g}, not {value!r}")
        if self.base_s == 0:
            raise ConfigError("latency model: base_s must be > 0")
        sizes = list(self.capture_sizes)
        if not all(type(size) is int and 1 <= size <= MOST_ROWS for size in sizes) or sizes != sorted(set(sizes)):
            raise ConfigError(f"latency model: capture_sizes must be strictly ascending, from 1 to {MOST_ROWS}")

    @overload
    def predict(self, rows: int, context_tokens: int, prefill_tokens: int) -> float: ...
    @overload
    def predict(self, rows: Ints, context_tokens: Ints, prefill_tokens: Ints) -> Floats: ...

    def predict(self, rows: Any, context_tokens: Any, prefill_tokens: Any) -> Any:
        """Seconds for one step or, given equally long columns, for each of several."""
        padded = self.padded(rows) if self.capture_sizes else rows
        prefill_s = self.prefill_scale * self.prefill_s * prefill_tokens
        return self.scale * (self.base_s + self.rows_s(padded) + self.context_s * context_tokens + prefill_s)

    def rows_s(self, rows: Any) -> Any:
        """Seconds that so many rows add to a step, uncorrected; `rows` as computed, that is padded."""
        if not self.steep_s:
            return self.row_s * rows
        return self.row_s * rows + self.steep_s * (rows - self.knee_rows) * (rows > self.knee_rows)

    def rows_within(self, seconds: float, context_tokens: float) -> float:
        """Rows of `context_tokens` each that take so many seconds on top of the base, uncorrected.

        Raises ConfigError where rows cost nothing.
        """
        row_s = self.row_s + self.context_s * context_tokens
        if row_s + self.steep_s <= 0:
            raise ConfigError("the latency law prices rows at zero: no load makes branches compete")
        if not self.steep_s or seconds <= row_s * self.knee_rows:
            return seconds / row_s
        return self.knee_rows + (seconds - row_s * self.knee_rows) / (row_s + self.steep_s)

    def predict_load(self, load: StepLoad) -> float:
        return self.predict(load.rows, load.context_tokens, load.prefill_tokens)

    def padded(self, rows: int | Ints) -> int | Ints:
        """Rows the device computes: the next captured size, or `rows` beyond the largest."""
        if isinstance(rows, np.ndarray):
            return np.maximum(_staircase(self.capture_sizes).take(rows, mode="clip"), rows)
        at = bisect_left(self.capture_sizes, rows)
        return self.capture_sizes[at] if at < len(self.capture_sizes) else rows

    def prefill_tokens_within(self, seconds: float) -> float:
        per_token_s = self.scale * self.prefill_scale * self.prefill_s
        return seconds / per_token_s if per_token_s > 0 else np.inf

    def corrected(self, *, scale: float, prefill_scale: float) -> LinearLatency:
        return replace(self, scale=scale, prefill_scale=prefill_scale)


@lru_cache(maxsize=4)
def _staircase(capture_sizes: tuple[int, ...]) -> Ints:
    """Rows -> captured size, from 0 rows up to the largest size."""
    sizes = np.array(capture_sizes, dtype=np.int64)
    staircase: Ints = sizes.repeat(np.diff(sizes, prepend=-1))
    return staircase

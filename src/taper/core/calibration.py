"""Measured steps -> coefficients of the linear latency law, with an honest account of the error.

The fit minimises *relative* error (a 2 ms miss matters on a 10 ms step, not on a 200 ms one), keeps every
coefficient non-negative, and is robust twice over: samples far above the median of their own grid cell are
the machine's doing and are rejected before the law is even looked at (so the rule cannot flatter the law),
and what is left is weighted by Huber's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from taper.core.latency import LinearLatency
from taper.core.types import Bools, ConfigError, Floats, Ints, StepLoad

MIN_SAMPLES = 8
OUTLIER_MADS = 6.0  # a sample this many robust deviations from its cell's median is the machine's doing
OUTLIER_SHARE = 0.15  # ... and at least this share of the median away: quiet cells must not reject everything
MAD_TO_SIGMA = 1.4826  # of a normal distribution
HUBER_SIGMAS = 1.345
HUBER_ROUNDS = 20
FOLDS = 4  # parts that the cells are held out in, one after the other
CONTEXT_BUCKETS_PER_OCTAVE = 4  # cells of samples that do not name theirs
KNEE_GAIN = 0.25  # a knee must take away this share of the error of the cells' medians
KNEE_LEAST = 0.005  # ... and at least so much of it
KNEE_SIDE = 3  # row counts visited on either side of a knee, at least
MOVED_SHARE = 0.9  # a mixed step shorter than this share of what its rows take alone: its time was counted elsewhere
MOVED_RULE = 0.1  # of the mixed steps; where so many are, the others cannot be trusted either
SHORTEST_STEP_S, LONGEST_STEP_S = 1e-6, 3600.0  # of a live step: beyond it, one sample could make any fit fail
BASE, ROW, CONTEXT, PREFILL, STEEP = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Measured steps as columns of shape (N,).

    `cell` tells which samples were meant to repeat the same load (a grid point); -1 means "not from a
    grid", and such samples are put into cells by their load.
    """

    rows: Ints
    context_tokens: Ints
    prefill_tokens: Ints
    measured_s: Floats
    cell: Ints | None = None

    def __post_init__(self) -> None:
        columns = [self.rows, self.context_tokens, self.prefill_tokens, self.measured_s]
        if self.cell is not None:
            columns.append(self.cell)
        if len({len(column) for column in columns}) != 1:
            raise ConfigError("calibration samples: columns differ in length")
        if not (np.isfinite(self.measured_s).all() and (self.measured_s > 0).all()):
            raise ConfigError("calibration samples: every measured_s must be finite and > 0")

    def __len__(self) -> int:
        return len(self.measured_s)

    def take(self, mask: Bools) -> Samples:
        return Samples(
            rows=self.rows[mask],
            context_tokens=self.context_tokens[mask],
            prefill_tokens=self.prefill_tokens[mask],
            measured_s=self.measured_s[mask],
            cell=None if self.cell is None else self.cell[mask],
        )

    def cells(self) -> Ints:
        """Index of each sample's cell, 0..C-1, ordered by load so that the split below is reproducible."""
        octave = np.log2(np.maximum(self.context_tokens, 1)) * CONTEXT_BUCKETS_PER_OCTAVE
        keys = [self.rows, np.round(octave).astype(np.int64), self.prefill_tokens]
        if self.cell is not None:
            keys = [np.where(self.cell >= 0, -1, key) for key in keys]
            keys.append(self.cell)
        _, index = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
        return np.asarray(index, dtype=np.int64).reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted law and how well it does. Errors are shares: 0.05 = 5 %."""

    latency: LinearLatency  # fitted to every sample that was kept
    samples: int
    cells: int
    outliers: int  # rejected before fitting, by the rule of `outliers`
    moved: int  # mixed steps left out because the engine counts their time to the step before, see `timed_alone`
    mape: float  # in sample
    heldout_mape: float | None  # each quarter of the cells, judged by the law of the others; None: < 4 cells
    heldout_cell_mape: float | None  # the same, on each cell's median: the law without the machine's noise
    noise_floor: float  # error of the samples against their own cell's level: what no law can beat
    residual_p05: float  # quantiles of measured / predicted - 1, in sample
    residual_p50: float
    residual_p95: float


def fit(samples: Samples, *, capture_sizes: tuple[int, ...] = ()) -> Fit:
    """Fit T = a + b * pad(rows) + c * context + d * prefill, with a knee in the rows where the steps show one.

    A coefficient that the samples say nothing about is filled with a pessimistic stand-in: a prompt token
    costs what a row costs. Raises `ConfigError` when the samples cannot determine a, b and c at all.
    """
    _check_variation(samples)
    cells = samples.cells()
    quiet = ~outliers(samples.measured_s, cells)
    keep = quiet & timed_alone(samples, cells, quiet)
    kept, kept_cells = samples.take(keep), cells[keep]
    law = fit_law_with_knee(kept, kept_cells, capture_sizes)
    error = kept.measured_s / _predict(law, kept) - 1.0
    heldout_mape, heldout_cell_mape = _held_out_errors(kept, kept_cells, capture_sizes)
    p05, p50, p95 = np.quantile(error, [0.05, 0.5, 0.95])
    return Fit(
        latency=law,
        samples=len(samples),
        cells=len(np.unique(cells)),
        outliers=int(np.count_nonzero(~quiet)),
        moved=int(np.count_nonzero(quiet & ~keep)),
        mape=mape(law, kept),
        heldout_mape=heldout_mape,
        heldout_cell_mape=heldout_cell_mape,
        noise_floor=_noise_floor(kept.measured_s / _predict(law, kept), kept_cells),
        residual_p05=float(p05),
        residual_p50=float(p50),
        residual_p95=float(p95),
    )


def mape(law: LinearLatency, samples: Samples) -> float:
    """Mean of |predicted - measured| / measured."""
    return float(np.mean(np.abs(_predict(law, samples) / samples.measured_s - 1.0)))


def outliers(measured_s: Floats, cells: Ints) -> Bools:
    """Samples far from the median of their own cell; looks at no law, so it cannot favour one."""
    level = _spread(_cell_medians(measured_s, cells), cells)
    distance = np.abs(measured_s / level - 1.0)
    sigma = MAD_TO_SIGMA * _spread(_cell_medians(distance, cells), cells)
    return np.asarray(distance > np.maximum(OUTLIER_MADS * sigma, OUTLIER_SHARE))


def timed_alone(samples: Samples, cells: Ints, quiet: Bools) -> Bools:
    """All samples, or all but those of rows and prompts together where the engine does not time these by themselves.

    An asynchronous engine launches step N+1 before it reports N. Where the launch itself takes long, as that of a
    step with prompts outside of captured graphs, its time is counted to step N, and the mixed step looks shorter
    than its rows alone (seen on one H200: 3 ms where the rows take 20; results/gpu). Prompts are then priced by
    steps that carry nothing else. Where the decode steps do not determine a law, nothing can be told.
    """
    mixed = (samples.rows > 0) & (samples.prefill_tokens > 0)
    decode = quiet & (samples.prefill_tokens == 0)
    if not (mixed & quiet).any() or not _determined(samples.take(decode)):
        return np.ones(len(samples), dtype=np.bool_)
    rows_alone = fit_law(samples.take(decode), cells[decode])
    alone_s = rows_alone.predict(samples.rows, samples.context_tokens, np.zeros_like(samples.prefill_tokens))
    moved = mixed & quiet & (samples.measured_s < MOVED_SHARE * alone_s)
    believed = np.count_nonzero(moved) <= MOVED_RULE * np.count_nonzero(mixed & quiet)
    return ~mixed | believed


def fit_law_with_knee(samples: Samples, cells: Ints, capture_sizes: tuple[int, ...] = ()) -> LinearLatency:
    """The linear law, or the one with the best knee where that explains the medians of the decode cells clearly better.

    Those alone: the error of steps with prompts has other reasons, and may drown what a knee takes away.
    """
    linear = fit_law(samples, cells, capture_sizes)
    decode = samples.prefill_tokens == 0
    visited = np.unique(samples.rows[decode])
    knees = visited[KNEE_SIDE - 1 : len(visited) - KNEE_SIDE]
    if not len(knees):
        return linear
    error_of = _cell_error(samples.take(decode), cells[decode])
    best = min((fit_law(samples, cells, capture_sizes, float(knee)) for knee in knees), key=error_of)
    error, least = error_of(linear), error_of(best)
    return best if error - least > max(KNEE_GAIN * error, KNEE_LEAST) else linear


def fit_law(
    samples: Samples, cells: Ints, capture_sizes: tuple[int, ...] = (), knee_rows: float = np.inf
) -> LinearLatency:
    """Huber-weighted non-negative least squares on relative errors, each cell weighing the same; a knee where told."""
    padding = LinearLatency(base_s=1.0, row_s=1.0, context_s=0.0, prefill_s=0.0, capture_sizes=capture_sizes)
    rows = padding.padded(samples.rows) if capture_sizes else samples.rows
    beyond = np.maximum(rows - knee_rows, 0.0)
    columns = np.stack([np.ones(len(samples)), rows, samples.context_tokens, samples.prefill_tokens, beyond], axis=1)
    level = _spread(_cell_medians(samples.measured_s, cells), cells)
    count = np.bincount(cells)[cells]
    design, target = columns / level[:, None], samples.measured_s / level
    weight = np.ones(len(samples))
    coefficients = np.zeros(columns.shape[1])
    for _ in range(HUBER_ROUNDS):
        before = coefficients
        coefficients = _nonnegative_least_squares(design, target, weight / count)
        residual = np.abs(design @ coefficients - target)
        sigma = max(MAD_TO_SIGMA * float(np.median(residual)), 1e-6)
        weight = np.minimum(1.0, HUBER_SIGMAS * sigma / np.maximum(residual, 1e-12))
        if np.allclose(coefficients, before, rtol=1e-6, atol=0.0):
            break
    if not samples.prefill_tokens.any():
        coefficients[PREFILL] = coefficients[ROW]
    return LinearLatency(
        base_s=float(coefficients[BASE]),
        row_s=float(coefficients[ROW]),
        context_s=float(coefficients[CONTEXT]),
        prefill_s=float(coefficients[PREFILL]),
        knee_rows=float(knee_rows) if coefficients[STEEP] else 0.0,
        steep_s=float(coefficients[STEEP]),
        capture_sizes=capture_sizes,
    )


class Learner:
    """Learns the law from live traffic where there is no profile: hand it clean steps, ask for `law()`.

    Keeps the most recent steps of each load bucket, so an hour of one kind of traffic cannot push out the
    few steps that show how the cost grows.
    """

    def __init__(self, *, min_steps: int = 200, per_bucket: int = 32) -> None:
        self._min_steps = min_steps
        self._per_bucket = per_bucket
        self._buckets: dict[tuple[int, int, int], list[tuple[StepLoad, float]]] = {}
        self._seen = 0

    def add(self, load: StepLoad, measured_s: float) -> None:
        if load.rows + load.prefill_tokens == 0 or not SHORTEST_STEP_S <= measured_s <= LONGEST_STEP_S:
            return
        octaves = (load.rows, load.context_tokens // 256, load.prefill_tokens)
        bucket = self._buckets.setdefault(tuple(int(n).bit_length() for n in octaves), [])  # type: ignore[arg-type]
        bucket.append((load, measured_s))
        del bucket[: -self._per_bucket]
        self._seen += 1

    def law(self, *, capture_sizes: tuple[int, ...] = ()) -> LinearLatency | None:
        """The law, or None while there are too few steps or all of them carry the same load."""
        if self._seen < self._min_steps:
            return None
        kept = [entry for bucket in self._buckets.values() for entry in bucket]
        samples = Samples(
            rows=np.array([load.rows for load, _ in kept]),
            context_tokens=np.array([load.context_tokens for load, _ in kept]),
            prefill_tokens=np.array([load.prefill_tokens for load, _ in kept]),
            measured_s=np.array([seconds for _, seconds in kept]),
        )
        if not _determined(samples):
            return None
        # In the engine's own thread: without the errors that `fit` reports.
        cells = samples.cells()
        keep = ~outliers(samples.measured_s, cells)
        law = fit_law(samples.take(keep), cells[keep], capture_sizes)
        # Live traffic rarely separates rows from context; a free row would mean "admit everything".
        floor_s = law.base_s * 1e-3
        return replace(law, row_s=max(law.row_s, floor_s), prefill_s=max(law.prefill_s, floor_s))


def _cell_error(samples: Samples, cells: Ints) -> Callable[[LinearLatency], float]:
    """Of a law: the mean relative error of the cells' medians."""
    return lambda law: float(np.mean(np.abs(_cell_medians(_predict(law, samples) / samples.measured_s, cells) - 1.0)))


def _predict(law: LinearLatency, samples: Samples) -> Floats:
    return law.predict(samples.rows, samples.context_tokens, samples.prefill_tokens)


def _determined(samples: Samples) -> bool:
    """Whether the samples vary enough in rows and context to tell a, b and c apart."""
    return (
        len(samples) >= MIN_SAMPLES
        and len(np.unique(samples.rows)) >= 3
        and len(np.unique(samples.context_tokens)) >= 3
        and float(np.max(samples.rows)) >= 2.0 * max(float(np.min(samples.rows)), 1.0)
    )


def _check_variation(samples: Samples) -> None:
    if not _determined(samples):
        raise ConfigError(
            f"calibration needs at least {MIN_SAMPLES} clean steps with three different row counts (the largest "
            f"twice the smallest) and three context lengths; got {len(samples)} steps with "
            f"{len(np.unique(samples.rows))} row counts"
        )


def _held_out_errors(
    samples: Samples, cells: Ints, capture_sizes: tuple[int, ...]
) -> tuple[float | None, float | None]:
    """Errors of samples, and of cell medians, under laws fitted without their cell. Whole cells are held out."""
    fold = np.unique(cells, return_inverse=True)[1] % FOLDS
    ratio = np.full(len(samples), np.nan)  # predicted / measured
    for held in (fold == part for part in range(FOLDS)):
        if held.any() and _determined(samples.take(~held)):
            law = fit_law_with_knee(samples.take(~held), cells[~held], capture_sizes)
            ratio[held] = _predict(law, samples.take(held)) / samples.measured_s[held]
    if np.isnan(ratio).any():
        return None, None
    return float(np.mean(np.abs(ratio - 1.0))), float(np.mean(np.abs(_cell_medians(ratio, cells) - 1.0)))


def _noise_floor(ratio: Floats, cells: Ints) -> float:
    """Mean relative distance from the cell's median of measured / predicted.

    The ratio, not the time itself: context grows while a cell is measured, and that is not noise.
    """
    level = _spread(_cell_medians(ratio, cells), cells)
    return float(np.mean(np.abs(level / ratio - 1.0)))


def _cell_medians(values: Floats, cells: Ints) -> Floats:
    """Median of each cell that occurs, in the order of `np.unique(cells)`."""
    order = np.lexsort((values, cells))
    _, first, count = np.unique(cells[order], return_index=True, return_counts=True)
    low, high = values[order][first + (count - 1) // 2], values[order][first + count // 2]
    return np.asarray((low + high) / 2.0)


def _spread(per_cell: Floats, cells: Ints) -> Floats:
    """Per-cell values back to one per sample."""
    return np.asarray(per_cell[np.unique(cells, return_inverse=True)[1]])


def _nonnegative_least_squares(design: Floats, target: Floats, weight: Floats) -> Floats:
    """Exact for a handful of columns: solve every subset that contains the base, keep the best feasible one."""
    root = np.sqrt(weight)
    scaled = design * root[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    usable = [column for column in (ROW, CONTEXT, PREFILL, STEEP) if norms[column] > 0]
    best, best_loss = np.zeros(design.shape[1]), np.inf
    for size in range(len(usable) + 1):
        for chosen in combinations(usable, size):
            columns = [BASE, *chosen]
            unit = scaled[:, columns] / norms[columns]
            solution = np.linalg.lstsq(unit, target * root, rcond=None)[0] / norms[columns]
            if (solution < 0).any() or solution[0] <= 0:
                continue
            loss = float(np.sum((scaled[:, columns] @ solution - target * root) ** 2))
            if loss < best_loss * (1 - 1e-12):
                best, best_loss = np.zeros(design.shape[1]), loss
                best[columns] = solution
    return best

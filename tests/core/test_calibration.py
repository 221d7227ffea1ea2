"""The fit: exact where there is no noise, bounded where there is, honest about what it cannot know."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from taper.core.calibration import Learner, Samples, fit, outliers
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, StepLoad

LAW = LinearLatency(base_s=0.014, row_s=5e-4, context_s=1.7e-6, prefill_s=3.6e-4)
REPEATS = 10


def grid(prefills: tuple[int, ...] = (0, 64, 256), repeats: int = REPEATS) -> Samples:
    rows, context, prefill = (
        column.ravel() for column in np.meshgrid([1, 2, 4, 8, 16, 32, 64], [64, 256, 1024], prefills)
    )
    rows, prefill = np.repeat(rows, repeats), np.repeat(prefill, repeats)
    context = np.repeat(context, repeats) * rows
    return Samples(
        rows=rows, context_tokens=context, prefill_tokens=prefill, measured_s=LAW.predict(rows, context, prefill)
    )


def with_seconds(samples: Samples, measured_s: np.ndarray) -> Samples:
    return Samples(
        rows=samples.rows,
        context_tokens=samples.context_tokens,
        prefill_tokens=samples.prefill_tokens,
        measured_s=measured_s,
        cell=samples.cell,
    )


def coefficients(law: LinearLatency) -> list[float]:
    return [law.base_s, law.row_s, law.context_s, law.prefill_s]


def test_exact_steps_give_the_exact_law() -> None:
    result = fit(grid())
    assert coefficients(result.latency) == pytest.approx(coefficients(LAW), rel=1e-9)
    assert result.samples == 7 * 3 * 3 * REPEATS
    assert result.cells == 63
    assert result.outliers == 0
    assert result.mape == pytest.approx(0.0, abs=1e-9)
    assert result.heldout_mape == pytest.approx(0.0, abs=1e-9)
    assert result.heldout_cell_mape == pytest.approx(0.0, abs=1e-9)
    assert result.noise_floor == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_hiccups_leave_the_law_standing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    exact = grid()
    noisy = exact.measured_s * rng.lognormal(0.0, 0.05, len(exact))
    hit = rng.random(len(exact)) < 0.08
    noisy[hit] *= rng.uniform(3.0, 30.0, np.count_nonzero(hit))
    result = fit(with_seconds(exact, noisy))
    assert coefficients(result.latency) == pytest.approx(coefficients(LAW), rel=0.08)
    assert 0.8 * np.count_nonzero(hit) <= result.outliers <= np.count_nonzero(hit) + 0.02 * len(exact)
    assert result.noise_floor == pytest.approx(0.04, abs=0.01)  # mean |error| of 5 % log-normal noise
    assert result.heldout_mape is not None
    assert result.heldout_mape < 0.05
    assert result.heldout_cell_mape is not None
    assert result.heldout_cell_mape < result.heldout_mape


def test_the_fit_is_deterministic_and_does_not_depend_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(7)
    exact = grid()
    noisy = with_seconds(exact, exact.measured_s * rng.lognormal(0.0, 0.05, len(exact)))
    order = rng.permutation(len(exact))
    shuffled = Samples(
        rows=noisy.rows[order],
        context_tokens=noisy.context_tokens[order],
        prefill_tokens=noisy.prefill_tokens[order],
        measured_s=noisy.measured_s[order],
    )
    first, second = fit(noisy), fit(shuffled)
    assert first == fit(noisy)
    assert coefficients(second.latency) == pytest.approx(coefficients(first.latency), rel=1e-6)
    assert second.heldout_mape == pytest.approx(first.heldout_mape, rel=1e-6)


def test_every_cell_is_judged_by_a_law_that_did_not_see_it() -> None:
    """One cell at twice the law: the others' fits leave it out or down-weight it, so it is off by half."""
    exact = grid(prefills=(0, 64))
    cells = exact.cells()
    bent = exact.measured_s.copy()
    bent[cells == 2] *= 2.0
    result = fit(with_seconds(exact, bent))
    assert result.cells == 42
    assert result.heldout_mape == pytest.approx(0.5 / 42, rel=0.05)
    assert result.heldout_cell_mape == pytest.approx(0.5 / 42, rel=0.05)
    assert result.noise_floor == pytest.approx(0.0, abs=1e-9)


def test_too_few_cells_to_hold_any_out() -> None:
    rows = np.repeat([1, 2, 4], 4)
    samples = Samples(
        rows=rows, context_tokens=rows * 100, prefill_tokens=np.zeros_like(rows), measured_s=0.01 + 0.001 * rows
    )
    result = fit(samples)
    assert result.heldout_mape is None
    assert result.heldout_cell_mape is None


def test_no_coefficient_is_ever_negative() -> None:
    exact = grid(prefills=(0, 64))
    falling = with_seconds(exact, 0.02 - 1e-4 * exact.rows)
    law = fit(falling).latency
    assert law.row_s == 0.0
    assert law.context_s == 0.0
    assert 0.0 < law.base_s <= 0.02


def test_without_prompt_tokens_a_prompt_token_costs_a_row() -> None:
    law = fit(grid(prefills=(0,))).latency
    assert law.prefill_s == law.row_s == pytest.approx(LAW.row_s, rel=1e-9)


def test_rows_are_padded_to_capture_sizes() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64)
    stairs = LinearLatency(base_s=7e-3, row_s=4e-5, context_s=1.4e-8, prefill_s=1e-5, capture_sizes=sizes)
    rows = np.tile(np.arange(1, 65), 3)
    context = rows * np.repeat([128, 1024, 4096], 64)
    measured = stairs.predict(rows, context, np.zeros_like(rows))
    samples = Samples(rows=rows, context_tokens=context, prefill_tokens=np.zeros_like(rows), measured_s=measured)
    law = fit(samples, capture_sizes=sizes).latency
    assert law.capture_sizes == sizes
    assert coefficients(law)[:3] == pytest.approx(coefficients(stairs)[:3], rel=1e-6)


def test_named_cells_beat_the_guess_from_the_load() -> None:
    same = np.array([5, 5, 5, 5])
    samples = Samples(
        rows=np.array([1, 1, 1, 1]),
        context_tokens=np.array([10, 1000, 10, 1000]),
        prefill_tokens=np.zeros(4, dtype=np.int64),
        measured_s=np.ones(4),
        cell=same,
    )
    assert len(np.unique(samples.cells())) == 1
    assert len(np.unique(with_seconds(samples, np.ones(4)).take(np.array([True] * 4)).cells())) == 1


def test_outliers_are_judged_within_their_own_cell() -> None:
    seconds = np.array([1.0, 1.01, 0.99, 1.0, 5.0, 10.0, 10.1, 9.9, 10.0, 1.0])
    cells = np.array([0] * 5 + [1] * 5)
    assert outliers(seconds, cells).tolist() == [False] * 4 + [True] + [False] * 4 + [True]


@pytest.mark.parametrize(
    ("rows", "words"),
    [([4] * 20, "row counts"), ([1, 2, 4], "at least 8"), ([30, 31, 32] * 8, "twice the smallest")],
)
def test_samples_that_cannot_tell_the_terms_apart_are_refused(rows: list[int], words: str) -> None:
    columns = np.array(rows)
    samples = Samples(
        rows=columns,
        context_tokens=columns * np.arange(1, len(rows) + 1),
        prefill_tokens=np.zeros_like(columns),
        measured_s=np.full(len(rows), 0.02),
    )
    with pytest.raises(ConfigError, match=words):
        fit(samples)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(bad: float) -> None:
    one = np.array([1])
    with pytest.raises(ConfigError, match="finite and > 0"):
        Samples(rows=one, context_tokens=one, prefill_tokens=one, measured_s=np.array([bad]))


def test_the_learner_waits_for_variety_and_then_finds_the_law() -> None:
    learner = Learner(min_steps=50)
    for context in range(100, 300):
        learner.add(StepLoad(rows=1, context_tokens=context, prefill_tokens=0), LAW.predict(1, context, 0))
    assert learner.law() is None  # one row count says nothing about the cost of rows
    for rows in range(1, 40):
        for context in (rows * 50, rows * 400):
            load = StepLoad(rows=rows, context_tokens=context, prefill_tokens=rows % 3 * 32)
            learner.add(load, LAW.predict_load(load))
    law = learner.law()
    assert law is not None
    assert coefficients(law) == pytest.approx(coefficients(LAW), rel=1e-6)


def test_the_learner_leaves_out_times_that_no_step_takes() -> None:
    """One of them among the samples made every later fit fail."""
    learner = Learner(min_steps=50)
    for rows in range(1, 40):
        for context in (rows * 50, rows * 400):
            load = StepLoad(rows=rows, context_tokens=context, prefill_tokens=rows % 3 * 32)
            learner.add(load, LAW.predict_load(load))
            for impossible_s in (float("inf"), 1e300, 5e-324, -1.0, float("nan")):
                learner.add(load, impossible_s)
    law = learner.law()
    assert law is not None
    assert coefficients(law) == pytest.approx(coefficients(LAW), rel=1e-6)


def test_the_learner_forgets_old_steps_of_a_load() -> None:
    learner = Learner(min_steps=10, per_bucket=4)
    for scale in (3.0, 1.0):
        for rows in range(1, 40):
            for context in (rows * 50, rows * 400, rows * 1000):
                load = StepLoad(rows=rows, context_tokens=context, prefill_tokens=rows % 3 * 32)
                for _ in range(4):
                    learner.add(load, scale * LAW.predict_load(load))
    law = learner.law()
    assert law is not None
    assert coefficients(law) == pytest.approx(coefficients(LAW), rel=1e-6)


KNEE = LinearLatency(base_s=0.019, row_s=3e-5, context_s=6e-8, prefill_s=9e-5, knee_rows=128, steep_s=7e-5)
GPU_RECORD = Path(__file__).parents[2] / "results/gpu/h200-qwen3-32b/surface.json"


def knee_grid(law: LinearLatency = KNEE) -> Samples:
    counts = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512]
    rows, context = (np.repeat(column.ravel(), 4) for column in np.meshgrid(counts, [64, 512, 2048]))
    nothing = np.zeros_like(rows)
    return Samples(
        rows=rows,
        context_tokens=context * rows,
        prefill_tokens=nothing,
        measured_s=law.predict(rows, context * rows, nothing),
    )


def gpu_record() -> Samples:
    """Steps of a 32B model on one H200, engine asynchronous: medians of 177 loads, and every step with a prompt."""
    record = json.loads(GPU_RECORD.read_text())
    steps = [cell | {"prefill_tokens": 0, "measured_s": cell["p50_s"]} for cell in record["cells"]]
    steps += record["prefill_steps"]
    names = ("rows", "context_tokens", "prefill_tokens", "measured_s")
    return Samples(**{name: np.array([step[name] for step in steps]) for name in names})


def test_a_knee_is_found_where_there_is_one() -> None:
    law = fit(knee_grid()).latency
    assert (law.knee_rows, law.steep_s) == (128, pytest.approx(7e-5))
    assert coefficients(law)[:3] == pytest.approx(coefficients(KNEE)[:3])


@pytest.mark.parametrize("seed", range(3))
def test_noise_makes_no_knee(seed: int) -> None:
    exact = grid()
    noisy = exact.measured_s * np.random.default_rng(seed).lognormal(0.0, 0.08, len(exact))
    assert fit(with_seconds(exact, noisy)).latency.steep_s == 0


def test_the_law_of_a_gpu_has_a_knee_and_holds_within_two_percent() -> None:
    result = fit(gpu_record())
    assert 96 <= result.latency.knee_rows <= 192
    assert result.heldout_cell_mape is not None
    assert result.heldout_cell_mape < 0.02


def test_steps_timed_with_their_neighbour_do_not_price_prompts() -> None:
    record = gpu_record()
    mixed = (record.rows > 0) & (record.prefill_tokens > 0)
    result = fit(record)
    assert result.moved == np.count_nonzero(mixed)
    alone = record.take(record.rows == 0)  # prompts of 257 and of 1024 tokens
    predicted = result.latency.predict(alone.rows, alone.context_tokens, alone.prefill_tokens)
    assert np.median(predicted / alone.measured_s) == pytest.approx(1.0, abs=0.1)


def test_mixed_steps_of_an_engine_that_times_them_are_kept() -> None:
    exact = grid()
    noisy = exact.measured_s * np.random.default_rng(1).lognormal(0.0, 0.08, len(exact))
    assert fit(with_seconds(exact, noisy)).moved == 0

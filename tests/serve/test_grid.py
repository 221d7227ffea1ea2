"""Which loads a calibration visits."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from taper.core.types import ConfigError
from taper.engines.vllm import grid
from taper.engines.vllm.grid import Bounds, Visit

SMALL = Bounds(max_rows=256, max_model_tokens=2048, max_step_tokens=256, block_tokens=32, kv_tokens=93_184)
STEPS = 8


def test_rows_stay_within_what_one_step_holds() -> None:
    assert grid.row_counts(SMALL)[-1] == 256
    few = Bounds(max_rows=20, max_model_tokens=2048, max_step_tokens=256, block_tokens=32, kv_tokens=93_184)
    assert grid.row_counts(few) == (1, 2, 4, 8, 12, 16)


def test_contexts_are_whole_blocks_within_the_model() -> None:
    lengths = grid.context_lengths(SMALL, STEPS)
    assert lengths == (32, 64, 128, 256, 384, 512, 768, 1024)
    odd = Bounds(max_rows=8, max_model_tokens=300, max_step_tokens=64, block_tokens=48, kv_tokens=9_000)
    assert grid.context_lengths(odd, STEPS) == (48, 96)


def test_an_engine_without_room_is_refused() -> None:
    tiny = Bounds(max_rows=8, max_model_tokens=64, max_step_tokens=64, block_tokens=32, kv_tokens=4096)
    with pytest.raises(ConfigError, match="no room to calibrate"):
        grid.context_lengths(tiny, STEPS)


def test_a_pass_visits_every_cell_once_and_the_corners_first() -> None:
    rows = (1, 4, 16)
    visits = grid.decode_pass(rows, SMALL, STEPS, random.Random(0))
    cells = [(visit.rows, visit.context_tokens) for visit in visits]
    assert set(cells[:4]) == {(1, 32), (16, 1024), (1, 1024), (16, 32)}
    assert sorted(cells) == [(row, context) for row in rows for context in grid.context_lengths(SMALL, STEPS)]


def test_no_visit_overflows_the_cache_or_a_request() -> None:
    for bounds in (
        SMALL,
        Bounds(max_rows=1024, max_model_tokens=131072, max_step_tokens=8192, block_tokens=16, kv_tokens=50_000),
        Bounds(max_rows=1024, max_model_tokens=2048, max_step_tokens=8192, block_tokens=16, kv_tokens=500_000),
    ):
        for visit in islice(grid.passes(grid.row_counts(bounds), bounds, STEPS, 0), 400):
            own = visit.rows * (STEPS + 2 * bounds.block_tokens)
            assert own + grid.PREFIXES * visit.context_tokens <= bounds.kv_tokens
            assert visit.context_tokens + STEPS < bounds.max_model_tokens
            assert visit.rows + visit.prefill_tokens <= bounds.max_step_tokens
            assert visit.prefill_tokens < bounds.max_model_tokens
            assert visit.rows * visit.context_tokens <= grid.MAX_PROMPT_TOKENS


def test_slow_machines_get_shorter_contexts() -> None:
    assert grid.context_lengths(SMALL.within(32 * 600), STEPS)[-1] == 512
    assert grid.context_lengths(SMALL.within(32), STEPS) == (32, 64, 128, 256)  # but never too few


def test_prompts_are_mixed_in_from_the_start() -> None:
    visits = list(islice(grid.passes((1, 8, 32), SMALL, STEPS, 0), 20))
    chunks = {visit.prefill_tokens for visit in visits} - {0}
    assert len(chunks) >= 3
    assert next(at for at, visit in enumerate(visits) if visit.prefill_tokens) < 6


def test_the_order_is_reproducible() -> None:
    first, second = (list(islice(grid.passes((1, 2, 4, 8), SMALL, STEPS, 3), 100)) for _ in range(2))
    assert first == second
    assert first[0] == Visit(rows=1, context_tokens=32, steps=STEPS)

import numpy as np
import pytest

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, StepLoad

LAW = LinearLatency(base_s=0.010, row_s=0.001, context_s=1e-6, prefill_s=0.0002)


def test_the_linear_law():
    assert LAW.predict(5, 1000, 20) == pytest.approx(0.010 + 0.005 + 0.001 + 0.004)
    assert LAW.predict_load(StepLoad(rows=5, context_tokens=1000, prefill_tokens=20)) == LAW.predict(5, 1000, 20)


def test_columns_are_priced_in_one_call():
    seconds = LAW.predict(np.array([1, 2]), np.array([0, 1000]), np.array([0, 0]))
    assert seconds == pytest.approx([0.011, 0.013])


def test_rows_are_padded_to_the_next_captured_size():
    law = LinearLatency(base_s=0.01, row_s=0.001, context_s=0.0, prefill_s=0.0, capture_sizes=(1, 2, 4, 8))
    assert [law.padded(n) for n in (0, 1, 3, 4, 5, 8, 9)] == [1, 1, 4, 4, 8, 8, 9]
    assert law.padded(np.array([3, 9])).tolist() == [4, 9]
    assert law.predict(5, 0, 0) == law.predict(8, 0, 0) == pytest.approx(0.018)


def test_corrections_scale_the_whole_and_the_prefill_term():
    law = LAW.corrected(scale=2.0, prefill_scale=0.5)
    assert law.predict(5, 1000, 20) == pytest.approx(2 * (0.016 + 0.5 * 0.004))


def test_prefill_tokens_within_inverts_the_prefill_term():
    assert LAW.prefill_tokens_within(0.01) == pytest.approx(50)
    assert LAW.corrected(scale=2.0, prefill_scale=1.0).prefill_tokens_within(0.01) == pytest.approx(25)
    free = LinearLatency(base_s=0.01, row_s=0.001, context_s=0.0, prefill_s=0.0)
    assert free.prefill_tokens_within(0.01) == np.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_s", 0.0), ("row_s", -1.0), ("context_s", float("nan")), ("prefill_s", float("inf"))],
)
def test_impossible_coefficients_are_refused_by_name(field, value):
    good = {"base_s": 0.01, "row_s": 0.001, "context_s": 0.0, "prefill_s": 0.0}
    with pytest.raises(ConfigError, match=field):
        LinearLatency(**{**good, field: value})


def test_capture_sizes_must_ascend():
    with pytest.raises(ConfigError, match="ascending"):
        LinearLatency(base_s=0.01, row_s=0.0, context_s=0.0, prefill_s=0.0, capture_sizes=(4, 2))


def test_rows_beyond_the_knee_cost_more():
    law = LinearLatency(base_s=0.02, row_s=1e-5, context_s=0.0, prefill_s=0.0, knee_rows=128, steep_s=9e-5)
    assert law.predict(128, 0, 0) == pytest.approx(0.02 + 128e-5)
    assert law.predict(138, 0, 0) == pytest.approx(0.02 + 138e-5 + 10 * 9e-5)
    columns = law.predict(np.array([1, 128, 138]), np.zeros(3, int), np.zeros(3, int))
    assert columns.tolist() == [law.predict(rows, 0, 0) for rows in (1, 128, 138)]


@pytest.mark.parametrize("rows", [3, 128, 300])
def test_rows_within_inverts_the_row_terms(rows):
    law = LinearLatency(base_s=0.02, row_s=1e-5, context_s=1e-8, prefill_s=0.0, knee_rows=128, steep_s=9e-5)
    added_s = law.predict(rows, rows * 500, 0) - law.base_s
    assert law.rows_within(added_s, 500) == pytest.approx(rows)


def test_rows_that_cost_nothing_have_no_inverse():
    law = LinearLatency(base_s=0.02, row_s=0.0, context_s=0.0, prefill_s=0.0)
    with pytest.raises(ConfigError, match="prices rows at zero"):
        law.rows_within(1.0, 500)

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

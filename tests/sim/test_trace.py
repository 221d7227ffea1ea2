import numpy as np
import pytest

from taper.goodput import Window
from taper.sim.trace import Trace, gap_percentile_s, weighted_percentile


def test_weighted_percentile_counts_each_value_as_often_as_it_came() -> None:
    values, counts = np.array([30.0, 10.0, 20.0]), np.array([1, 8, 1])
    assert [weighted_percentile(values, counts, rank) for rank in (0, 80, 81, 90, 91, 100)] == [10, 10, 20, 20, 30, 30]
    assert weighted_percentile(values, np.zeros(3, dtype=np.int64), 50) is None
    assert weighted_percentile(np.empty(0), np.empty(0, dtype=np.int64), 50) is None


def test_gaps_are_those_that_end_inside_the_window() -> None:
    trace = Trace()
    for end_s, step_s, followed in ((1.0, 1.0, 4), (3.0, 2.0, 5), (6.0, 3.0, 4), (10.0, 4.0, 9)):
        trace.end_s.append(end_s)
        trace.step_s.append(step_s)
        trace.followed.append(followed)
    for step, gap_s in ((0, 50.0), (2, 5.0)):
        trace.gap_step.append(step)
        trace.gap_s.append(gap_s)
    window = Window(start_s=3.0, end_s=10.0)
    # Five of 2 s, four of 3 s, one of 5 s.
    assert [gap_percentile_s([trace], rank, window) for rank in (50, 90, 99)] == [2.0, 3.0, 5.0]
    assert gap_percentile_s([trace, trace], 50, window) == 2.0


@pytest.mark.parametrize("rank", [50, 99])
def test_no_gaps_no_percentile(rank: float) -> None:
    assert gap_percentile_s([Trace()], rank, Window(start_s=0.0, end_s=1.0)) is None

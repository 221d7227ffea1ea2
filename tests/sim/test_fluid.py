import pytest

from taper.sim.bound import fluid_bound, mean_slowdown
from taper.sim.cost import Disturbance
from taper.sim.hardware import Hardware
from taper.sim.scenario import parse

# A step is 1 s + 0.1 s a row; 10 requests; half of the requests are serial (40 tokens), half fork 4 x 10 at arrival:
# off's step is 2 s, and with every branch running 80 tokens take 50 steps, so 16 rows and 2.6 s.
MACHINE = Hardware(name="m", base_s=1.0, row_s=0.1, context_s=0.0, prefill_s=0.0, nominal_requests=10)
TEXT = """
summary = "s"
load = 2.0
tpot_slo_s = 2.3
{extra}
[mix]
branching_share = 0.5
prompt = {{ low = 5, high = 5 }}
serial = {{ low = 40, high = 40 }}
fanout = {{ low = 4, high = 4 }}
branch = {{ low = 10, high = 10 }}
at_arrival = true
"""


def bound(extra="", **changes):
    text = TEXT.format(extra=extra)
    for old, new in changes.values():
        text = text.replace(old, new)
    return fluid_bound(parse("s", text), MACHINE)


def test_the_step_may_be_as_long_as_the_slo() -> None:
    found = bound()
    assert (found.rows, found.met_share) == (13, 1.0)
    assert found.step_s == pytest.approx(2.3)
    assert found.goodput_tok_s == pytest.approx(13 / 2.3)


def test_giving_the_serial_requests_up_pays_where_their_slo_cannot_be_kept() -> None:
    found = bound(slo=("tpot_slo_s = 2.3", "tpot_slo_s = 1.9"))
    assert (found.rows, found.step_s, found.met_share) == (16, pytest.approx(2.6), pytest.approx(0.5))
    assert found.goodput_tok_s == pytest.approx(0.5 * 16 / 2.6)


def test_nobody_gets_more_than_is_offered() -> None:
    found = bound(rate=("load = 2.0", "rate_per_s = 0.01"))
    assert found.goodput_tok_s == pytest.approx(0.01 * 40)


def test_an_impatient_class_is_left_out_where_that_pays() -> None:
    found = bound(mix=("at_arrival = true", "at_arrival = true\nslo_classes = [[0.1, 0.5]]"))
    assert found.met_share == pytest.approx(1 - 0.5 * 0.1)
    assert found.goodput_tok_s == pytest.approx(0.95 * 13 / 2.3)


def test_disturbances_count_with_their_mean() -> None:
    assert mean_slowdown(Disturbance(), 0.25) == 1.0
    assert mean_slowdown(Disturbance(spike_share=0.004, spike_factor=12.0), 0.25) == pytest.approx(1.044)
    assert mean_slowdown(Disturbance(drift_to=1.2), 0.5) == pytest.approx(1.15)

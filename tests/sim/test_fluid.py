import pytest

from taper.sim.cost import Disturbance
from taper.sim.fluid import fluid_estimate, mean_slowdown
from taper.sim.hardware import Hardware
from taper.sim.run import Case, run
from taper.sim.scenario import parse

# A step is 1 s + 0.1 s a row; 10 requests; 40 tokens each, serial or 4 x 10 at arrival.
MACHINE = Hardware(name="m", base_s=1.0, row_s=0.1, context_s=0.0, prefill_s=0.0, nominal_requests=10)
TEXT = """
summary = "s"
load = 2.0
tpot_slo_s = 2.3
duration_steps = 4000
{extra}
[mix]
branching_share = 0.5
prompt = {{ low = 5, high = 5 }}
serial = {{ low = 40, high = 40 }}
fanout = {{ low = 4, high = 4 }}
branch = {{ low = 10, high = 10 }}
at_arrival = true
"""


def scenario(extra="", **changes):
    text = TEXT.format(extra=extra)
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return parse("s", text)


def estimate(extra="", **changes):
    return fluid_estimate(scenario(extra, **changes), MACHINE, seed=0)


def test_the_step_may_be_as_long_as_the_slo() -> None:
    found = estimate()
    assert (found.rows, found.met_share) == (13, 1.0)
    assert found.step_s == pytest.approx(2.3)
    assert found.goodput_tok_s == pytest.approx(13 / 2.3)


def test_giving_the_serial_requests_up_pays_where_their_slo_cannot_be_kept() -> None:
    found = estimate(slo=("tpot_slo_s = 2.3", "tpot_slo_s = 1.9"))
    assert (found.rows, found.step_s, found.met_share) == (16, pytest.approx(2.6), pytest.approx(0.5, abs=0.02))
    assert found.goodput_tok_s == pytest.approx(found.met_share * 16 / 2.6)


def test_nobody_gets_more_than_the_window_s_requests_ask_for() -> None:
    light = scenario(rate=("load = 2.0", "rate_per_s = 0.01"))
    coming = list(light.source.requests(seed=0, rate_rps=0.01, horizon_s=8000.0))
    in_window = sum(one.tokens for one in coming if one.arrival_s >= 2000.0)
    assert fluid_estimate(light, MACHINE, seed=0).goodput_tok_s == pytest.approx(in_window / 6000.0)


def test_an_impatient_class_is_left_out_where_that_pays() -> None:
    found = estimate(mix=("at_arrival = true", "at_arrival = true\nslo_classes = [[0.1, 0.5]]"))
    assert found.met_share == pytest.approx(1 - 0.5 * 0.1, abs=0.02)
    assert found.goodput_tok_s == pytest.approx(found.met_share * 13 / 2.3)


def test_disturbances_count_with_their_mean() -> None:
    assert mean_slowdown(Disturbance(), 0.25) == 1.0
    assert mean_slowdown(Disturbance(spike_share=0.004, spike_factor=12.0), 0.25) == pytest.approx(1.044)
    assert mean_slowdown(Disturbance(drift_to=1.2), 0.5) == pytest.approx(1.15)


@pytest.mark.parametrize("slo_s", [2.1, 2.3, 2.5])
def test_the_best_run_comes_within_a_few_per_cent_of_it(slo_s: float) -> None:
    saturated = scenario(slo=("tpot_slo_s = 2.3", f"tpot_slo_s = {slo_s}"))
    best = fluid_estimate(saturated, MACHINE, seed=1).goodput_tok_s
    reached = [
        run(Case(scenario=saturated, machine=MACHINE, policy=policy, seed=1)).summary.goodput_tok_s
        for policy in ("off", "cap:2", "eager", "taper")
    ]
    assert 0.85 * best < max(reached) < 1.05 * best

import math

import numpy as np
import pytest

from taper.core.controller import FLOOR_EVERY_REQUESTS, Controller
from taper.core.latency import LinearLatency
from taper.core.policies import resolve
from taper.core.types import Ending, FinishedRequest, Knobs, StepLoad, StepOutcome
from tests.core.views import branching, make_view, serial

LAW = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0005)
DECODE = StepLoad(rows=10, context_tokens=0, prefill_tokens=0)


def controller(policy="taper", **knobs):
    return Controller(latency=LAW, policy=resolve(policy), knobs=Knobs(**knobs))


def outcome(measured_s, load=DECODE, ending=Ending.CLEAN, finished=(), requests=50, tokens_per_row=1.0):
    return StepOutcome(
        load=load,
        requests=requests,
        measured_s=measured_s,
        ending=ending,
        finished=tuple(finished),
        tokens_per_row=tokens_per_row,
    )


def finished(residence_s, externality_s=0.0, tokens=101, serial_tokens=None, critical=None, tpot_slo_s=0.05):
    serial_tokens = tokens if serial_tokens is None else serial_tokens
    return FinishedRequest(
        tokens=tokens,
        serial_tokens=serial_tokens,
        critical_path_tokens=serial_tokens if critical is None else critical,
        residence_s=residence_s,
        externality_s=externality_s,
        tpot_slo_s=tpot_slo_s,
    )


def test_scale_converges_to_measured_over_predicted():
    c = controller()
    for _ in range(300):
        c.observe(outcome(0.020 * 1.3))
    assert c.latency.scale == pytest.approx(1.3, rel=1e-3)
    assert c.latency.predict(10, 0, 0) == pytest.approx(0.026, rel=1e-3)


def test_prefill_correction_leaves_the_decode_scale_alone():
    c = controller()
    heavy = StepLoad(rows=10, context_tokens=0, prefill_tokens=100)
    for _ in range(300):
        c.observe(outcome(0.020 + 2 * 0.050, load=heavy))
    assert c.latency.prefill_scale == pytest.approx(2.0, rel=1e-3)
    assert c.latency.scale == 1.0


def test_one_absurd_sample_moves_the_scale_by_at_most_one_rate():
    c = controller(correction_rate=0.05)
    c.observe(outcome(60.0))
    assert c.latency.scale == pytest.approx(1.05)


def test_the_correction_is_limited_both_ways():
    c = controller(correction_rate=1.0, correction_limit=3.0)
    for _ in range(20):
        c.observe(outcome(100.0))
    assert c.latency.scale == 3.0
    for _ in range(40):
        c.observe(outcome(1e-6))
    assert c.latency.scale == pytest.approx(1 / 3)


@pytest.mark.parametrize("ending", [Ending.IGNORED, Ending.OVERRUN])
def test_samples_that_say_nothing_change_nothing(ending):
    c = controller()
    c.observe(outcome(1.0, ending=ending))
    assert c.latency == LAW


def test_margin_grows_on_misses_that_extras_caused_and_relaxes_otherwise():
    c = controller(margin=0.02, margin_gain=0.01, miss_target=0.0)
    c.observe(outcome(0.02, finished=[finished(5.5, externality_s=1.0)]))
    assert c.guidance.margin == pytest.approx(0.03)
    c.observe(outcome(0.02, finished=[finished(5.5, externality_s=0.1)]))  # would have missed anyway
    assert c.guidance.margin == pytest.approx(0.03)
    c.replace(knobs=Knobs(margin=0.02, margin_gain=0.01, miss_target=0.5))
    c.observe(outcome(0.02, finished=[finished(1.0)]))
    assert c.guidance.margin == pytest.approx(0.025)


def test_margin_rests_between_its_knob_and_its_maximum():
    c = controller(margin=0.0, margin_gain=0.2, miss_target=0.0)
    for _ in range(50):
        c.observe(outcome(0.02, finished=[finished(5.5, externality_s=1.0)]))
    assert c.guidance.margin == 0.3
    calm = controller(margin=0.02, margin_gain=0.2, miss_target=0.5)
    for _ in range(50):
        calm.observe(outcome(0.02, finished=[finished(1.0)]))
    assert calm.guidance.margin == pytest.approx(0.02)


def test_margin_and_floor_answer_to_the_policy_in_force_alone():
    late = finished(5.5, externality_s=1.0)
    lost = [finished(6.0, tokens=101, serial_tokens=0, critical=10) for _ in range(64)]
    for name in ("eager", "cap:5", "off"):  # nothing of theirs could be corrected
        c = controller(name, margin_gain=0.01)
        c.observe(outcome(0.06, finished=[late] * 20 + lost, requests=45))
        c.replace(policy=resolve("taper"))
        assert (c.guidance.margin, c.guidance.floor_s) == (c.knobs.margin, 0.0)
    c.observe(outcome(1.0, finished=[late] * 20 + lost, requests=45))  # begun under the policy before
    assert (c.guidance.margin, c.guidance.floor_s) == (c.knobs.margin, 0.0)
    assert c.guidance.mean_output_tokens == 101  # of the work, whoever did it
    c.observe(outcome(10.0, finished=[late] * 20 + lost, requests=45))
    assert c.guidance.margin > c.knobs.margin
    assert c.guidance.floor_s > 0.0
    c.replace(policy=resolve("taper"))  # the same policy: nothing is forgotten
    assert c.guidance.margin > c.knobs.margin
    assert c.guidance.floor_s > 0.0
    c.replace(policy=resolve("taper-paper"))
    assert (c.guidance.margin, c.guidance.floor_s) == (c.knobs.margin, 0.0)


def test_a_plug_in_policy_posted_again_is_the_same_policy():
    class Mine:
        name, is_stock = "mine", False

        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

    c = Controller(latency=LAW, policy=Mine(), knobs=Knobs(margin_gain=0.01))
    c.observe(outcome(0.06, finished=[finished(5.5, externality_s=1.0)] * 5))
    c.replace(policy=Mine())
    assert c.guidance.margin > c.knobs.margin


def test_the_cold_start_leaves_neither_margin_nor_floor_behind():
    c = Controller(latency=LAW, policy=resolve("taper"), knobs=Knobs(), learn=True)
    c.observe(outcome(0.06, finished=[finished(5.5, externality_s=1.0)] * 20, requests=45))
    assert c.learning
    assert c.guidance.margin == c.knobs.margin
    c.replace(latency=LAW)
    c.observe(outcome(0.06, finished=[finished(5.5, externality_s=1.0)] * 20, requests=45))
    assert not c.learning
    assert c.guidance.margin == c.knobs.margin


def test_no_floor_while_width_one_keeps_the_slo():
    c = controller()
    c.observe(outcome(0.02, finished=[finished(2.0) for _ in range(64)], requests=10))
    assert c.guidance.floor_s == 0.0


def test_a_floor_where_only_wide_steps_keep_the_slo():
    # 45 requests at width 1 take 55 ms a step, over their SLO of 50 ms; at width 12 it is 464 ms
    # for 10 steps: met. (The one sample, three times the prediction, moves the scale by a twentieth.)
    c = controller()
    done = [finished(6.0, tokens=101, serial_tokens=0, critical=10) for _ in range(64)]
    c.observe(outcome(0.06, finished=done, requests=45))
    assert c.guidance.floor_s == pytest.approx(1.05 * 0.464)
    off = controller(throughput_floor=0)
    off.observe(outcome(0.06, finished=done, requests=45))
    assert off.guidance.floor_s == 0.0


def two_promises(met, promise_s=1.0):
    """Fan-outs that are late at width 1, and chats that are late at any other: no common width keeps both.

    10 of them at width 1 take 20 ms a step: 1.26 s for a fan-out, and 0.64 s for a chat. At width 2 a step takes 27 ms,
    0.86 s for a chat, which is promised 0.75 s.
    """
    fan_out = finished(0.9 if met else 1.3, tokens=63, serial_tokens=1, critical=2, tpot_slo_s=promise_s / 62)
    chat = finished(0.7 if met else 1.3, tokens=32, tpot_slo_s=0.75 / 31)
    return [fan_out, fan_out, chat] * 22


def test_a_floor_comes_into_force_only_where_a_common_width_promises_more_than_was_got_and_stays():
    c = controller(correction_rate=0.0)
    c.observe(outcome(0.02, finished=two_promises(met=True), requests=10))
    assert c.guidance.floor_s == 0.0
    c = controller(correction_rate=0.0)
    c.observe(outcome(0.02, finished=two_promises(met=False), requests=10))
    assert c.guidance.floor_s > 0.0
    c.observe(outcome(0.02, finished=two_promises(met=True), requests=10))
    assert c.guidance.floor_s > 0.0


def test_no_floor_where_width_one_loses_by_a_hair_or_for_a_moment():
    c = controller(correction_rate=0.0)
    c.observe(outcome(0.02, finished=two_promises(met=False, promise_s=1.2), requests=10))
    assert c.guidance.floor_s == 0.0
    lost = two_promises(met=False)
    c = controller(correction_rate=0.0)
    c.observe(outcome(0.02, finished=lost[:FLOOR_EVERY_REQUESTS], requests=10))
    c.observe(outcome(0.02, finished=lost[:FLOOR_EVERY_REQUESTS], requests=10))
    assert c.guidance.floor_s == 0.0  # one look at enough requests
    c.observe(outcome(0.02, finished=lost[:FLOOR_EVERY_REQUESTS], requests=10))
    assert c.guidance.floor_s > 0.0


def test_no_budget_where_even_width_one_breaks_every_slo_and_no_width_keeps_it():
    # 60 requests at width 1 take 70 ms a step; at any width they need (10 ms + 60 ms * width) * 101 / width > 5 s.
    c = controller()
    done = [finished(7.0, tokens=101, serial_tokens=0, critical=10) for _ in range(64)]
    c.observe(outcome(0.07, finished=done, requests=60))
    assert c.guidance.floor_s == np.inf
    assert c.decide(make_view(serial(tokens=1), branching(500, tokens=1))).run.all()
    drafting = controller()  # two tokens per row: the same steps are 35 ms per token, which keeps every SLO
    drafting.observe(outcome(0.07, finished=done, requests=60, tokens_per_row=2.0))
    assert drafting.guidance.floor_s < np.inf


def test_replace_swaps_the_policy_and_keeps_what_was_learned():
    c = controller()
    c.observe(outcome(0.03))
    learned = c.latency
    c.replace(policy=resolve("off"))
    assert (c.policy.name, c.latency) == ("off", learned)
    c.replace(latency=LAW)
    assert c.latency == LAW


@pytest.mark.parametrize("stall_s", [0.06, 0.3, 1.0, 5.0, 600.0])
def test_full_width_returns_after_one_stall(stall_s):
    """P3: 4 requests x 20 branches beside 30 serial ones; one stall of any length, and full width comes back.

    Bound: P * ln(1 + R / (P * margin)) steps, P = max(H, mean path), R the remaining length assumed. Unless it is
    hopeless and leaves the minimum, a debt D is at most R * (SLO - T0); a step repays D / P + margin * SLO of it.
    """
    c = controller("taper", margin_gain=0.0, throughput_floor=0)
    now_s, tokens = 0.0, np.array([20] * 4 + [1] * 30)
    extras = []
    stall_at, bound = 50, math.ceil(16 * math.log(1 + 64 / (16 * c.knobs.margin)))
    for step in range(stall_at + bound + 1):
        requests = [branching(20, tokens=int(t)) for t in tokens[:4]] + [serial(tokens=int(t)) for t in tokens[4:]]
        view = make_view(*requests, now_s=now_s)
        plan = c.decide(view)
        extras.append(int(plan.run.sum()) - 34)
        now_s += plan.predicted_s + (stall_s if step == stall_at else 0.0)
        tokens = tokens + np.bincount(view.request[plan.run], minlength=34)
    assert extras[stall_at + bound] >= extras[stall_at] > 0


def test_without_a_profile_it_starts_narrow_and_learns_the_law():
    c = Controller(latency=LAW, policy=resolve("taper"), knobs=Knobs(), learn=True)
    lonely = make_view(branching(12, tokens=1))
    assert c.learning
    assert int(c.decide(lonely).run.sum()) == 2
    rng = np.random.default_rng(3)
    for _ in range(400):
        load = StepLoad(rows=int(rng.integers(1, 12)), context_tokens=int(rng.integers(50, 4000)), prefill_tokens=0)
        c.observe(outcome(0.030 + 0.002 * load.rows + 1e-6 * load.context_tokens, load=load))
    assert not c.learning
    assert c.latency.predict(5, 1000, 0) == pytest.approx(0.041, rel=0.02)
    assert c.decide(lonely).run.all()


def test_learning_leaves_policies_alone_that_need_no_predictor():
    for name, width in (("off", 1), ("cap:4", 4), ("eager", 12)):
        c = Controller(latency=LAW, policy=resolve(name), knobs=Knobs(), learn=True)
        assert int(c.decide(make_view(branching(12))).run.sum()) == width

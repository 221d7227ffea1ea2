"""Step latency: what is measured, and which samples count."""

from __future__ import annotations

import math

import pytest

from taper.core.types import Ending, StepLoad
from taper.engines.vllm.meter import OVERRUN_STREAK, WARMUP_STEPS, Step, StepMeter, Window
from tests.vllm.harness import PROFILE, fork, request, server_config


def step(index=0, predicted_s=0.02, **kwargs):
    load = StepLoad(rows=1, context_tokens=10, prefill_tokens=0)
    return Step(
        step=index,
        time_s=0.0,
        policy="taper",
        load=load,
        groups=1,
        protected=1,
        extra=0,
        deferred=0,
        held=0,
        predicted_s=predicted_s,
        **kwargs,
    )


def warm_meter(now_s=0.0):
    meter = StepMeter()
    for _ in range(WARMUP_STEPS):
        output = object()
        meter.scheduled(step(), output, now_s)
        assert meter.updated(output, now_s).ending is Ending.IGNORED
    return meter


def test_overlapping_steps_are_timed_from_the_update_before():
    """N+1 is scheduled at 1.01 while N runs until 1.03; N+1 comes back at 1.055, so it took 25 ms."""
    meter, (first, second) = warm_meter(now_s=1.00), (object(), object())
    meter.scheduled(step(1), first, 1.00)
    meter.scheduled(step(2), second, 1.01)
    one, two = meter.updated(first, 1.03), meter.updated(second, 1.055)
    assert (one.step, one.measured_s, one.ending) == (1, pytest.approx(0.03), Ending.CLEAN)
    assert (two.step, two.measured_s, two.ending) == (2, pytest.approx(0.025), Ending.CLEAN)
    assert (one.time_s, two.time_s) == (1.00, 1.03)
    assert len(meter) == 0


def test_what_the_host_does_between_two_steps_belongs_to_the_second():
    meter, (first, second) = warm_meter(), (object(), object())
    meter.scheduled(step(), first, 0.0)
    meter.updated(first, 1.00)
    meter.scheduled(step(), second, 1.005)  # planned and packed for 5 ms
    assert meter.updated(second, 1.03).measured_s == pytest.approx(0.03)


def test_a_step_after_a_pause_is_timed_from_its_schedule():
    meter, (first, second) = warm_meter(), (object(), object())
    meter.scheduled(step(), first, 0.0)
    meter.updated(first, 1.00)
    meter.interrupted()
    meter.scheduled(step(), second, 9.00)
    assert meter.updated(second, 9.02).measured_s == pytest.approx(0.02)


def test_the_sample_after_a_pause_is_ignored():
    meter, outputs = warm_meter(), [object(), object()]
    meter.interrupted()
    meter.scheduled(step(), outputs[0], 1.0)
    assert meter.updated(outputs[0], 1.02).ending is Ending.IGNORED
    meter.scheduled(step(), outputs[1], 1.02)
    assert meter.updated(outputs[1], 1.04).ending is Ending.CLEAN


def test_standing_still_without_an_empty_step_is_a_pause_too():
    """Every request waits for streamed input: vLLM takes no step at all."""
    meter, outputs = warm_meter(now_s=1.0), [object(), object()]
    meter.scheduled(step(), outputs[0], 1.06)
    late = meter.updated(outputs[0], 1.08)
    assert (late.measured_s, late.ending) == (pytest.approx(0.02), Ending.IGNORED)
    meter.scheduled(step(), outputs[1], 1.10)
    in_time = meter.updated(outputs[1], 1.12)
    assert (in_time.measured_s, in_time.ending) == (pytest.approx(0.04), Ending.CLEAN)


def test_an_empty_steps_update_and_a_lost_one():
    meter, outputs = warm_meter(), [object(), object()]
    assert meter.updated(object(), 1.0) is None
    meter.scheduled(step(1), outputs[0], 1.0)
    meter.scheduled(step(2), outputs[1], 1.0)
    two = meter.updated(outputs[1], 1.02)
    assert (two.step, two.measured_s) == (2, pytest.approx(0.02))  # from the pause before the lost one on
    assert len(meter) == 0


def test_an_engines_first_step_is_lost():
    meter, outputs = StepMeter(), [object(), object()]
    meter.scheduled(step(1), outputs[0], 1.0)
    meter.scheduled(step(2), outputs[1], 1.0)
    assert meter.updated(outputs[1], 1.02).measured_s == pytest.approx(0.02)


def test_overruns_until_it_is_the_predictor_that_is_off():
    meter, endings = warm_meter(), []
    for index in range(OVERRUN_STREAK + 2):
        output = object()
        meter.scheduled(step(predicted_s=0.01), output, index * 0.0501)
        endings.append(meter.updated(output, (index + 1) * 0.0501).ending)
    assert endings == [Ending.OVERRUN] * OVERRUN_STREAK + [Ending.CLEAN] * 2


def test_window_report():
    window = Window(since_s=10.0)
    assert window.report(12.0)["predictor_mape"] is None
    assert window.report(12.0)["planner_p99_s"] is None
    for measured_s, ending in (
        (0.025, Ending.CLEAN),
        (0.016, Ending.CLEAN),
        (9.0, Ending.OVERRUN),
        (1.0, Ending.IGNORED),
    ):
        window.add(step(measured_s=measured_s, ending=ending, planner_s=1e-4))
    report = window.report(12.0)
    assert report["predictor_mape"] == pytest.approx((0.2 + 0.25) / 2)
    assert (report["steps"], report["clean_steps"], report["overruns"], report["ignored_steps"]) == (4, 2, 1, 1)
    assert (report["seconds"], report["row_tokens"], report["planner_p50_s"]) == (2.0, 4, pytest.approx(1e-4))


def test_records_are_json_numbers():
    record = step(budget_s=math.inf).record()
    assert record["budget_s"] is None
    assert record["measured_s"] is None
    assert record["ending"] == "ignored"


def test_loads_and_latencies_of_a_run(make, is_async):
    """Two rows of growing context, 20 ms each, predicted by a + b * rows + d * prefill."""
    driver = make()
    driver.add(*fork("p", 2, prompt=20, tokens=12))
    driver.run()
    records = list(driver.taper.records)
    assert records[0]["prefill_tokens"] + records[1]["prefill_tokens"] == 24
    assert records[0]["predicted_s"] == pytest.approx(0.01 + records[0]["prefill_tokens"] * 1e-4)
    decoding = [record for record in records if record["rows"] == 2]
    assert [r["context_tokens"] for r in decoding] == list(range(40, 40 + 2 * len(decoding), 2))
    assert {round(record["measured_s"], 9) for record in records[2:]} == {0.02}
    assert [record["ending"] for record in records[:5]] == ["ignored"] * 4 + ["clean"]
    assert driver.taper.last_step.ending is Ending.CLEAN


def test_the_first_step_after_an_idle_spell_is_ignored(make):
    driver = make()
    driver.add(request("a", tokens=10))
    driver.run()
    driver.now_s += 60.0
    driver.add(request("b", tokens=10))
    driver.run()
    endings = [record["ending"] for record in driver.taper.records]
    assert endings == ["ignored"] * 4 + ["clean"] * 6 + ["ignored"] + ["clean"] * 9


def test_the_controller_learns_from_what_the_engine_ran(make):
    driver = make(config=server_config(policy="eager"))
    driver.add(*fork("p", 4, tokens=60))
    driver.run()
    assert driver.taper.controller.latency.scale > 1.2  # predicted 14 ms, measured 20
    assert PROFILE["coefficients"]["base_s"] == 0.01

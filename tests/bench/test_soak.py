"""The account of a soak: slopes, classes, and clients that give up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.soak import BRANCHING, memory, metrics_of

from taper.bench.client import LoadClient, Sending
from taper.bench.soak import SoakClient, abort_after_s, by_class, by_minute, outcome, share_of, slope_of
from taper.core.types import Slo
from taper.goodput import Window
from taper.records import ChoiceRecord, RequestRecord
from taper.workload import Request
from tests.bench.server import FakeEngine, serving

CLASSES = {"interactive": 1.0, "batch": 3.0}
SLO_S = 0.05
RECORD = RequestRecord(
    id="a", policy="taper", round=0, seed=0, index=0, kind="serial", branches=1, prompt_tokens=9, scheduled_s=0.0,
    sent_s=0.0, ended_s=10.0, tpot_slo_s=SLO_S,
)  # fmt: skip


def record(tpot_s: float = 0.04, error: str | None = None, factor: float = 1.0, ended_s: float = 10.0) -> RequestRecord:
    choice = ChoiceRecord(index=0, tokens=11, first_token_s=1.0, last_token_s=1.0 + 10 * tpot_s)
    return replace(RECORD, choices=(choice,), error=error, tpot_slo_s=SLO_S * factor, ended_s=ended_s)


def run(requests: Sequence[Request], *, patience_s: float, abort_share: float, late_s: float) -> list[RequestRecord]:
    async def session() -> list[RequestRecord]:
        async with serving(FakeEngine()) as url, LoadClient(base_url=f"{url}/v1", model="m") as load:
            client = SoakClient(load, patience_s=patience_s, abort_share=abort_share, step_s=0.002)
            now_s = client.clock()
            sending = Sending(
                policy="taper", round=0, slo=Slo(tpot_s=SLO_S), scheduled_s=now_s - late_s, deadline_s=now_s + 60
            )
            return await asyncio.gather(*(client.run(one, sending) for one in requests))

    return asyncio.run(session())


def test_a_line_is_found_with_its_error_and_the_warm_up_left_out() -> None:
    times = [5.0 * at for at in range(1, 361)]
    rng = np.random.default_rng(0)
    steep = [1000.0 * at_s if at_s < 300 else 500 + 36 * at_s / 3600 + rng.normal(0, 0.1) for at_s in times]
    slope = slope_of(times, steep, after_s=300.0)
    assert slope is not None
    assert slope.minutes == 26  # 300 s to 1800 s, of which the last is a minute of its own
    assert slope.stderr_per_hour is not None
    assert 0 < slope.stderr_per_hour < 1
    assert abs(slope.per_hour - 36) < 3 * slope.stderr_per_hour


def test_an_exact_line_has_no_error_and_too_few_minutes_have_none_to_tell() -> None:
    slope = slope_of([30.0, 90.0, 150.0], [1.0, 2.0, 3.0], after_s=0.0)
    assert slope is not None
    assert (slope.mean, slope.per_hour, slope.stderr_per_hour) == pytest.approx((2.0, 60.0, 0.0))
    two = slope_of([30.0, 90.0], [1.0, 2.0], after_s=0.0)
    assert two is not None
    assert two.stderr_per_hour is None
    assert slope_of([30.0, 40.0], [1.0, 2.0], after_s=0.0) is None
    assert slope_of([30.0, 90.0], [1.0, 2.0], after_s=60.0) is None


def test_rejections_are_misses_of_all_offered_and_aborts_are_in_no_attainment() -> None:
    share = share_of(
        [
            record(),
            record(tpot_s=0.06),
            record(error="http 500: out"),
            record(error="aborted: by its client"),
            *[record(error="rejected: waited")] * 2,
        ]
    )
    assert (share.offered, share.rejected, share.aborted, share.failed, share.met) == (6, 2, 1, 1, 1)
    assert share.attainment == pytest.approx(1 / 3)
    assert share.attainment_offered == pytest.approx(1 / 5)
    assert share.tpot_p50_s == pytest.approx(0.05)
    assert share_of([]).attainment is None


def test_requests_are_told_apart_by_class_and_minute() -> None:
    records = [record(tpot_s=0.1), record(tpot_s=0.1, factor=3.0, ended_s=70.0)]
    everything = Window(start_s=0.0, end_s=100.0)
    rows = {(row["class"], row["kind"]): row for row in by_class(records, CLASSES, slo_tpot_s=SLO_S, window=everything)}
    assert rows["interactive", "serial"]["attainment"] == 0
    assert rows["batch", "all"]["attainment"] == 1
    assert rows["batch", "branching"]["offered"] == 0
    late = by_class(records, CLASSES, slo_tpot_s=SLO_S, window=Window(start_s=60.0, end_s=100.0))
    assert [row["offered"] for row in late if row["kind"] == "all"] == [0, 1]
    minutes = by_minute(records, CLASSES, slo_tpot_s=SLO_S, begin_s=0.0)
    assert [(row["minute"], row["class"], row["kind"]) for row in minutes] == [
        (0, "interactive", "serial"),
        (1, "batch", "serial"),
    ]


def test_who_aborts_follows_from_the_request_and_lies_inside_its_stream() -> None:
    requests = [Request(seed=1, index=index, arrival_s=0.0, prompt_tokens=9, stages=((100,),)) for index in range(2000)]
    after = [abort_after_s(one, share=0.05, step_s=0.02) for one in requests]
    assert after == [abort_after_s(one, share=0.05, step_s=0.02) for one in requests]
    chosen = [one for one in after if one is not None]
    assert len(chosen) == pytest.approx(100, abs=30)
    assert 0 <= min(chosen) < 0.3
    assert 1.7 < max(chosen) < 2.0


def test_a_request_that_waited_too_long_is_rejected_and_not_sent() -> None:
    one = Request(seed=1, index=4, arrival_s=0.0, prompt_tokens=9, stages=((5,),), slo_factor=3.0)
    (rejected,) = run([one], patience_s=2.0, abort_share=0.0, late_s=2.5)
    assert outcome(rejected) == "rejected"
    assert (rejected.tokens, rejected.index, rejected.tpot_slo_s) == (0, 4, pytest.approx(3 * SLO_S))
    (served,) = run([one], patience_s=2.0, abort_share=0.0, late_s=1.0)
    assert (outcome(served), served.tokens) == (None, 5)


def test_an_aborting_client_leaves_in_mid_stream() -> None:
    requests = [Request(seed=1, index=index, arrival_s=0.0, prompt_tokens=9, stages=((1000,),)) for index in range(3)]
    records = run(requests, patience_s=60.0, abort_share=1.0, late_s=0.0)
    assert [outcome(one) for one in records] == ["aborted"] * 3
    assert all(one.tokens < 1000 for one in records)


def test_half_of_the_branching_requests_fork_and_join() -> None:
    rng = np.random.default_rng(0)
    shapes = [BRANCHING.scaled(0.5).stages(rng, 100) for _ in range(200)]
    assert 60 < sum(len(stages) == 1 for stages in shapes) < 140
    assert {len(stages) for stages in shapes} == {1, 5}
    assert max(max(stages[0]) for stages in shapes if len(stages) == 1) <= 36


def test_metrics_are_summed_over_labels_and_memory_is_told_by_process() -> None:
    text = '# HELP x\nvllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 3.0\nother 1\n'
    assert metrics_of(text) == {"vllm:num_requests_running": 5.0}
    process = {"rss_mib": 10.0, "pss_mib": 9.0, "fds": 5, "threads": 3}
    samples = [{"at_s": 30.0 + 60 * at, "processes": {"engine": {**process, "rss_mib": 10.0 + at}}} for at in range(5)]
    found = memory(samples, after_s=60.0, until_s=240.0)
    assert found["engine"]["samples"] == 4
    assert found["engine"]["rss_mib"]["per_hour"] == pytest.approx(60)
    assert found["engine"]["fds"]["per_hour"] == 0

"""A window: open loop, bounded service, the same for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from taper.bench.client import LoadClient
from taper.bench.control import ControlError
from taper.bench.driver import Progress, WindowPlan, WindowResult, run_window
from taper.core.types import Slo
from taper.workload import Arrivals, Branching, Lengths, Mix, Regime, Synthetic
from tests.bench.server import Body, FakeEngine, serving, steady

SOURCE = Synthetic(
    arrivals=Arrivals(cv=0.0),
    mix=Mix(
        branching_share=0.5,
        serial=Lengths(low=5, high=10),
        branching=Branching(at_arrival=True, equal=True, fanout=Lengths(low=2, high=3), branch=Lengths(low=5, high=10)),
    ),
)


def drive(
    engine: FakeEngine,
    *,
    rate_rps: float,
    concurrency: int,
    plan: WindowPlan,
    progress: Progress | None = None,
    slo_classes: tuple[tuple[float, float], ...] = (),
) -> WindowResult:
    source = replace(SOURCE, mix=replace(SOURCE.mix, slo_classes=slo_classes))
    regime = Regime(name="t", source=source, rate_rps=rate_rps, max_concurrency=concurrency, slo=Slo(tpot_s=0.5))
    planned = tuple(source.requests(seed=5, rate_rps=rate_rps, horizon_s=plan.load_s))

    async def session() -> WindowResult:
        async with serving(engine) as url, LoadClient(base_url=f"{url}/v1", model="m") as client:
            return await run_window(
                client, planned, regime=regime, plan=plan, policy="taper", round_=1, progress=progress
            )

    return asyncio.run(session())


def test_arrivals_do_not_wait_for_answers() -> None:
    async def together(body: Body) -> AsyncIterator[bytes]:
        while engine.peak < 24:
            await asyncio.sleep(0.01)
        async for data in steady(body):
            yield data

    engine, progress = FakeEngine(script=together), Progress()
    plan = WindowPlan(ramp_s=0.25, measure_s=1.0, drain_s=120.0)
    result = drive(engine, rate_rps=20.0, concurrency=50, plan=plan, progress=progress)
    assert len(result.records) == 24  # every 50 ms, before 1.25 s
    assert result.unserved == 0
    assert [record.index for record in result.records] == list(range(24))
    assert all(record.error is None for record in result.records)
    assert all(record.sent_s > record.scheduled_s - 0.01 for record in result.records)
    assert engine.peak == 24  # all were there before the first answer
    assert result.window.seconds == pytest.approx(1.0)
    assert progress.finished == 24
    assert progress.in_service == 0
    assert len({body["cache_salt"] for body in engine.requests}) == 1


def test_concurrency_is_bounded_and_what_waits_at_the_end_is_not_sent() -> None:
    engine = FakeEngine()
    plan = WindowPlan(ramp_s=0.1, measure_s=0.5, drain_s=120.0)
    result = drive(engine, rate_rps=400.0, concurrency=2, plan=plan)
    assert engine.peak == 2
    assert result.unserved > 0
    assert len(result.records) + result.unserved == pytest.approx(239, abs=1)  # every 2.5 ms, before 0.6 s
    assert all(record.sent_s < result.window.end_s + 1.0 for record in result.records)
    waits = [record.sent_s - record.scheduled_s for record in result.records]
    assert waits[-1] > waits[0]


async def never(body: Body) -> AsyncIterator[bytes]:
    yield b": nothing yet\n\n"
    await asyncio.sleep(3600)


def test_what_does_not_finish_in_the_drain_is_a_time_out() -> None:
    plan = WindowPlan(ramp_s=0.0, measure_s=0.3, drain_s=0.3)
    result = drive(FakeEngine(script=never), rate_rps=10.0, concurrency=10, plan=plan)
    assert [str(record.error)[:8] for record in result.records] == ["time-out", "time-out"]
    assert result.drained_s >= 0.29


def test_a_server_that_lets_no_client_claim_the_slos_of_the_load_is_an_error() -> None:
    engine = FakeEngine(status=400, message="taper_tpot_slo_ms must be at least 500, not 250.0")
    plan = WindowPlan(ramp_s=0.0, measure_s=0.4, drain_s=120.0)
    with pytest.raises(ControlError, match=r"limits\.tightest_slo.*at least 500"):
        drive(engine, rate_rps=40.0, concurrency=16, plan=plan, slo_classes=((0.5, 0.5),))


@pytest.mark.parametrize(("classes", "claimed"), [((), {None}), (((0.5, 2.0),), {500.0, 1000.0})])
def test_slos_are_claimed_where_they_differ(
    classes: tuple[tuple[float, float], ...], claimed: set[float | None]
) -> None:
    engine = FakeEngine()
    plan = WindowPlan(ramp_s=0.0, measure_s=0.4, drain_s=120.0)
    drive(engine, rate_rps=40.0, concurrency=16, plan=plan, slo_classes=classes)
    assert {body.get("vllm_xargs", {}).get("taper_tpot_slo_ms") for body in engine.requests} == claimed

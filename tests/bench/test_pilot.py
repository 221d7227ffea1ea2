"""The look before the run: how steps under load compare with the calibrated law."""

from __future__ import annotations

import asyncio

import pytest

from taper.bench.campaign import Campaign
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import WindowPlan
from taper.bench.pilot import measured_scale, scale_of
from taper.core.latency import LinearLatency
from taper.core.types import Slo
from taper.goodput import Window
from taper.workload import Regime, Synthetic
from tests.bench.server import FakeEngine, serving

LAW = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0)
WINDOW = Window(start_s=10.0, end_s=20.0)


def step(time_s: float, measured_s: float | None, ending: str = "clean") -> dict[str, object]:
    load = {"rows": 10, "context_tokens": 500, "prefill_tokens": 0}  # 20 ms by the law
    return {"time_s": time_s, "measured_s": measured_s, "ending": ending, **load}


def test_scale_is_measured_over_predicted_inside_the_window() -> None:
    inside = [step(10.0 + index / 10, 0.030) for index in range(40)]
    others = [step(9.9, 9.0), step(20.0, 9.0), step(11.0, None), step(11.0, 9.0, "ignored")]
    assert scale_of([*inside, *others], LAW, WINDOW) == pytest.approx(1.5)


def test_a_handful_of_steps_says_nothing() -> None:
    assert scale_of([step(11.0, 0.03)] * 9, LAW, WINDOW) is None
    assert scale_of([], LAW, WINDOW) is None


def test_a_server_that_refuses_everything_is_found_out_early() -> None:
    regime = Regime(name="t", source=Synthetic(), rate_rps=5.0, max_concurrency=4, slo=Slo())
    campaign = Campaign(regime=regime, policies=("off",), rounds=1, seed=0, plan=WindowPlan())

    async def session() -> float:
        async with (
            serving(FakeEngine(status=503)) as url,
            LoadClient(base_url=f"{url}/v1", model="m") as client,
            ControlClient(url=url) as control,
        ):
            return await measured_scale(campaign, LAW, client=client, control=control)

    with pytest.raises(ControlError, match="every warm-up request failed, the first with: http 503"):
        asyncio.run(session())

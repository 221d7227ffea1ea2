"""A short unmeasured look at the machine: warms it up, and says how its steps compare with the law.

The calibrated law prices the step alone. Under load the server's and the client's own work share the cores,
sampling costs more than in a calibration, and a machine may be slower today than when its profile was made. A
load and an SLO derived from the law therefore start from the law times what was measured over what it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from taper.bench.campaign import Campaign, planned_requests
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import WindowPlan, run_window
from taper.bench.measure import switch
from taper.core.latency import LinearLatency
from taper.goodput import Window

_PLAN = WindowPlan(ramp_s=2.0, measure_s=4.0, drain_s=40.0)
_POLICIES = ("off", "eager")
_FEWEST_STEPS = 10


async def measured_scale(
    campaign: Campaign, law: LinearLatency, *, client: LoadClient, control: ControlClient
) -> float:
    """Measured step time over the law's, under a few seconds of the campaign's load with off and with eager.

    1.0 where the engine kept too few step records. Raises ControlError when every request fails.
    """
    ratios = []
    for policy in _POLICIES:
        steps, window = await _window(campaign, policy, client, control)
        ratio = scale_of(steps, law, window)
        if ratio is not None:
            ratios.append(ratio)
    return math.prod(ratios) ** (1 / len(ratios)) if ratios else 1.0


def scale_of(steps: Iterable[Mapping[str, Any]], law: LinearLatency, window: Window) -> float | None:
    """Sum of measured over sum of predicted seconds of the steps inside the window; None below 10 steps."""
    measured_s = predicted_s = 0.0
    count = 0
    for step in steps:
        seconds = step.get("measured_s")
        if seconds is None or step.get("ending") == "ignored":
            continue
        if window.start_s <= step["time_s"] < window.end_s:
            measured_s += seconds
            predicted_s += law.predict(step["rows"], step["context_tokens"], step["prefill_tokens"])
            count += 1
    return measured_s / predicted_s if count >= _FEWEST_STEPS else None


async def _window(
    campaign: Campaign, policy: str, client: LoadClient, control: ControlClient
) -> tuple[list[dict[str, Any]], Window]:
    await switch(policy, campaign.regime.slo, control)
    await control.steps()
    short = replace(campaign, plan=_PLAN)
    planned = planned_requests(short, campaign.rounds)  # a sequence that no measured round uses
    result = await run_window(client, planned, regime=campaign.regime, plan=_PLAN, policy=policy, round_=-1)
    failed = [record for record in result.records if record.error]
    if result.records and len(failed) == len(result.records):
        raise ControlError(f"every warm-up request failed, the first with: {failed[0].error}")
    steps = [step for engine in await control.steps() for step in engine]
    await control.until_idle()
    return steps, result.window

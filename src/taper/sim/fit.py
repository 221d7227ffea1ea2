"""From the records of a bench run to a `Hardware`: the law while a server serves, the noise, the ways in and out.

The law is fitted as a calibration's is, to what steps took without their decision. It differs from a calibration's
where the server's and the client's own work share the cores with the model: there a row costs more. The rest comes
from the windows' steps in their order, their times and the client's on one clock:

    planner_s   mean time of a decision, over the steps that took one
    noise       standard deviation of log(measured / law) around the window's mean
    slow part   its autocorrelation r(k) = slow_share * exp(-k / slow_steps), through r(2) and r(10)
    turnaround  last token's step end -> the client has the answer, and sending -> the first step of an idle engine
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from taper.core.calibration import Samples, fit
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Floats
from taper.records import RequestRecord, StepRecord
from taper.sim.hardware import Hardware

NEAR, FAR = 2, 10  # steps: lags at which the autocorrelation is read; at 1 a step also pays for the last one
FEWEST_STEPS = 1000


def fitted(steps: Sequence[StepRecord], requests: Iterable[RequestRecord], like: Hardware) -> Hardware:
    """The machine that made these records; KV, slots and usual lengths are those of `like`.

    Raises `ConfigError` for fewer than a thousand usable steps.
    """
    clean = clean_steps(steps)
    if len(clean) < FEWEST_STEPS:
        raise ConfigError(f"{len(clean)} clean steps, fewer than {FEWEST_STEPS}: run taper bench with --steps")
    law = fit(_samples(clean), capture_sizes=like.capture_sizes).latency
    return replace(
        _beside(steps, requests, law, like),
        base_s=law.base_s,
        row_s=law.row_s,
        context_s=law.context_s,
        prefill_s=law.prefill_s,
        knee_rows=law.knee_rows,
        steep_s=law.steep_s,
    )


def _samples(steps: Sequence[StepRecord]) -> Samples:
    return Samples(
        rows=np.array([step.rows for step in steps]),
        context_tokens=np.array([step.context_tokens for step in steps]),
        prefill_tokens=np.array([step.prefill_tokens for step in steps]),
        measured_s=np.array([executed_s(step) for step in steps]),
    )


def clean_steps(steps: Iterable[StepRecord]) -> list[StepRecord]:
    """Those whose measured time says something about their load."""
    return [step for step in steps if step.ending == "clean" and step.measured_s]


def executed_s(step: StepRecord) -> float:
    """Measured time without the decision, which is part of it where an engine decides between steps. Never 0."""
    return max((step.measured_s or 0.0) - (step.planner_s or 0.0), 1e-9)


def _beside(
    steps: Iterable[StepRecord], requests: Iterable[RequestRecord], law: LinearLatency, like: Hardware
) -> Hardware:
    """`like` with what no law knows."""
    windows: dict[str, list[StepRecord]] = {}
    for step in steps:
        windows.setdefault(step.window, []).append(step)
    for records in windows.values():
        records.sort(key=lambda step: step.step)
    planned_s, residuals = [], []
    for records in windows.values():
        clean = clean_steps(records)
        planned_s += [step.planner_s for step in clean if step.planner_s]
        logs = [
            math.log(executed_s(step) / law.predict(step.rows, step.context_tokens, step.prefill_tokens))
            for step in clean
        ]
        if len(logs) > FAR:
            residuals.append(np.array(logs) - statistics.fmean(logs))
    if not residuals:
        raise ConfigError(f"no window has more than {FAR} clean steps")
    near, far = (_autocorrelation(residuals, lag) for lag in (NEAR, FAR))
    if 0 < far < near:
        slow_steps = (FAR - NEAR) / math.log(near / far)
        slow_share = min(1.0, near * math.exp(NEAR / slow_steps))
    else:
        slow_steps, slow_share = 1.0, 0.0
    return replace(
        like,
        planner_s=statistics.fmean(planned_s) if planned_s else 0.0,
        turnaround_s=_turnaround_s(windows, requests),
        noise=float(np.concatenate(residuals).std()),
        slow_share=slow_share,
        slow_steps=slow_steps,
    )


def _autocorrelation(series: Sequence[Floats], lag: int) -> float:
    """Pooled over series with mean zero."""
    products = sum(float(one[lag:] @ one[:-lag]) for one in series) / sum(len(one) - lag for one in series)
    return products / (sum(float(one @ one) for one in series) / sum(map(len, series)))


def _turnaround_s(windows: Mapping[str, Sequence[StepRecord]], requests: Iterable[RequestRecord]) -> float:
    """Median way out plus median way in; 0 for a way that no request shows."""
    starts_s = {window: [step.time_s for step in steps] for window, steps in windows.items()}
    ends_s = {window: [step.time_s + (step.measured_s or 0.0) for step in steps] for window, steps in windows.items()}
    out_s, in_s = [], []
    for one in requests:
        if one.error is not None or not one.choices or one.window not in windows:
            continue
        starts, ends = starts_s[one.window], ends_s[one.window]
        last = bisect_right(ends, max(choice.last_token_s for choice in one.choices))
        if last:
            out_s.append(one.ended_s - ends[last - 1])
        first = bisect_left(starts, one.sent_s)
        if first < len(starts) and (first == 0 or ends[first - 1] < one.sent_s):
            in_s.append(starts[first] - one.sent_s)
    return sum(statistics.median(way) for way in (out_s, in_s) if way)

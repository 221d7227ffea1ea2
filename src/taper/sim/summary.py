"""Run -> the figures every table shows: the client's from `taper.goodput`, the engine's from the steps."""

from __future__ import annotations

from array import array
from dataclasses import asdict, dataclass

import numpy as np

from taper import goodput
from taper.goodput import Window
from taper.sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run of one policy."""

    policy: str
    seed: int
    client: goodput.Summary
    step_mean_s: float
    step_p99_s: float
    rows_mean: float
    requests_mean: float
    prefill_mean_tokens: float
    predictor_mape: float
    steps: int
    wall_s: float  # drain included

    def as_dict(self) -> dict[str, float | str | None]:
        """Flat, for tables and JSON."""
        flat = asdict(self)
        return {**flat.pop("client"), **flat}


def summarise(trace: Trace, window: Window, *, policy: str, seed: int) -> Summary:
    """Figures over the window; requests in service in it are judged over their whole life."""
    ends = np.array(trace.end_s)
    inside = (ends >= window.start_s) & (ends < window.end_s)
    if not inside.any():
        raise ValueError("no step ended inside the window: the run is too short for its ramp")
    step_s = np.array(trace.step_s)[inside]
    predicted_s = np.array(trace.predicted_s)[inside]

    def mean(per_step: array[int]) -> float:
        return float(np.array(per_step)[inside].mean())

    return Summary(
        policy=policy,
        seed=seed,
        client=goodput.summarize(trace.records, window),
        step_mean_s=float(step_s.mean()),
        step_p99_s=float(np.percentile(step_s, 99)),
        rows_mean=mean(trace.rows),
        requests_mean=mean(trace.requests),
        prefill_mean_tokens=mean(trace.prefill_tokens),
        predictor_mape=float(np.abs(predicted_s / step_s - 1).mean()),
        steps=len(ends),
        wall_s=float(ends[-1]),
    )

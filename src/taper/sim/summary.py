"""Trace -> the figures of a results file: the client's from `taper.goodput`, the engine's from the steps."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np

from taper import goodput
from taper.core.types import Floats
from taper.goodput import Window
from taper.records import RequestRecord
from taper.results import Conditions, EngineStats, Run
from taper.sim.trace import Trace, gap_percentile_s


def summarise(conditions: Conditions, records: list[RequestRecord], traces: list[Trace], window: Window) -> Run:
    """One run of one or several replicas. Figures over the window; requests in service in it are judged over their
    whole life. Inter-token gaps are those whose second token came inside it.

    Raises ValueError where no step ended inside: the run is too short for its ramp.
    """
    engine = _engine(traces, window)
    client = replace(goodput.summarize(records, window), itl_p99_s=gap_percentile_s(traces, 99, window))
    return Run(conditions=conditions, summary=client, engine=engine)


def _engine(traces: list[Trace], window: Window) -> EngineStats:
    inside = [trace.inside(window) for trace in traces]
    if not any(mask.any() for mask in inside):
        raise ValueError("no step ended inside the window: the run is too short for its ramp")

    def column(name: str) -> Floats:
        steps: list[array[float]] = [getattr(trace, name) for trace in traces]
        return np.concatenate([np.array(one, dtype=np.float64)[mask] for one, mask in zip(steps, inside, strict=True)])

    step_s, predicted_s = column("step_s"), column("predicted_s")
    return EngineStats(
        predictor_mape=float(np.abs(predicted_s / step_s - 1).mean()),
        steps=sum(len(trace.end_s) for trace in traces),
        step_mean_s=float(step_s.mean()),
        step_p99_s=float(np.percentile(step_s, 99)),
        rows_mean=float(column("rows").mean()),
        requests_mean=float(column("requests").mean()),
        deferred_mean=float(column("deferred").mean()),
        preemptions=sum(trace.preemptions for trace in traces),
        recomputed_tokens=sum(trace.recomputed_tokens for trace in traces),
        unserved=sum(trace.unserved for trace in traces),
        drained_s=max(0.0, max(trace.end_s[-1] for trace in traces if trace.end_s) - window.end_s),
    )

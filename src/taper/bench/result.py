"""What came out of a window, and what several rounds of windows say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from taper.bench.driver import WindowResult
from taper.bench.machine import CpuShare
from taper.goodput import Spread, Summary, Window, paired_ratios, spread, summarize
from taper.results import Conditions, EngineStats, Run


def engine_stats(
    snapshots: Sequence[Mapping[str, Any]], steps: Iterable[Sequence[Mapping[str, Any]]], window: Window
) -> EngineStats:
    """Statistics of one window from the snapshots and the step records of all engine replicas.

    Step means are over the steps that started inside the window; of several replicas the worst
    planner counts.
    """
    windows = [snapshot.get("window") or {} for snapshot in snapshots]
    inside = [one for engine in steps for one in engine if window.start_s <= one["time_s"] < window.end_s]
    measured = [one["measured_s"] for one in inside if one.get("measured_s") is not None]
    return EngineStats(
        planner_p50_s=_worst(windows, "planner_p50_s"),
        planner_p99_s=_worst(windows, "planner_p99_s"),
        predictor_mape=_worst(windows, "predictor_mape"),
        fallbacks=sum(one.get("fallbacks") or 0 for one in windows) if windows else None,
        steps=len(inside),
        step_mean_s=float(np.mean(measured)) if measured else None,
        step_p99_s=float(np.percentile(measured, 99)) if measured else None,
        rows_mean=_mean(inside, "rows"),
        extra_mean=_mean(inside, "extra"),
        deferred_mean=_mean(inside, "deferred"),
    )


def run_result(
    result: WindowResult,
    *,
    conditions: Conditions,
    snapshots: Sequence[Mapping[str, Any]],
    steps: Iterable[Sequence[Mapping[str, Any]]],
    cpu: CpuShare | None,
) -> Run:
    return Run(
        conditions=conditions,
        summary=summarize(result.records, result.window),
        engine=replace(
            engine_stats(snapshots, steps, result.window),
            unserved=result.unserved,
            drained_s=result.drained_s,
            foreign_cpu=cpu.foreign if cpu else None,
            client_cpu=cpu.client if cpu else None,
        ),
    )


_SUMMARY_FIELDS = frozenset(spec.name for spec in fields(Summary))


def metric(run: Run, name: str) -> float | None:
    value = getattr(run.summary if name in _SUMMARY_FIELDS else run.engine, name)
    return None if value is None else float(value)


def over_rounds(runs: Iterable[Run], policy: str, name: str) -> Spread | None:
    """A metric's median and spread over the rounds of one policy."""
    return spread(metric(run, name) for run in runs if run.policy == policy)


def ratio_over_rounds(runs: Sequence[Run], name: str, above: str, below: str) -> Spread | None:
    """The spread of `above` / `below`, taken within each round."""

    def by_round(policy: str) -> dict[int, float | None]:
        return {run.round: metric(run, name) for run in runs if run.policy == policy}

    return spread(paired_ratios(by_round(above), by_round(below)).values())


def _worst(windows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((one[name] for one in windows if one.get(name) is not None), default=None)


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return float(np.mean([one[name] for one in steps])) if steps else None

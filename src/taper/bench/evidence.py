"""Output folders and results files -> the small tables that the figures are drawn from. Pure but for the reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taper.core.types import ConfigError
from taper.goodput import spread
from taper.records import RecordError, RequestRecord, StepRecord, request_file, step_file
from taper.results import Conditions, Run, read_runs

Row = dict[str, Any]  # one line of a table: column -> number or word
MS_PER_S = 1000.0
_QUANTILES = tuple(at / 100 for at in range(1, 100))
_BINS = 120  # of the time axis
_DOTS = 400  # steps drawn per policy
_MISSES = ("error", "ttft", "tpot")
METRICS = (
    "goodput_tok_s", "raw_tok_s", "attainment", "attainment_serial", "attainment_branching", "ttft_p95_s", "tpot_p50_s",
    "tpot_p95_s", "itl_p99_s", "victim_tpot_p95_s", "planner_p99_s", "predictor_mape",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Runs, and the folders in which their records lie."""

    runs: tuple[Run, ...]
    folders: tuple[Path, ...]

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.policy for run in self.runs))

    @property
    def accepted(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.conditions.accepted)


def gather(paths: Sequence[Path]) -> Evidence:
    """Raises ConfigError for a path that is neither an output folder of a bench nor a results file, or has no run."""
    runs: list[Run] = []
    folders: list[Path] = []
    for path in paths:
        runs += read_runs(path / "runs.json" if path.is_dir() else path)
        if path.is_dir():
            folders.append(path)
    if not any(run.conditions.accepted for run in runs):
        raise ConfigError(f"{', '.join(map(str, paths))}: no accepted run to draw")
    return Evidence(runs=tuple(runs), folders=tuple(folders))


def panel(conditions: Conditions) -> str:
    """Everything but policy, load and round, in words: runs of one panel are compared."""
    parts = [conditions.scenario, conditions.hardware]
    if conditions.replicas > 1:
        parts.append(f"{conditions.replicas} replicas, {conditions.router}")
    if conditions.share is not None:
        parts.append(f"{conditions.share:.0%} branching")
    if conditions.slo_at is not None:
        parts.append(f"SLO at {conditions.slo_at:g}")
    elif conditions.slo_tpot_s is not None and conditions.scenario is None:
        parts.append(f"SLO {conditions.slo_tpot_s * MS_PER_S:.0f} ms")
    return ", ".join(part for part in parts if part) or "all runs"


LOAD_UNITS = {  # of `taper bench` and the scenario that simulates it, and of the scenarios in files
    "law": "what fits the SLO by the law",
    "scenario": "what is served half-way between off and eager",
}


def abscissa(runs: Sequence[Run]) -> tuple[str, str]:
    """Which field of the conditions is the load axis, and its title."""
    if all(run.conditions.load is not None for run in runs):
        units = {"law" if run.conditions.scenario in (None, "contended") else "scenario" for run in runs}
        of = LOAD_UNITS[units.pop()] if len(units) == 1 else "each panel's own unit"
        return "load", f"offered load, × {of}"
    return "rate_rps", "offered load, requests/s"


def medians(evidence: Evidence) -> list[Row]:
    """A row per panel, load and policy: `NAME`, `NAME_low` and `NAME_high` over the accepted rounds."""
    axis, _ = abscissa(evidence.accepted)
    groups: dict[tuple[str, float, str], list[Run]] = {}
    for run in evidence.accepted:
        at = getattr(run.conditions, axis) or 0.0
        groups.setdefault((panel(run.conditions), at, run.policy), []).append(run)
    rows = []
    for (where, load, policy), runs in groups.items():
        row: Row = {"panel": where, "load": load, "policy": policy, "rounds": len(runs)}
        for name in METRICS:
            over = spread(_value(run, name) for run in runs)
            for suffix, value in (
                ("", over and over.median),
                ("_low", over and over.low),
                ("_high", over and over.high),
            ):
                row[name + suffix] = value
        bound = spread(run.conditions.bound_tok_s for run in runs)
        row["bound_tok_s"] = bound.median if bound else None
        rows.append(row)
    return rows


def pairs(evidence: Evidence) -> list[Row]:
    """A row per load, share, SLO and policy that was both measured and simulated: medians over the rounds of both."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    for run in evidence.accepted:
        at = run.conditions
        key = (at.share, at.rate_rps, at.slo_tpot_s, at.concurrency, at.policy)
        side = "measured" if at.hardware is None else "simulated"
        groups.setdefault(key, {"measured": [], "simulated": []})[side].append(run)
    rows: list[Row] = []
    for sides in groups.values():
        if sides["measured"] and sides["simulated"]:
            at = sides["measured"][0].conditions
            row: Row = {"policy": at.policy, "load": at.load, "share": at.share}
            for name in ("goodput_tok_s", "attainment"):
                for side, runs in sides.items():
                    over = spread(_value(run, name) for run in runs)
                    row[f"{name}_{side}"] = over.median if over else 0.0
            rows.append(row)
    return rows


def misses(evidence: Evidence) -> list[Row]:
    """A row per panel, load, policy and cause: share of the judged requests that missed for it."""
    axis, _ = abscissa(evidence.accepted)
    totals: dict[tuple[str, float, str], list[int]] = {}
    for run in evidence.accepted:
        key = (panel(run.conditions), getattr(run.conditions, axis) or 0.0, run.policy)
        counts = totals.setdefault(key, [0, 0, 0, 0])
        counts[0] += run.summary.judged
        for at, cause in enumerate(_MISSES, start=1):
            counts[at] += getattr(run.summary, f"misses_{cause}")
    return [
        {"panel": where, "load": load, "policy": policy, "cause": cause, "share": count / judged}
        for (where, load, policy), (judged, *counts) in totals.items()
        if judged
        for cause, count in zip(_MISSES, counts, strict=True)
    ]


def busiest(evidence: Evidence) -> tuple[str, dict[str, Run]]:
    """The panel and load with the highest load that has records, in words, and its windows of all rounds."""
    axis, _ = abscissa(evidence.accepted)
    recorded = [run for run in evidence.accepted if run.conditions.window]
    if not recorded or not evidence.folders:
        return "", {}
    top = max(recorded, key=lambda run: (getattr(run.conditions, axis) or 0.0, run.conditions.share or 0.0)).conditions
    chosen = {
        run.conditions.window: run
        for run in recorded
        if panel(run.conditions) == panel(top) and getattr(run.conditions, axis) == getattr(top, axis)
    }
    return f"{panel(top)}, load {getattr(top, axis):g}", chosen


def distributions(evidence: Evidence, windows: dict[str, Run]) -> list[Row]:
    """Percentiles per policy of effective TPOT, TTFT and each request's longest-but-one-per-cent gap between chunks."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in _requests(evidence, windows):
        gaps = [choice.itl_p99_s for choice in record.choices if choice.itl_p99_s is not None]
        for name, seconds in (("TPOT", record.tpot_s), ("TTFT", record.ttft_s), ("gap", max(gaps, default=None))):
            if seconds is not None:
                values.setdefault((record.policy, name), []).append(seconds)
    return [
        {"policy": policy, "figure": name, "share": share, "seconds": float(value), "ms": float(value) * MS_PER_S}
        for (policy, name), known in values.items()
        for share, value in zip(_QUANTILES, np.quantile(known, _QUANTILES), strict=True)
    ]


def steps_of(evidence: Evidence, windows: dict[str, Run]) -> dict[str, list[StepRecord]]:
    """Per policy, the step records of its first window, in order."""
    first: dict[str, str] = {}
    for window, run in sorted(windows.items(), key=lambda one: one[1].round):
        first.setdefault(run.policy, window)
    found: dict[str, list[StepRecord]] = {policy: [] for policy in first}
    for step in _read(evidence, "steps.jsonl", step_file().read):
        if first.get(step.policy) == step.window:
            found[step.policy].append(step)
    return {policy: steps for policy, steps in found.items() if steps}


def timeline(steps: dict[str, list[StepRecord]]) -> list[Row]:
    """Means over equal bins of time: rows of each kind and the least slack, per policy."""
    rows = []
    for policy, records in steps.items():
        start_s = records[0].time_s
        width_s = max(0.1, (records[-1].time_s - start_s) / _BINS)
        bins: dict[int, list[StepRecord]] = {}
        for record in records:
            bins.setdefault(int((record.time_s - start_s) / width_s), []).append(record)
        for number, inside in bins.items():
            slacks = [one.slack_min_s for one in inside if one.slack_min_s is not None]
            at_s = (number + 0.5) * width_s
            for kind in ("protected", "extra", "deferred"):
                mean = float(np.mean([getattr(one, kind) for one in inside]))
                rows.append({"policy": policy, "time_s": at_s, "kind": kind, "rows": mean})
            if slacks:
                rows.append(
                    {"policy": policy, "time_s": at_s, "kind": "slack", "ms": float(np.mean(slacks)) * MS_PER_S}
                )
    return rows


def predictions(steps: dict[str, list[StepRecord]]) -> list[Row]:
    """Predicted and measured milliseconds of evenly chosen steps that were measured cleanly or ran over."""
    rows = []
    for policy, records in steps.items():
        known = [
            (one.predicted_s, one.measured_s, one)
            for one in records
            if one.predicted_s is not None and one.measured_s is not None and one.ending != "ignored"
        ]
        for predicted_s, measured_s, one in known[:: max(1, len(known) // _DOTS)]:
            rows.append(
                {
                    "policy": policy,
                    "predicted_ms": predicted_s * MS_PER_S,
                    "measured_ms": measured_s * MS_PER_S,
                    "rows": one.rows,
                    "prefill_tokens": one.prefill_tokens,
                }
            )
    return rows


def _value(run: Run, name: str) -> float | None:
    part = run.summary if hasattr(run.summary, name) else run.engine
    value = getattr(part, name)
    return None if value is None else float(value)


def _requests(evidence: Evidence, windows: dict[str, Run]) -> Iterator[RequestRecord]:
    return (one for one in _read(evidence, "requests.jsonl", request_file().read) if one.window in windows)


def _read(evidence: Evidence, name: str, read: Any) -> Iterator[Any]:
    for folder in evidence.folders:
        if (folder / name).exists():
            try:
                yield from read(folder / name)
            except RecordError as error:
                raise ConfigError(str(error)) from error


def policy_order(policies: Iterable[str]) -> list[str]:
    """From narrow to wide, ours last; the same in every figure."""
    known = ("stock", "off", "cap", "eager", "taper-paper", "taper")

    def rank(name: str) -> tuple[int, str]:
        stem = name.partition(":")[0]
        return (known.index(stem) if stem in known else len(known), name)

    return sorted(policies, key=rank)

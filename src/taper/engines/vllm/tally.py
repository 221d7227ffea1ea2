"""What one engine replica has done: counters since its start, and the last minutes second by second.

Both only ever add; one step costs a handful of additions. Who reads them computes rates and shares.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taper.core.types import Ending, FinishedRequest, Ints
from taper.engines.vllm.groups import Group
from taper.engines.vllm.meter import Step, finite

TIMELINE_S = 300
TTFT_SAMPLES = 512
MAX_WIDTH = 64  # wider requests count as this wide
WIDTH_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
STEP_BOUNDS_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
PLANNER_BOUNDS_S = (25e-6, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
CLASSES = ("serial", "branching")
CAUSES = ("extras", "baseline", "aborted")


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts per bucket, the last one for what lies above every bound, and the sum of all values."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def report(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass(slots=True, eq=False)
class ClassTally:
    """Requests of one class whose last branch ended."""

    met: int = 0
    unjudged: int = 0  # one token or none: they have no time per token
    missed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    ttft_missed: int = 0
    tokens: int = 0
    goodput_tokens: int = 0


@dataclass(slots=True, eq=False)
class Second:
    """Sums over the steps and the completions of one second of the engine's clock."""

    index: int
    steps: int = 0
    measured_s: float = 0.0
    longest_s: float = 0.0
    predicted_s: float = 0.0
    budget_s: float = 0.0
    budget_steps: int = 0  # steps that had a finite budget
    slack_min_s: float = math.inf
    rows: int = 0
    tokens: int = 0
    groups: int = 0
    deferred: int = 0
    held: int = 0
    met: list[int] = field(default_factory=lambda: [0, 0])  # by class
    missed: list[int] = field(default_factory=lambda: [0, 0])
    goodput_tokens: int = 0

    def row(self) -> list[float | None]:
        """As in `COLUMNS`."""
        steps = self.steps or 1
        has_steps = self.steps > 0
        return [
            self.index,
            self.steps,
            self.measured_s / steps if has_steps else None,
            self.longest_s if has_steps else None,
            self.predicted_s / steps if has_steps else None,
            self.budget_s / self.budget_steps if self.budget_steps else None,
            finite(self.slack_min_s),
            self.rows / steps,
            self.rows / self.groups if self.groups else None,
            self.deferred / steps,
            self.held / steps,
            self.tokens,
            *self.met,
            *self.missed,
            self.goodput_tokens,
        ]


# Means are over the steps of the second; `tokens` are those that its steps brought.
COLUMNS = (
    "second", "steps", "step_s", "step_max_s", "predicted_s", "budget_s", "slack_min_s", "rows", "width",
    "deferred", "held", "tokens", "met_serial", "met_branching", "missed_serial", "missed_branching",
    "goodput_tokens",
)  # fmt: skip


class Tally:
    """Counters of one engine replica. Times are seconds on the engine's clock."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.endings = dict.fromkeys((ending.value for ending in Ending), 0)
        self.row_steps = {"protected": 0, "extra": 0, "deferred": 0, "held": 0}
        self.measured = Histogram(STEP_BOUNDS_S)
        self.planner = Histogram(PLANNER_BOUNDS_S)
        self.predicted_s = 0.0
        self.externality_s = 0.0
        self.error_ratio = 0.0  # sum of |predicted - measured| / measured over clean steps
        self.classes = {name: ClassTally() for name in CLASSES}
        self.ttft_s: deque[float] = deque(maxlen=TTFT_SAMPLES)
        self.seconds: deque[Second] = deque(maxlen=TIMELINE_S)
        self._widths: Ints = np.zeros(MAX_WIDTH + 1, dtype=np.int64)
        self._serial_rows = 0

    def widths(self, rows_per_request: Ints) -> None:
        """One planned step: how many rows each of its requests has."""
        self._widths += np.bincount(np.minimum(rows_per_request, MAX_WIDTH), minlength=MAX_WIDTH + 1)

    def serial(self, requests: int) -> None:
        """One step without a plan, in which no request has more than one row."""
        self._serial_rows += requests

    def step(self, step: Step, now_s: float) -> None:
        """A step came back at `now_s`."""
        self.endings[step.ending.value] += 1
        for role in self.row_steps:
            self.row_steps[role] += getattr(step, role)
        self.measured.add(step.measured_s)
        self.predicted_s += step.predicted_s
        self.externality_s += step.externality_s
        if step.planner_s:
            self.planner.add(step.planner_s)
        if step.ending is Ending.CLEAN:
            self.error_ratio += abs(step.predicted_s - step.measured_s) / step.measured_s
        second = self._second(now_s)
        second.steps += 1
        second.measured_s += step.measured_s
        second.longest_s = max(second.longest_s, step.measured_s)
        second.predicted_s += step.predicted_s
        if math.isfinite(step.budget_s):
            second.budget_s += step.budget_s
            second.budget_steps += 1
        if math.isfinite(step.slack_min_s):
            second.slack_min_s = min(second.slack_min_s, step.slack_min_s)
        second.rows += step.load.rows
        second.tokens += step.tokens
        second.groups += min(step.groups, step.load.rows)
        second.deferred += step.deferred
        second.held += step.held

    def closed(self, group: Group, finished: FinishedRequest | None, now_s: float) -> None:
        """A request's last branch ended; `finished` is None where one of them did not end well."""
        kind = CLASSES.index("branching" if group.is_branching else "serial")
        tally, tokens = self.classes[CLASSES[kind]], group.ended_tokens
        second = self._second(now_s)
        tally.tokens += tokens
        if not math.isnan(group.first_token_s):
            ttft_s = group.first_token_s - group.arrival_s
            self.ttft_s.append(ttft_s)
            tally.ttft_missed += ttft_s > group.claims.slo.ttft_s
        if not group.is_whole:
            cause = "aborted"
        elif finished is None or tokens < 2:
            tally.unjudged += 1
            return
        elif finished.met:
            tally.met += 1
            tally.goodput_tokens += tokens
            second.met[kind] += 1
            second.goodput_tokens += tokens
            return
        else:
            without_extras = replace(finished, residence_s=finished.residence_s - finished.externality_s)
            cause = "extras" if without_extras.met else "baseline"
        tally.missed[cause] += 1
        second.missed[kind] += 1

    def counters(self) -> dict[str, Any]:
        """Everything since the start, as plain data."""
        return {
            "endings": dict(self.endings),
            "row_steps": dict(self.row_steps),
            "widths": self._width_report(),
            "step_s": self.measured.report(),
            "planner_s": self.planner.report(),
            "predicted_s": self.predicted_s,
            "externality_s": self.externality_s,
            "error_ratio": self.error_ratio,
            "classes": {
                name: {
                    "met": one.met,
                    "unjudged": one.unjudged,
                    "missed": dict(one.missed),
                    "ttft_missed": one.ttft_missed,
                    "tokens": one.tokens,
                    "goodput_tokens": one.goodput_tokens,
                }
                for name, one in self.classes.items()
            },
        }

    def recent(self, now_s: float) -> dict[str, Any]:
        """Rates over the last minutes; None where nothing was there to judge."""
        seconds = [second for second in self.seconds if second.index > now_s - TIMELINE_S]
        span_s = min(max(now_s - self.start_s, 1.0), TIMELINE_S)
        met = [sum(second.met[kind] for second in seconds) for kind in (0, 1)]
        missed = [sum(second.missed[kind] for second in seconds) for kind in (0, 1)]
        ttft = np.array(self.ttft_s)
        return {
            "seconds": span_s,
            "attainment": _share(sum(met), sum(missed)),
            **{f"attainment_{name}": _share(met[kind], missed[kind]) for kind, name in enumerate(CLASSES)},
            "judged": sum(met) + sum(missed),
            "goodput_tok_s": sum(second.goodput_tokens for second in seconds) / span_s,
            "raw_tok_s": sum(second.tokens for second in seconds) / span_s,
            "ttft_p50_s": float(np.quantile(ttft, 0.5)) if len(ttft) else None,
            "ttft_p95_s": float(np.quantile(ttft, 0.95)) if len(ttft) else None,
        }

    def timeline(self, since: int) -> list[list[float | None]]:
        """Rows of `COLUMNS` from second `since` on: the last one a reader has was not over yet."""
        return [second.row() for second in self.seconds if second.index >= since]

    def _second(self, now_s: float) -> Second:
        index = int(now_s)
        if not self.seconds or self.seconds[-1].index < index:
            self.seconds.append(Second(index))
        return self.seconds[-1]

    def _width_report(self) -> dict[str, Any]:
        widths = self._widths.copy()
        widths[1] += self._serial_rows
        counts, low = [], 1
        for high in WIDTH_BOUNDS:
            counts.append(int(widths[low : high + 1].sum()))
            low = high + 1
        counts.append(int(widths[low:].sum()))
        total = int((widths * np.arange(MAX_WIDTH + 1)).sum())
        return {"bounds": list(WIDTH_BOUNDS), "counts": counts, "sum": total}


def _share(met: int, missed: int) -> float | None:
    return met / (met + missed) if met + missed else None

"""True step latency under sync and async scheduling, and the statistics of a window of steps.

vLLM hands each SchedulerOutput back in the order it was scheduled, so a FIFO pairs plan and outcome:

    latency(N) = t_update(N) - t_update(N-1)        where the engine went on
                 t_update(N) - t_schedule_exit(N)   after a pause

The first is what a token costs whoever waits for it. Under async scheduling it leaves out the time that step N waited
behind step N-1; without, it includes what the host does in between, planning as well: left out, every request would be
late by it and no step to blame. A sample says nothing about the step's load, and is ignored, after an empty step, after
a pause, in the first steps of an engine's life and where a row was preempted. Nothing in flight for IDLE_S is a pause,
too: an engine whose requests all wait for streamed input, or whose scheduler is paused, takes no empty steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taper.core.types import Ending, StepLoad
from taper.trace.decision import Decision

WARMUP_STEPS = 4
IDLE_S = 50e-3  # with nothing in flight: the host's work between two steps takes no longer
OVERRUN_RATIO = 5.0  # measured / predicted beyond which a sample is a hiccup
OVERRUN_STREAK = 8  # ... unless that many come in a row: then it is the predictor that is off
PLANNER_SAMPLES = 4096


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """One scheduled step, from `schedule()` to its update. Fields as in the step record on the wire."""

    step: int
    time_s: float  # of its schedule and, once it is over, when it began
    policy: str
    load: StepLoad
    groups: int
    protected: int
    extra: int
    deferred: int
    held: int
    predicted_s: float  # of the load as executed
    baseline_s: float = math.nan
    budget_s: float = math.nan
    slack_min_s: float = math.nan
    externality_s: float = 0.0
    planner_s: float = 0.0
    is_representative: bool = True
    output: Any = None  # vLLM's SchedulerOutput until the step is over
    decision: Decision | None = None  # where steps are traced
    begun_s: float = -math.inf  # after a pause; else it begins where the step before ends
    measured_s: float = math.nan
    tokens: int = 0  # that it brought
    ending: Ending = Ending.IGNORED

    def record(self) -> dict[str, Any]:
        """Plain JSON data; None where a number does not exist."""
        return {
            "step": self.step,
            "time_s": self.time_s,
            "policy": self.policy,
            "rows": self.load.rows,
            "context_tokens": self.load.context_tokens,
            "prefill_tokens": self.load.prefill_tokens,
            "groups": self.groups,
            "protected": self.protected,
            "extra": self.extra,
            "deferred": self.deferred,
            "held": self.held,
            "baseline_s": finite(self.baseline_s),
            "predicted_s": finite(self.predicted_s),
            "budget_s": finite(self.budget_s),
            "slack_min_s": finite(self.slack_min_s),
            "measured_s": finite(self.measured_s),
            "ending": self.ending.value,
            "planner_s": self.planner_s,
        }


@dataclass(slots=True, eq=False)
class Window:
    """Counters since the last change of settings."""

    since_s: float
    steps: int = 0
    clean_steps: int = 0
    ignored_steps: int = 0
    overruns: int = 0
    fallbacks: int = 0
    row_tokens: int = 0  # decode rows executed
    extra_row_steps: int = 0
    deferred_row_steps: int = 0
    relative_error: float = 0.0  # sum over clean steps
    planner_s: deque[float] = field(default_factory=lambda: deque(maxlen=PLANNER_SAMPLES))

    def add(self, step: Step) -> None:
        self.steps += 1
        self.row_tokens += step.load.rows
        self.extra_row_steps += step.extra
        self.deferred_row_steps += step.deferred
        if step.planner_s:
            self.planner_s.append(step.planner_s)
        if step.ending is Ending.CLEAN:
            self.clean_steps += 1
            self.relative_error += abs(step.predicted_s - step.measured_s) / step.measured_s
        elif step.ending is Ending.OVERRUN:
            self.overruns += 1
        else:
            self.ignored_steps += 1

    def report(self, now_s: float) -> dict[str, Any]:
        planner = np.array(self.planner_s)
        p50_s, p99_s = np.percentile(planner, (50, 99)) if len(planner) else (math.nan, math.nan)
        return {
            "seconds": now_s - self.since_s,
            "steps": self.steps,
            "clean_steps": self.clean_steps,
            "ignored_steps": self.ignored_steps,
            "overruns": self.overruns,
            "fallbacks": self.fallbacks,
            "row_tokens": self.row_tokens,
            "extra_row_steps": self.extra_row_steps,
            "deferred_row_steps": self.deferred_row_steps,
            "planner_p50_s": finite(float(p50_s)),
            "planner_p99_s": finite(float(p99_s)),
            "predictor_mape": self.relative_error / self.clean_steps if self.clean_steps else None,
        }


class StepMeter:
    """Pairs scheduled steps with their updates and says what each latency sample is worth."""

    def __init__(self) -> None:
        self._in_flight: deque[Step] = deque()
        self._last_update_s = -math.inf
        self._steps = 0
        self._is_gap = True  # nothing ran just before the next step
        self._overruns_in_row = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def scheduled(self, step: Step, output: Any, exit_s: float) -> None:
        """A non-empty step went off at `exit_s`."""
        step.output = output
        self._is_gap |= not self._in_flight and exit_s - self._last_update_s > IDLE_S
        if self._is_gap:
            step.begun_s = exit_s
        self._steps += 1
        step.is_representative &= not self._is_gap and self._steps > WARMUP_STEPS
        self._is_gap = False
        self._in_flight.append(step)

    def interrupted(self) -> None:
        """An empty step, or the engine ran out of work: the next sample would measure the pause."""
        self._is_gap = True

    def updated(self, output: Any, now_s: float) -> Step | None:
        """The step that `output` belongs to, now with `measured_s` and `ending`; None for an empty step."""
        if not any(step.output is output for step in self._in_flight):
            return None
        begun_s = self._last_update_s
        while (step := self._in_flight.popleft()).output is not output:
            begun_s = max(begun_s, step.begun_s)  # its update never came: the engine dropped the batch
        step.output = None
        step.time_s = max(step.begun_s, begun_s)
        step.measured_s = now_s - step.time_s
        self._last_update_s = now_s
        step.ending = self._ending(step)
        return step

    def _ending(self, step: Step) -> Ending:
        if not step.is_representative or step.measured_s <= 0.0:
            return Ending.IGNORED
        if step.measured_s > OVERRUN_RATIO * step.predicted_s:
            self._overruns_in_row += 1
            return Ending.OVERRUN if self._overruns_in_row <= OVERRUN_STREAK else Ending.CLEAN
        self._overruns_in_row = 0
        return Ending.CLEAN


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

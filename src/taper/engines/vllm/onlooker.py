"""Everything that is kept for people to look at: counters, the last decision, the trace, spans. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from taper.config import ServerConfig
from taper.core.controller import Controller
from taper.core.types import FinishedRequest, Plan
from taper.engines.vllm.groups import Branch
from taper.engines.vllm.meter import Step
from taper.engines.vllm.seam import SchedulerSeam
from taper.engines.vllm.spans import Spans, spans_for
from taper.engines.vllm.tally import Tally
from taper.engines.vllm.view import Frame
from taper.trace.decision import Decision
from taper.trace.file import TraceWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class LastDecision:
    """What the last planned step was planned on."""

    frame: Frame
    plan: Plan
    traced: Decision | None  # where steps are traced


class Onlooker:
    """Told by the regulator what happens; each call costs microseconds."""

    def __init__(self, seam: SchedulerSeam, config: ServerConfig, clock: Callable[[], float]) -> None:
        """Raises `ConfigError` for a trace that cannot be written."""
        self.tally = Tally(clock())
        self.trace = _trace(config, seam.replica)
        self.spans: Spans | None = spans_for(seam.otlp_endpoint, clock)
        self.last_decision: LastDecision | None = None  # None: the last step needed none

    def added(self, branch: Branch, now_s: float) -> None:
        if self.spans is not None:
            self.spans.added(branch, now_s)

    def ended(self, branch: Branch, finished: FinishedRequest | None, now_s: float) -> None:
        """A branch is over; with its request's last one, `finished` is the request, None where it was cut short."""
        is_last = not branch.group.branches
        if is_last:
            self.tally.closed(branch.group, finished, now_s)
        if self.spans is not None:
            self.spans.branch_ended(branch, now_s)
            if is_last:
                met = finished.met if finished is not None and finished.tokens > 1 else None
                self.spans.closed(branch.group, met, now_s)

    def planned(self, frame: Frame, plan: Plan, controller: Controller, step: int) -> None:
        traced = _decision(frame, plan, controller, step) if self.trace is not None else None
        self.last_decision = LastDecision(frame=frame, plan=plan, traced=traced)

    def unplanned(self) -> None:
        """Nothing is planned: not yet, or a fault undid it, or there is no work left to keep alive for."""
        self.last_decision = None

    def scheduled(self, step: Step, *, is_parallel: bool) -> None:
        """The step that was planned, or not, just now."""
        if self.last_decision is not None:
            step.decision = self.last_decision.traced
            request = self.last_decision.frame.view.request
            self.tally.widths(np.bincount(request[self.last_decision.plan.run]))
        elif not is_parallel:
            self.tally.serial(step.load.rows)

    def updated(self, step: Step, now_s: float) -> None:
        """The step came back."""
        self.tally.step(step, now_s)
        if self.trace is not None and step.decision is not None:
            self.trace.put(replace(step.decision, measured_s=step.measured_s, ending=step.ending.value))
        step.decision = None


def _decision(frame: Frame, plan: Plan, controller: Controller, step: int) -> Decision:
    requests, branches = frame.columns.numbers
    return Decision(
        step=step,
        policy=controller.in_force.name,
        view=frame.view,
        latency=controller.latency,
        knobs=controller.knobs,
        guidance=controller.guidance,
        plan=plan,
        requests=requests[np.unique(frame.columns.request[frame.branch])],
        branches=branches[frame.branch],
    )


def _trace(config: ServerConfig, replica: int) -> TraceWriter | None:
    """The trace of this replica: PATH for the first, PATH-N before the suffix for the others."""
    if config.trace is None:
        return None
    path = Path(config.trace)
    if replica:
        path = path.with_name(f"{path.stem}-{replica}{path.suffix}")
    return TraceWriter(path, max_bytes=config.trace_mib << 20)

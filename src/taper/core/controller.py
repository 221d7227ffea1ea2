"""The one stateful object of the core: decide a step, observe what became of it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from taper.core.calibration import Learner
from taper.core.floor import Occupancy, throughput_floor_s
from taper.core.latency import LinearLatency
from taper.core.policies import FixedCap, Guidance, Policy
from taper.core.types import Ending, FinishedRequest, Knobs, Plan, StepOutcome, StepView

HISTORY_REQUESTS = 200  # finished requests the slow loops look at
OCCUPANCY_RATE = 0.01  # weight of one step in the smoothed occupancy
FLOOR_EVERY_REQUESTS = 8  # completions between two runs of the outer loop
PREFILL_SHARE = 0.2  # least predicted share of a step that says something about the prefill term
MARGIN_MAX = 0.3
COLD_START = FixedCap(2)  # until a law is learned: wide enough to see what a row costs, never eager by surprise
FIRST_LAW_EVERY_STEPS = 50
REFIT_EVERY_STEPS = 500


class Controller:
    """Per-step admission control of one engine replica.

    `decide` is a pure function of the view and of three things learned here: the predictor's online
    correction (every step), the margin (every completion) and the throughput floor (every few). The last two are
    about the policy in force, and begin anew with another.
    """

    def __init__(
        self,
        *,
        latency: LinearLatency,
        policy: Policy,
        knobs: Knobs,
        learn: bool = False,
        promise_s: float = math.inf,
    ) -> None:
        """With `learn`, `latency` is only a guess: widths stay at `COLD_START` until live steps gave a law.

        promise_s: the server's own TPOT SLO, where requests may claim looser ones.
        """
        self.policy = policy
        self.promise_s = promise_s
        self.knobs = knobs
        self.latency = latency
        self._learner = Learner() if learn else None
        self._learning = learn
        self._clean_steps = 0
        self._in_force_s = math.inf  # engine time since another policy was; inf: there was none
        self._margin_offset = 0.0
        self._finished: deque[FinishedRequest] = deque(maxlen=HISTORY_REQUESTS)
        self._since_floor = 0
        self._asked_floor_s = 0.0  # by the latest replay
        self._floor_s = 0.0  # what the two latest agree on: one may have met a slow moment
        self._occupancy = Occupancy(requests=0.0, context_tokens_per_row=0.0, prefill_tokens=0.0, tokens_per_row=1.0)
        self._averaged_requests = 0  # at most HISTORY_REQUESTS: the weight of a new one in the means
        self._mean_output_tokens = 0.0
        self._mean_path_tokens = 0.0

    @property
    def learning(self) -> bool:
        """Whether the predictor is still a guess, so that policies which rely on it are not in force."""
        return self._learning

    @property
    def in_force(self) -> Policy:
        """The policy that decides: `COLD_START` while one that relies on the predictor has only a guess."""
        return COLD_START if self.learning and _follows_law(self.policy) else self.policy

    @property
    def guidance(self) -> Guidance:
        return Guidance(
            margin=min(self.knobs.margin + self._margin_offset, MARGIN_MAX),
            mean_output_tokens=self._mean_output_tokens,
            mean_path_tokens=self._mean_path_tokens,
            promise_s=self.promise_s,
            floor_s=self._floor_s if self.knobs.throughput_floor else 0.0,
        )

    def decide(self, view: StepView) -> Plan:
        """The rows of the next step. Raises only on a malformed view or a faulty plug-in policy."""
        return self.in_force(view, self.latency, self.knobs, self.guidance)

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a step the engine ran, planned by `decide` or, where there was nothing to decide, not."""
        self._occupancy = _smooth(self._occupancy, outcome)
        self._in_force_s += outcome.measured_s
        if outcome.ending is Ending.CLEAN:
            self._correct(outcome)
            if self._learner is not None:
                self._fit(self._learner, outcome)
        for request in outcome.finished:
            self._learn(request)

    def replace(
        self,
        *,
        policy: Policy | None = None,
        latency: LinearLatency | None = None,
        knobs: Knobs | None = None,
    ) -> None:
        """Swap parts on a running engine; what was learned about the machine stays unless `latency` is given."""
        before = self.in_force
        self.policy = policy or self.policy
        self.knobs = knobs or self.knobs
        if latency is not None:
            self.latency = latency
            self._learner, self._learning = None, False
        self._judge_anew_after(before)

    def _judge_anew_after(self, before: Policy) -> None:
        """Margin and floor answer to what became of requests under the policy in force, not under another."""
        if self.in_force.name == before.name:
            return
        self._in_force_s = 0.0
        self._margin_offset = 0.0
        self._finished.clear()
        self._since_floor = 0
        self._asked_floor_s = self._floor_s = 0.0

    def _fit(self, learner: Learner, outcome: StepOutcome) -> None:
        learner.add(outcome.load, outcome.measured_s)
        self._clean_steps += 1
        if self._clean_steps % (FIRST_LAW_EVERY_STEPS if self._learning else REFIT_EVERY_STEPS) == 0:
            law = learner.law(capture_sizes=self.latency.capture_sizes)
            if law is not None:
                before = self.in_force
                self.latency, self._learning = law, False
                self._judge_anew_after(before)

    def _correct(self, outcome: StepOutcome) -> None:
        """Move s (or, on a prefill-heavy step, q) a little towards measured / predicted."""
        model, load = self.latency, outcome.load
        decode_s = model.predict(load.rows, load.context_tokens, 0)
        prefill_s = model.predict_load(load) - decode_s
        rate, limit = self.knobs.correction_rate, self.knobs.correction_limit
        if prefill_s < PREFILL_SHARE * decode_s:
            ratio = outcome.measured_s / (decode_s + prefill_s)
            scale = _nudge(model.scale, ratio, rate, limit)
            self.latency = model.corrected(scale=scale, prefill_scale=model.prefill_scale)
        else:
            ratio = max(outcome.measured_s - decode_s, 0.0) / prefill_s
            prefill_scale = _nudge(model.prefill_scale, ratio, rate, limit)
            self.latency = model.corrected(scale=model.scale, prefill_scale=prefill_scale)

    def _learn(self, request: FinishedRequest) -> None:
        if request.tokens < 2:
            return
        self._averaged_requests = count = min(self._averaged_requests + 1, HISTORY_REQUESTS)
        self._mean_output_tokens += (request.tokens - self._mean_output_tokens) / count
        self._mean_path_tokens += (request.critical_path_tokens - self._mean_path_tokens) / count
        if not _follows_law(self.in_force) or request.residence_s > self._in_force_s:
            return
        self._finished.append(request)
        # Integral action, at rest when `miss_target` of the requests miss and would not have without extras. The
        # knob is its least: a calm spell must not spend what the next prediction errors need.
        without_extras = replace(request, residence_s=request.residence_s - request.externality_s)
        blamed = not request.met and without_extras.met
        step = self.knobs.margin_gain * (blamed - self.knobs.miss_target)
        self._margin_offset = min(max(self._margin_offset + step, 0.0), MARGIN_MAX)
        self._since_floor += 1
        if self._since_floor >= FLOOR_EVERY_REQUESTS:
            self._since_floor = 0
            asked_s = throughput_floor_s(
                list(self._finished), self._occupancy, self.latency, in_force=self._floor_s > 0.0
            )
            self._floor_s, self._asked_floor_s = min(asked_s, self._asked_floor_s), asked_s


def _follows_law(policy: Policy) -> bool:
    """Whether it plans by predictions; else there is nothing that margin or floor could correct."""
    return not (policy.is_stock or isinstance(policy, FixedCap))


def _nudge(current: float, ratio: float, rate: float, limit: float) -> float:
    """Exponential average of a multiplicative correction; one sample counts for at most a factor of two."""
    target = current * min(max(ratio, 0.5), 2.0)
    return min(max(current + rate * (target - current), 1.0 / limit), limit)


def _smooth(occupancy: Occupancy, outcome: StepOutcome) -> Occupancy:
    load = outcome.load
    rate = OCCUPANCY_RATE if occupancy.requests else 1.0
    context = load.context_tokens / load.rows if load.rows else occupancy.context_tokens_per_row
    return Occupancy(
        requests=occupancy.requests + rate * (outcome.requests - occupancy.requests),
        context_tokens_per_row=occupancy.context_tokens_per_row + rate * (context - occupancy.context_tokens_per_row),
        prefill_tokens=occupancy.prefill_tokens + rate * (load.prefill_tokens - occupancy.prefill_tokens),
        tokens_per_row=outcome.tokens_per_row,
    )

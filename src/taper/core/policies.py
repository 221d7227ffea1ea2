"""Policies: pure functions from one step's view to a plan.

A policy decides a *width* per request: how many of its live branches are rows of this step. Which
branches those are is the same for all of them (`budget.order_branches`), so a policy is arithmetic on
columns of shape (G,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from taper.core import slack
from taper.core.budget import StepBudget
from taper.core.latency import LatencyModel
from taper.core.types import Bools, ConfigError, Knobs, Plan, StepView


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What the controller has learned that a policy may use."""

    margin: float  # share of the SLO kept back, knob plus integral action
    mean_output_tokens: float  # of recent requests
    mean_path_tokens: float = 0.0  # of their critical paths: the steps they take at full width
    promise_s: float = math.inf  # TPOT SLO that the server gives to whoever claims none; inf: all claims are its own
    floor_s: float = 0.0  # step time below which throttling only loses (outer loop); inf: it never helps


class Policy(Protocol):
    """A named decision rule. `is_stock` is True where the engine should behave as if TAPER were absent.

    The engine asks it only for steps in which some request has several live branches.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_stock(self) -> bool: ...
    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan: ...


@dataclass(frozen=True, slots=True)
class Eager:
    """Every branch, every step: what a serving engine does without TAPER."""

    name: str = "eager"
    is_stock: bool = True

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        budget = StepBudget(view, predict, quantum_tokens=knobs.quantum_tokens)
        return budget.plan(budget.live)


@dataclass(frozen=True, slots=True)
class FixedCap:
    """At most `width` rows per request, whatever the batch; width 1 is the published IRP-Off."""

    width: int
    is_stock: bool = False

    @property
    def name(self) -> str:
        return "off" if self.width == 1 else f"cap:{self.width}"

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        budget = StepBudget(view, predict, quantum_tokens=knobs.quantum_tokens)
        return budget.plan(np.full_like(budget.live, self.width))


@dataclass(frozen=True, slots=True)
class PublishedTaper:
    """The published rule (arXiv 2605.06914), a baseline: budget = T0 + rho * max(0, min slack - T0).

    With linear T and linear utility the greedy order is by context length alone: one sort.
    """

    name: str = "taper-paper"
    is_stock: bool = False

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        budget = StepBudget(view, predict, quantum_tokens=knobs.quantum_tokens)
        baseline_s = budget.seconds(budget.protected)
        slack_min_s = float(slack.published_slack_s(view).min())
        limit_s = baseline_s + knobs.rho * max(0.0, slack_min_s - baseline_s)
        context = np.zeros(len(view.tokens), dtype=np.int64)
        np.maximum.at(context, view.request, view.context_tokens)
        width = budget.admit(budget.protected, np.argsort(context, kind="stable"), limit_s)
        return budget.plan(width, budget_s=limit_s, slack_min_s=slack_min_s)


@dataclass(frozen=True, slots=True)
class Taper:
    """Ours: a step may take SLO * (rows a request gets) + a paced share of the request's credit.

    1. Requests that miss even at width 1 leave the minimum; they keep their protected row. So do those that would
       miss the server's own SLO and claimed a looser one: a claim gives nobody more say than no claim.
    2. The budget is the least time any other request allows, a branching one counted at its full width.
    3. Extras are admitted while T(S) fits it, to the requests with the least credit first, counted in horizons of their
       own SLOs, and among equals to the oldest: any finer, and those that came together would be late together.
    While anything branches, prompt tokens mixed into the step are bounded by the same slack.
    """

    name: str = "taper"
    is_stock: bool = False

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        budget = StepBudget(view, predict, quantum_tokens=knobs.quantum_tokens)
        credit = slack.credit_s(view)
        budget.prefill_limit_tokens = 0
        decode_s = budget.seconds(budget.protected)
        remaining = slack.remaining_tokens(
            view, budget.live, knobs=knobs, mean_output_tokens=guidance.mean_output_tokens
        )
        at_best = np.multiply(budget.live, view.tokens_per_row, dtype=np.float64)
        lost = slack.hopeless(credit, view.tpot_slo_s, at_best, remaining, decode_s)
        promised = np.minimum(view.tpot_slo_s, guidance.promise_s)
        forgone = (view.tpot_slo_s - promised) * (view.tokens - 1)
        binding = ~slack.hopeless(credit - forgone, promised, at_best, remaining, decode_s) & ~lost & decoding(view)
        path = guidance.mean_path_tokens
        allowed_s = slack.allowed_s(
            view, credit, budget.live, knobs=knobs, margin=guidance.margin, mean_path_tokens=path
        )
        slack_min_s = float(allowed_s[binding].min(initial=np.inf))
        limit_s = max(slack_min_s, guidance.floor_s)
        budget.prefill_limit_tokens = prefill_limit(view, predict, knobs, decode_s=decode_s, limit_s=limit_s)
        urgency = np.floor(credit / (knobs.horizon_steps * view.tpot_slo_s))
        order = np.lexsort((view.arrival_s, urgency, -view.priority, lost))
        width = budget.admit(budget.protected, order, limit_s)
        # Without branches the engine runs as stock, prompt chunks included.
        branching = len(view.request) > len(view.tokens)
        return budget.plan(width, budget_s=limit_s, slack_min_s=slack_min_s, limit_prefill=branching)


def decoding(view: StepView) -> Bools:
    """(G,) requests that a longer step delays by that much; one still at its prompt wants it computed instead."""
    return np.bincount(view.request[view.prefill_tokens == 0], minlength=len(view.tokens)) > 0


def prefill_limit(view: StepView, predict: LatencyModel, knobs: Knobs, *, decode_s: float, limit_s: float) -> int:
    """Prompt tokens this step may carry: what decode slack leaves room for.

    Never below the knob, never below a horizon's share of the backlog (slack that starves prefill of forks, joins and
    new requests would run up the very debt that shrinks it), and never below the prompts whose TTFT SLO ends
    within a horizon of baseline steps: spread over one, they would miss it.
    """
    backlog = float(view.prefill_tokens.sum())
    due = 0.0
    if backlog:
        is_due = slack.first_token_due(view, within_s=knobs.horizon_steps * decode_s)
        due = float(view.prefill_tokens[is_due[view.request]].sum())
    floor = max(knobs.prefill_floor_tokens, backlog / knobs.horizon_steps, due)
    tokens = max(predict.prefill_tokens_within(max(limit_s - decode_s, 0.0)), floor)
    return int(min(tokens, view.max_prefill_tokens))


PolicyFactory = Callable[[], Policy]
CAP_DIGITS = 6  # a width beyond what a column holds would be a fault in every step

BUILTIN: Mapping[str, PolicyFactory] = {
    "off": lambda: FixedCap(1),
    "eager": Eager,
    "taper-paper": PublishedTaper,
    "taper": Taper,
}


def resolve(name: str, extra: Mapping[str, PolicyFactory] | None = None) -> Policy:
    """The policy of that name: a built-in, `cap:N`, or one of `extra` (a user's own, entry point `taper.policies`).

    Raises `ConfigError` naming what exists.
    """
    known = {**(extra or {}), **BUILTIN}
    if name in known:
        return known[name]()
    head, _, tail = name.partition(":")
    if head == "cap" and tail.isascii() and tail.isdigit() and len(tail) <= CAP_DIGITS and int(tail) >= 1:
        return FixedCap(int(tail))
    most = 10**CAP_DIGITS - 1
    raise ConfigError(f"unknown policy {name!r}; known: cap:N (N from 1 to {most}), {', '.join(sorted(known))}")

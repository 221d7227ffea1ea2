"""A recorded step, decided again: by the same policy, which must give the same plan, or by another.

Each step is decided on the view as it was recorded. With another policy that is a counterfactual of one step:
the steps after it would have looked different too, and what-if over time is the simulator's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from taper.core.policies import FixedCap, Policy
from taper.core.types import Ints, Plan
from taper.trace.decision import Decision, TraceError

MS_PER_S = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A step on which the two plans name different rows."""

    decision: Decision
    other: Plan
    moved: tuple[tuple[int, int], ...]  # (request number, rows more or less), largest change first
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A whole trace under another policy. Means are per decision."""

    decisions: int
    identical: int  # same rows, same protected rows, same bound on prompt tokens
    extra: float
    other_extra: float
    predicted_s: float
    other_predicted_s: float
    over_budget: int  # decisions whose other plan would not have fitted the recorded budget
    differences: tuple[Difference, ...]  # largest first, at most as many as asked for


def decide(decision: Decision, policy: Policy) -> Plan:
    return policy(decision.view, decision.latency, decision.knobs, decision.guidance)


def same(one: Plan, other: Plan) -> bool:
    """Whether an engine would do the same under both."""
    return bool(
        np.array_equal(one.run, other.run)
        and np.array_equal(one.protected, other.protected)
        and one.prefill_limit_tokens == other.prefill_limit_tokens
    )


def replay(
    decisions: Iterable[Decision], policy: Policy | None, resolve: Callable[[str], Policy], *, shown: int = 10
) -> Replay:
    """Decide every step again: with `policy`, or where that is None with the recorded one, found by `resolve`.

    Raises `TraceError` for an empty trace.
    """
    rows: list[tuple[int, int, float, float, bool]] = []
    identical = 0
    found: list[Difference] = []
    for decision in decisions:
        deciding = policy or resolve(decision.policy)
        plan, other = decision.plan, decide(decision, deciding)
        identical += same(plan, other)
        rows.append(
            (_extra(plan), _extra(other), plan.predicted_s, other.predicted_s, other.predicted_s > plan.budget_s)
        )
        if not same(plan, other):
            found.append(_difference(decision, deciding, other))
            found.sort(key=lambda one: -sum(abs(by) for _, by in one.moved))
            del found[shown:]
    if not rows:
        raise TraceError("the trace holds no decision: nothing branched, waited or was being prefilled")
    extra, other_extra, predicted, other_predicted, over = np.array(rows, dtype=np.float64).T
    return Replay(
        decisions=len(rows),
        identical=identical,
        extra=float(extra.mean()),
        other_extra=float(other_extra.mean()),
        predicted_s=float(predicted.mean()),
        other_predicted_s=float(other_predicted.mean()),
        over_budget=int(over.sum()),
        differences=tuple(found),
    )


def _difference(decision: Decision, policy: Policy, other: Plan) -> Difference:
    change = _widths(decision, other) - _widths(decision, decision.plan)
    order = np.argsort(-np.abs(change), kind="stable")
    moved = tuple((int(decision.requests[at]), int(change[at])) for at in order if change[at])
    return Difference(decision=decision, other=other, moved=moved, why=_why(decision, policy, other))


def _why(decision: Decision, policy: Policy, other: Plan) -> str:
    """The one number that made the difference."""
    plan = decision.plan
    if np.array_equal(plan.run, other.run):
        return f"prompt bound {_tokens(plan)} -> {_tokens(other)}"
    if policy.is_stock:
        over = other.predicted_s - plan.budget_s
        beyond = f", {_ms(over)} beyond the recorded budget" if over > 0 else ""
        return f"runs every branch{beyond}"
    if isinstance(policy, FixedCap):
        return f"at most {policy.width} per request, whatever the budget of {_ms(plan.budget_s)}"
    if not math.isclose(plan.budget_s, other.budget_s, rel_tol=1e-9):
        return f"budget {_ms(plan.budget_s)} -> {_ms(other.budget_s)}"
    return "same budget, other requests first"


def _widths(decision: Decision, plan: Plan) -> Ints:
    return np.bincount(decision.view.request[plan.run], minlength=len(decision.view.tokens))


def _extra(plan: Plan) -> int:
    return int(np.count_nonzero(plan.run)) - int(np.count_nonzero(plan.protected))


def _tokens(plan: Plan) -> str:
    return "the engine's own" if plan.prefill_limit_tokens is None else f"{plan.prefill_limit_tokens} tokens"


def _ms(seconds: float) -> str:
    return f"{seconds * MS_PER_S:.1f} ms" if math.isfinite(seconds) else "none"

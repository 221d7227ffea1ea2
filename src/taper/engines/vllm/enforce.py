"""A plan, carried out on one vLLM scheduler for one `schedule()` call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from taper.core.types import Bools, Ints, Plan, StepView
from taper.engines.vllm.seam import SchedulerSeam, SetAside
from taper.engines.vllm.view import Frame


@dataclass(slots=True, eq=False)
class Enforced:
    """What was done to vLLM's scheduler, and what of it has to be undone after the call."""

    plan: Plan | None = None
    groups: int = 0
    deferred: int = 0
    held: int = 0
    starts: list[str] = field(default_factory=list)  # branches that start beside a started sibling
    out_of_queue: list[SetAside] = field(default_factory=list)  # queues without the held requests stand in for these
    max_step_tokens: int | None = None  # vLLM's own bound, where it was lowered
    planner_s: float = 0.0


def restore(seam: SchedulerSeam, enforced: Enforced) -> None:
    """Undo what must not outlast the call; doing it twice is harmless. Deferrals expire by themselves."""
    if enforced.max_step_tokens is not None:
        seam.max_step_tokens = enforced.max_step_tokens
        enforced.max_step_tokens = None
    seam.release(enforced.out_of_queue)
    enforced.out_of_queue = []


def check(plan: Plan, view: StepView) -> None:
    """Refuse a plan that the engine or the books could not bear: a plug-in policy, or its predictor, may be wrong."""
    for name, rows in (("run", plan.run), ("protected", plan.protected)):
        if rows.shape != view.request.shape or rows.dtype != np.bool_:
            raise ValueError(f"plan: {name} must be {len(view.request)} booleans, not {len(rows)} of {rows.dtype}")
    if not np.bincount(view.request[plan.run], minlength=len(view.tokens)).all():
        raise ValueError("plan leaves a request without a row")
    # Both are summed up for as long as the server runs: one infinity or NaN would stay in every figure.
    if not math.isfinite(plan.predicted_s) or not math.isfinite(plan.baseline_s):
        raise ValueError(f"plan: predicted step times must be finite, not {plan.predicted_s} and {plan.baseline_s}")
    if math.isnan(plan.budget_s) or math.isnan(plan.slack_min_s):
        raise ValueError("plan: budget and slack must be numbers or infinite")
    if plan.prefill_limit_tokens is not None and not isinstance(plan.prefill_limit_tokens, int):
        raise ValueError(f"plan: prefill_limit_tokens must be an integer, not {plan.prefill_limit_tokens!r}")


def apply(seam: SchedulerSeam, frame: Frame, plan: Plan, enforced: Enforced) -> None:
    """Hold the starts the plan leaves out, bound the prompts, order the running rows, defer those left out."""
    requests, ids, view = frame.columns.requests, frame.columns.ids, frame.view
    run, is_stand_in = with_stand_ins(view, plan)
    enforced.starts = [ids[index] for index in frame.branch[run & ~view.resident & ~_opening(view)]]
    hold(seam, frame, np.concatenate([frame.branch[~run & ~view.resident], frame.withheld]), enforced)
    limit_prefill(seam, plan, int(np.count_nonzero(run & (view.prefill_tokens == 0))), enforced)
    # Rows that vLLM skips by itself rank with the protected: their last tokens are in flight.
    rank = np.zeros(len(requests), dtype=np.int64)
    decoding = np.where(plan.protected | is_stand_in, 0, 1)
    rank[frame.branch] = np.where(run, np.where(view.prefill_tokens > 0, 2, decoding), 3)
    _order(seam.running, rank.tolist(), frame.columns.position)
    # Last: unlike the rest it cannot be undone should something fail.
    deferred = frame.branch[~run & view.resident]
    enforced.deferred = len(deferred)
    seam.defer(requests[index] for index in deferred)


def hold(seam: SchedulerSeam, frame: Frame, branches: Ints, enforced: Enforced) -> None:
    """Keep these unstarted branches out of the queues for this call, and the extra ones that are out of sight."""
    requests = frame.columns.requests
    held = frame.extras.difference(requests)
    held.update(requests[index] for index in branches.tolist())
    if held:
        enforced.held = len(held)
        enforced.out_of_queue = seam.hold(held)


def limit_prefill(seam: SchedulerSeam, plan: Plan, rows: int, enforced: Enforced) -> None:
    """Bound the step's tokens to the `rows` that decode and the prompt tokens the plan allows."""
    if plan.prefill_limit_tokens is None or not seam.can_limit_prefill:
        return
    tokens = rows * (1 + seam.spec_tokens) + max(plan.prefill_limit_tokens, 1)
    if tokens < seam.max_step_tokens:
        enforced.max_step_tokens = seam.max_step_tokens
        seam.max_step_tokens = tokens


def with_stand_ins(view: StepView, plan: Plan) -> tuple[Bools, Bools]:
    """(rows of the step, those added here): a started request keeps a started row beside a branch that starts.

    A start may fail for want of KV or of prompt tokens, and a request must not stand still meanwhile.
    """
    requests = len(view.tokens)
    started = np.bincount(view.request[view.resident], minlength=requests) > 0
    runs = np.bincount(view.request[view.resident & plan.run], minlength=requests) > 0
    added = np.zeros_like(plan.run)
    for request in np.flatnonzero(started & ~runs):
        siblings = np.flatnonzero((view.request == request) & view.resident)
        best = np.lexsort((~view.ran_last[siblings], view.progress_tokens[siblings]))[0]
        added[siblings[best]] = True
    return plan.run | added, added


def _opening(view: StepView) -> Bools:
    """The first branch of each request that has none started: it queues as in stock vLLM."""
    started = np.bincount(view.request[view.resident], minlength=len(view.tokens)) > 0
    is_first = np.append(True, view.request[1:] != view.request[:-1])
    return is_first & ~started[view.request]


def _order(running: list[Any], rank: list[int], position: dict[str, int]) -> None:
    """Sort running rows: protected, admitted, prompt chunks, deferred; stable.

    vLLM preempts from the end, so deferred rows are the victims; and it hands out the step's tokens from the
    front, so a prompt chunk cannot eat those of a decoding row.
    """
    keys = [rank[position[request.request_id]] for request in running]
    if any(left > right for left, right in pairwise(keys)):
        pairs = sorted(zip(keys, running, strict=True), key=itemgetter(0))
        running[:] = [request for _, request in pairs]

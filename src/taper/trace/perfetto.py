"""A trace as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

One track with the steps and their counters, and one process per request with a track per branch, whose slices
say what the branch was doing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from taper.trace.decision import Decision

ENGINE = 1  # process id of the steps; requests follow
US_PER_S = 1e6
LARGEST_GAP_S = 0.25  # between two planned steps, beyond which nothing is known about a branch


def export(decisions: Iterable[Decision], out: IO[str]) -> int:
    """Write the events of a trace; returns how many."""
    count = 0
    out.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    for event in events(decisions):
        out.write((",\n" if count else "") + json.dumps(event, separators=(",", ":")))
        count += 1
    out.write("\n]}\n")
    return count


def events(decisions: Iterable[Decision]) -> Iterator[dict[str, Any]]:
    yield _meta("process_name", ENGINE, 0, "engine")
    yield _meta("thread_name", ENGINE, 1, "planned steps")
    slices: dict[tuple[int, int], tuple[str, float, float]] = {}  # (request, branch) -> state, from, last seen until
    named: set[int] = set()
    shown: tuple[Decision, float, float] | None = None  # the step before, its start and its length
    for decision in decisions:
        start_s = decision.view.now_s
        length_s = decision.measured_s if math.isfinite(decision.measured_s) else decision.plan.predicted_s
        if shown is not None:  # a length counts from the end of the step before, which no decision knows
            yield from _step(shown[0], shown[1], min(shown[2], start_s - shown[1]))
        shown = (decision, start_s, length_s)
        for request in decision.requests.tolist():
            if request not in named:
                named.add(request)
                yield _meta("process_name", ENGINE + request, 0, f"request {request}")
        owner = decision.requests[decision.view.request]
        for key, state in zip(
            zip(owner.tolist(), decision.branches.tolist(), strict=True), states(decision), strict=True
        ):
            before = slices.get(key)
            if before is not None and before[0] == state and start_s - before[2] <= LARGEST_GAP_S:
                slices[key] = (state, before[1], start_s + length_s)
                continue
            if before is not None:
                yield _slice(key, before, start_s)
            slices[key] = (state, start_s, start_s + length_s)
    if shown is not None:
        yield from _step(*shown)
    for key, last in slices.items():
        yield _slice(key, last, math.inf)


def states(decision: Decision) -> list[str]:
    """What each branch of the view does in the step."""
    view, plan = decision.view, decision.plan
    names = np.where(view.resident, "deferred", "held")
    names = np.where(plan.run, "extra", names)
    names = np.where(plan.run & (view.prefill_tokens > 0), "prefill", names)
    names = np.where(plan.protected & (view.prefill_tokens == 0), "protected", names)
    return [str(name) for name in names]


def _step(decision: Decision, start_s: float, length_s: float) -> Iterator[dict[str, Any]]:
    plan = decision.plan
    numbers = {
        "step": decision.step,
        "policy": decision.policy,
        "rows": plan.load.rows,
        "predicted_ms": _ms(plan.predicted_s),
        "measured_ms": _ms(decision.measured_s),
        "budget_ms": _ms(plan.budget_s),
        "slack_min_ms": _ms(plan.slack_min_s),
        "externality_ms": _ms(plan.externality_s),
    }
    at = {"pid": ENGINE, "ts": start_s * US_PER_S}
    yield {"name": f"{plan.load.rows} rows", "ph": "X", "tid": 1, "dur": length_s * US_PER_S, "args": numbers, **at}
    yield {"name": "rows", "ph": "C", "args": {"rows": plan.load.rows}, **at}
    times = {name: numbers[f"{name}_ms"] for name in ("predicted", "budget") if numbers[f"{name}_ms"] is not None}
    yield {"name": "step time, ms", "ph": "C", "args": times, **at}


def _slice(key: tuple[int, int], last: tuple[str, float, float], next_s: float) -> dict[str, Any]:
    state, start_s, end_s = last
    length_s = min(end_s, next_s) - start_s
    return {"name": state, "cat": state, "ph": "X", "pid": ENGINE + key[0], "tid": key[1],
            "ts": start_s * US_PER_S, "dur": length_s * US_PER_S}  # fmt: skip


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None

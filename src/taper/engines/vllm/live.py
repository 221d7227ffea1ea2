"""What a person watching a running engine wants to see: its lanes, its last minutes, its settings.

Plain data for the live page and `taper top`. Nothing in it names a client's group, request or text: reading
needs no rights, so a lane is known by a running number only.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from taper.core import slack
from taper.core.policies import decoding
from taper.engines.vllm import compat
from taper.engines.vllm.meter import finite
from taper.engines.vllm.regulator import Regulator
from taper.engines.vllm.tally import COLUMNS

SCHEMA = "taper.live/1"
MAX_LANES = 1000
MAX_BRANCHES = 64  # shown of one lane
# What a branch is doing: P protected, E extra, F prompt chunk, D deferred, H held, W waiting for its first slot.
PROTECTED, EXTRA, PREFILL, DEFERRED, HELD, WAITING = b"PEFDHW"
STEP_KEYS = ("rows", "groups", "protected", "extra", "deferred", "held", "prefill_tokens", "predicted_s",
             "measured_s", "baseline_s", "budget_s", "slack_min_s")  # fmt: skip


def live(taper: Regulator, since: int = 0) -> dict[str, Any]:
    """One engine replica now; `timeline` holds the seconds from `since` on.

    `cost_s` is what putting this together took of the engine's own time, so that readers can pace themselves: of its
    thread's, since a machine that stands still for a second must not keep readers waiting for a hundred.
    """
    start_s, began_s = taper.clock(), time.thread_time()
    controller = taper.controller
    record = taper.last_step.record() if taper.last_step else None
    answer = {
        "schema": SCHEMA,
        "now_s": start_s,
        "policy": controller.policy.name,
        "learning": controller.learning,
        "tpot_slo_s": taper.slo.tpot_s,
        "ttft_slo_s": taper.slo.ttft_s,
        "margin": controller.guidance.margin,
        "scale": controller.latency.scale,
        "steps": taper.steps,
        "fallbacks": taper.fallbacks,
        "kv_usage": taper.seam.kv_usage,
        "step": {key: record[key] for key in STEP_KEYS} if record and taper.table.branches else None,
        "recent": taper.onlooker.tally.recent(start_s),
        "columns": COLUMNS,
        "timeline": taper.onlooker.tally.timeline(since),
        "groups": len(taper.table.groups),
        "branches": len(taper.table.branches),
        "lanes": lanes(taper, start_s),
    }
    answer["cost_s"] = time.thread_time() - began_s
    return answer


def lanes(taper: Regulator, now_s: float) -> list[dict[str, Any]]:
    """The oldest `MAX_LANES` requests, each with its branches in order.

    Keys: number, kind (n, tag or id: what made it a group), age_s, tokens, tpot_slo_s, credit_s (ahead of its
    SLO; None before the first token), finished (branches over), roles (one letter per live branch), progress
    (their output tokens).
    """
    if not taper.table.branches:
        return []
    columns = taper.table.columns
    roles = _roles(taper).tobytes().decode("ascii")
    first = columns.first.tolist()
    progress = list(map(len, columns.output_tokens))
    found = []
    for group, start, live in zip(columns.groups[:MAX_LANES], first, columns.live.tolist(), strict=False):
        end = start + live
        tokens = group.ended_tokens + sum(progress[start:end])
        slo_s = group.claims.slo.tpot_s
        credit_s = slo_s * (tokens - 1) - (now_s - group.first_token_s)
        found.append(
            {
                "number": group.number,
                "kind": str(group.key[0]),
                "age_s": now_s - group.arrival_s,
                "tokens": tokens,
                "tpot_slo_s": slo_s,
                "credit_s": finite(credit_s),
                "finished": group.ended_branches,
                "roles": roles[start : min(end, start + MAX_BRANCHES)],
                "progress": progress[start : min(end, start + MAX_BRANCHES)],
                "branches": len(group.branches),
            }
        )
    return found


def slack_quantiles_s(taper: Regulator) -> list[float] | None:
    """[least, median] step time that the requests decoding in the last planned step allowed; None without one."""
    if taper.onlooker.last_decision is None:
        return None
    view = taper.onlooker.last_decision.frame.view
    live_branches = np.bincount(view.request, minlength=len(view.tokens))
    knobs, guidance = taper.controller.knobs, taper.controller.guidance
    path, margin = guidance.mean_path_tokens, guidance.margin
    credit = slack.credit_s(view)
    allowed = slack.allowed_s(view, credit, live_branches, knobs=knobs, margin=margin, mean_path_tokens=path)
    allowed = allowed[decoding(view)]
    return [float(allowed.min()), float(np.median(allowed))] if len(allowed) else None


def _roles(taper: Regulator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A letter for every branch in `taper.table.columns`, as of the last scheduled step."""
    columns, ran_last = taper.table.columns, taper.ran_last
    count = len(columns.ids)
    ran = np.fromiter(map(ran_last.__contains__, columns.ids), np.bool_, count)
    resident = compat.computed_tokens(columns.requests) > 0
    started = np.bincount(columns.request[resident], minlength=len(columns.groups)) > 0
    roles = np.where(resident, DEFERRED, np.where(started[columns.request], HELD, WAITING)).astype(np.uint8)
    roles[ran] = EXTRA
    decision = taper.onlooker.last_decision
    if decision is not None and decision.frame.columns is columns:
        protected = decision.frame.branch[decision.plan.protected]
    else:  # a branch came or went since, or nothing was planned: the first row of each request
        rows = np.flatnonzero(ran)
        _, at = np.unique(columns.request[rows], return_index=True)
        protected = rows[at]
    roles[protected[ran[protected]]] = PROTECTED
    is_prompt = np.fromiter((ran_last.get(name, 0) > 1 for name in columns.ids), np.bool_, count)
    roles[is_prompt & (np.fromiter(map(len, columns.output_tokens), np.int64, count) == 0)] = PREFILL
    return roles

"""One planned step <-> one line of JSON. Every line stands alone: policy, law, knobs and guidance included."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from pydantic_core import to_json

from taper.core.latency import LinearLatency
from taper.core.policies import Guidance
from taper.core.types import Bools, ConfigError, Ints, Knobs, Plan, StepLoad, StepView

SCHEMA = "taper.decision/1"
FLOATS = ("arrival_s", "first_token_s", "tpot_slo_s", "ttft_slo_s", "priority")
INTS = ("tokens", "request", "context_tokens", "progress_tokens", "prefill_tokens")
BOOLS = ("resident", "ran_last", "pinned")
SCALARS = ("now_s", "kv_free_tokens", "max_prefill_tokens", "tokens_per_row")


class TraceError(ConfigError):
    """A trace that cannot be read; the message names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What `decide` saw, what it answered, and how long the step then took.

    `requests` (G,) and `branches` (B,) are running numbers that stay the same from step to step.
    """

    step: int
    policy: str  # the one that decided: the cold-start cap while the law is only a guess
    view: StepView
    latency: LinearLatency
    knobs: Knobs
    guidance: Guidance
    plan: Plan
    requests: Ints
    branches: Ints
    measured_s: float = math.nan  # NaN: the step's outcome is not known
    ending: str = ""


def dump(decision: Decision) -> bytes:
    """One line, without the newline. Infinite and absent numbers become null."""
    view, plan = decision.view, decision.plan
    data = {
        "schema": SCHEMA,
        "step": decision.step,
        "policy": decision.policy,
        "measured_s": decision.measured_s,
        "ending": decision.ending,
        "view": {
            **{name: getattr(view, name) for name in SCALARS},
            **{name: getattr(view, name).tolist() for name in (*FLOATS, *INTS)},
            **{name: _bits(getattr(view, name)) for name in BOOLS},
        },
        "latency": asdict(decision.latency),
        "knobs": asdict(decision.knobs),
        "guidance": asdict(decision.guidance),
        "plan": {
            "run": _bits(plan.run),
            "protected": _bits(plan.protected),
            "load": asdict(plan.load),
            "baseline_s": plan.baseline_s,
            "predicted_s": plan.predicted_s,
            "budget_s": plan.budget_s,
            "slack_min_s": plan.slack_min_s,
            "prefill_limit_tokens": plan.prefill_limit_tokens,
        },
        "requests": decision.requests.tolist(),
        "branches": decision.branches.tolist(),
    }
    return to_json(data, inf_nan_mode="null")


def parse(line: str | bytes, *, where: str) -> Decision:
    """Raises `TraceError` naming `where` for anything that `dump` does not write."""
    try:
        data = json.loads(line, parse_constant=_no_constant)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']!r}, not {SCHEMA!r}")
        decision = _decision(data)
        _check_columns(decision)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{where}: not a decision: {what}") from None
    return decision


def _decision(data: Mapping[str, Any]) -> Decision:
    view, plan = data["view"], data["plan"]
    columns: dict[str, Any] = {name: _number(view[name]) for name in SCALARS}
    columns |= {name: np.array(view[name], dtype=np.float64) for name in FLOATS}  # null reads as NaN
    columns |= {name: np.array(view[name], dtype=np.int64) for name in INTS}
    columns |= {name: _bools(view[name]) for name in BOOLS}
    latency = {**data["latency"], "capture_sizes": tuple(data["latency"]["capture_sizes"])}
    limit = plan["prefill_limit_tokens"]
    return Decision(
        step=int(data["step"]),
        policy=str(data["policy"]),
        view=StepView(**columns),
        latency=LinearLatency(**_only(LinearLatency, latency)),
        knobs=Knobs(**_only(Knobs, data["knobs"])),
        guidance=Guidance(**{name: _or_inf(value) for name, value in _only(Guidance, data["guidance"]).items()}),
        plan=Plan(
            run=_bools(plan["run"]),
            protected=_bools(plan["protected"]),
            load=StepLoad(**{name: int(_number(value)) for name, value in plan["load"].items()}),
            baseline_s=_number(plan["baseline_s"]),
            predicted_s=_number(plan["predicted_s"]),
            budget_s=_or_inf(plan["budget_s"]),
            slack_min_s=_or_inf(plan["slack_min_s"]),
            prefill_limit_tokens=None if limit is None else int(_number(limit)),
        ),
        requests=np.array(data["requests"], dtype=np.int64),
        branches=np.array(data["branches"], dtype=np.int64),
        measured_s=math.nan if data["measured_s"] is None else _number(data["measured_s"]),
        ending=str(data["ending"]),
    )


def _check_columns(decision: Decision) -> None:
    """Raises `ValueError` for columns that do not describe one step."""
    view, plan = decision.view, decision.plan
    of_requests = [*(getattr(view, name) for name in (*FLOATS, "tokens")), decision.requests]
    of_branches = [*(getattr(view, name) for name in (*INTS[1:], *BOOLS)), plan.run, plan.protected, decision.branches]
    if len({column.shape for column in of_requests}) > 1 or len({column.shape for column in of_branches}) > 1:
        raise ValueError("columns differ in length")
    if view.request.ndim != 1 or not np.array_equal(np.unique(view.request), np.arange(len(view.tokens))):
        raise ValueError("branches and requests do not belong together")
    if (np.diff(view.request) < 0).any() or not len(view.request):
        raise ValueError("branches are not ordered by request")
    if not all(np.isfinite(getattr(view, name)).all() for name in FLOATS if name != "first_token_s"):
        raise ValueError("a number of the view is missing")


def _only(kind: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `raw`, all of which must be fields of `kind`: another version's trace would decide otherwise."""
    known = {spec.name for spec in fields(kind)}
    if set(raw) != known:
        raise ValueError(f"{kind.__name__} of another version: {', '.join(sorted(set(raw) ^ known))}")
    return dict(raw)


def _bits(column: Bools) -> str:
    return (column.astype(np.uint8) + ord("0")).tobytes().decode("ascii")


def _bools(bits: str) -> Bools:
    return np.asarray(np.frombuffer(bits.encode("ascii"), dtype=np.uint8) == ord("1"))


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return value


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else float(_number(value))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

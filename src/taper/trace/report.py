"""A replay for people: one line of what came out, then the steps that differ most."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from taper.core.types import Plan
from taper.trace.replay import Difference, Replay

MOVES_SHOWN = 4


def render(found: Replay, policy: str | None, console: Console) -> None:
    """`policy`: the other policy, None for the recorded one."""
    name = policy or "the recorded policy"
    console.print(
        f"{found.decisions} decisions replayed with {name}: {found.identical} identical, "
        f"{found.decisions - found.identical} different",
        highlight=False,
    )
    console.print(
        f"per step: {found.extra:.2f} extra rows recorded, {found.other_extra:.2f} with {name}; predicted "
        f"{_ms(found.predicted_s)} recorded, {_ms(found.other_predicted_s)} with {name}; "
        f"{found.over_budget} steps beyond the recorded budget",
        highlight=False,
        soft_wrap=True,
    )
    if found.differences:
        console.print(_table(found.differences))


def _table(differences: tuple[Difference, ...]) -> Table:
    table = Table(title="where they differ most")
    for column in ("step", "rows", "predicted, ms", "budget, ms"):
        table.add_column(column, justify="right")
    table.add_column("requests")
    table.add_column("why")
    for one in differences:
        plan, other = one.decision.plan, one.other
        moved = ", ".join(f"#{request} {by:+d}" for request, by in one.moved[:MOVES_SHOWN])
        more = len(one.moved) - MOVES_SHOWN
        table.add_row(
            str(one.decision.step),
            _change(str(_rows(plan)), str(_rows(other))),
            _change(_number(plan.predicted_s), _number(other.predicted_s)),
            _change(_number(plan.budget_s), _number(other.budget_s)),
            moved + (f" and {more} more" if more > 0 else ""),
            one.why,
        )
    return table


def _change(one: str, other: str) -> str:
    return one if one == other else f"{one} -> {other}"


def _rows(plan: Plan) -> int:
    return int(np.count_nonzero(plan.run))


def _number(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if math.isfinite(seconds) else "none"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

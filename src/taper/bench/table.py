"""The table at the end: one row per metric, one column per policy, medians with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from taper.bench.result import over_rounds, ratio_over_rounds
from taper.goodput import Spread
from taper.results import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    title: str
    metric: str
    scale: float = 1.0
    digits: int = 0
    ratio: bool = False  # show subject / baseline as well
    section: bool = False  # a line below


ROWS = (
    Row(title="goodput, tok/s", metric="goodput_tok_s", ratio=True),
    Row(title="raw throughput, tok/s", metric="raw_tok_s", ratio=True, section=True),
    Row(title="SLO attainment, %", metric="attainment", scale=100),
    Row(title="  serial requests, %", metric="attainment_serial", scale=100),
    Row(title="  branching requests, %", metric="attainment_branching", scale=100, section=True),
    Row(title="TTFT p50, s", metric="ttft_p50_s", digits=2),
    Row(title="TTFT p95, s", metric="ttft_p95_s", digits=2),
    Row(title="  from the sending, p95, s", metric="ttft_sent_p95_s", digits=2),
    Row(title="effective TPOT p50, ms", metric="tpot_p50_s", scale=1e3, digits=1),
    Row(title="effective TPOT p95, ms", metric="tpot_p95_s", scale=1e3, digits=1),
    Row(title="victim TPOT p50, ms", metric="victim_tpot_p50_s", scale=1e3, digits=1),
    Row(title="victim TPOT p95, ms", metric="victim_tpot_p95_s", scale=1e3, digits=1),
    Row(title="gap between chunks p99, ms", metric="itl_p99_s", scale=1e3, section=True),
    Row(title="step, mean, ms", metric="step_mean_s", scale=1e3, digits=1),
    Row(title="rows per step, mean", metric="rows_mean", digits=1),
    Row(title="planner p99, µs", metric="planner_p99_s", scale=1e6),
    Row(title="predictor MAPE, %", metric="predictor_mape", scale=100, digits=1),
)


def comparison(runs: Sequence[Run], policies: Sequence[str], *, subject: str, title: str, ratios: bool = True) -> Table:
    """A rich table; the ratio columns hold `subject` over each other policy, paired within rounds."""
    others = [policy for policy in policies if policy != subject] if ratios and subject in policies else []
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for policy in policies:
        table.add_column(policy, justify="right", style="bold" if policy == subject else None, no_wrap=True)
    for other in others:
        table.add_column(f"{subject}/{other}", justify="right", no_wrap=True)
    for row in ROWS:
        cells = [cell(over_rounds(runs, policy, row.metric), row.scale, row.digits) for policy in policies]
        quotients = [
            cell(ratio_over_rounds(runs, row.metric, subject, other), 1, 2) if row.ratio else "" for other in others
        ]
        table.add_row(row.title, *cells, *quotients, end_section=row.section)
    return table


def cell(value: Spread | None, scale: float, digits: int) -> str:
    """`median (low-high)`; the range is left out for a single round."""
    if value is None:
        return "-"
    text = f"{value.median * scale:.{digits}f}"
    if value.n > 1:
        text += f" ({value.low * scale:.{digits}f}-{value.high * scale:.{digits}f})"
    return text

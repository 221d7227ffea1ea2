"""Which load puts a given machine into the regime where regulating branches can pay, and why.

The reasoning, with the calibrated law T = a + b*rows + c*context + d*prefill. At most K requests are in
service, for every policy alike; arrivals come faster than they can be served, so about K always are.

* `off` runs one row per request: K rows. Its step is short, every serial request is well within a tight
  SLO, and most of the step is the fixed cost a: throughput is left on the table.
* `eager` runs every branch. By Little's law the share of in-flight requests that branch is
  f = p*Lb / (p*Lb + (1-p)*Ls), p the branching share and L the tokens per row: K * (1 + (n-1) f) rows.
* An SLO between the two mean steps is one that `off` meets with room to spare and `eager` breaks for
  every serial request; the rows in between are what an admission controller can add without a miss.

K fixes how far the two lie from each other and from a: with b*K well above a nothing is left to gain (rows
cost what they bring), with b*K far below a nobody's SLO is in danger. K = `fill` * a / b_row, with
`fill` = 0.4 and b_row the cost of a row with its context, keeps the fixed cost at about 70 % of `off`'s step.

Arrivals are offered at twice what fits the SLO: every policy, the fastest included, always has K requests to
work on, so throughput measures the policy and not the arrivals. TTFT then grows with the length of the run, for
every policy; it is a comparison between columns, not a latency.

The bound that follows from the law alone: rows at the SLO over the SLO, against K over `off`'s step.
"""

from __future__ import annotations

from dataclasses import dataclass

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Slo
from taper.workload.mix import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A load and a promise: everything the demo and the bench need to know about one operating point."""

    name: str
    mix: Mix
    rate_rps: float
    max_concurrency: int  # requests in service at once, for every policy; the others wait at the client
    slo: Slo
    arrival_cv: float = 1.0
    reason: str = ""  # how it was chosen, for the reader of the output


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """Steady state of one policy with K requests in service, from the law."""

    rows: float
    step_s: float
    tok_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a request costs besides its output tokens."""

    prompt_tokens: float = 70.0  # chat template included
    cached_tokens: float = 32.0  # of these found in the prefix cache: the template's system prompt
    branch_prefill_tokens: float = 16.0  # recomputed per sibling: half a KV block


def operating_point(
    law: LinearLatency, mix: Mix, *, concurrency: int, width: float, footprint: Footprint | None = None
) -> OperatingPoint:
    """Mean rows, step time and throughput when branching requests run `width` rows (inf: all of them)."""
    cost = footprint or Footprint()
    width = min(width, mix.mean_fan_out)
    serial_steps = (1 - mix.branching_share) * mix.mean_serial_tokens
    branching_steps = mix.branching_share * mix.mean_branch_tokens * mix.mean_fan_out / width
    branching = branching_steps / (serial_steps + branching_steps)
    rows = concurrency * (1 - branching + width * branching)
    context = rows * (cost.prompt_tokens + (mix.mean_serial_tokens + mix.mean_branch_tokens) / 4)
    prefill_per_request = cost.prompt_tokens - cost.cached_tokens
    prefill_per_request += mix.branching_share * mix.mean_fan_out * cost.branch_prefill_tokens
    # rows tokens leave per step, so rows / mean_tokens requests start per step
    prefill = prefill_per_request * rows / mix.mean_tokens
    step_s = law.scale * (
        law.base_s + law.row_s * rows + law.context_s * context + law.prefill_scale * law.prefill_s * prefill
    )
    return OperatingPoint(rows=rows, step_s=step_s, tok_s=rows / step_s)


def contended(
    law: LinearLatency,
    *,
    mix: Mix | None = None,
    fill: float = 0.4,
    slo_between: float = 0.6,
    load: float = 2.0,
    longest_s: float = 15.0,
    ttft_slo_s: float = 60.0,
    footprint: Footprint | None = None,
) -> Regime:
    """The contended regime of a machine with this law.

    `slo_between` places the SLO between the mean step of off (0) and of eager (1); `load` is the offered load
    over the throughput at a step as long as that SLO. Where a mean branching request would take more than
    `longest_s` at width 1, all lengths shrink by the same factor: a window of seconds has to hold many requests.
    Raises ConfigError where the law leaves no room.
    """
    mix = mix or Mix()
    cost = footprint or Footprint()
    mean_context = cost.prompt_tokens + (mix.mean_serial_tokens + mix.mean_branch_tokens) / 4
    row_s = law.row_s + law.context_s * mean_context
    if row_s <= 0:
        raise ConfigError("the latency law prices rows at zero: no load makes branches compete")
    concurrency = int(min(256, max(4, round(fill * law.base_s / row_s))))
    off = operating_point(law, mix, concurrency=concurrency, width=1, footprint=cost)
    alone_s = mix.mean_fan_out * mix.mean_branch_tokens * off.step_s
    if mix.branching_share and alone_s > longest_s:
        mix = mix.scaled(longest_s / alone_s)
        off = operating_point(law, mix, concurrency=concurrency, width=1, footprint=cost)
    eager = operating_point(law, mix, concurrency=concurrency, width=float("inf"), footprint=cost)
    tpot_s = round(off.step_s + slo_between * (eager.step_s - off.step_s), 4)
    if not off.step_s < tpot_s < eager.step_s:
        raise ConfigError("no SLO fits between off and eager: the mix has no branches worth regulating")
    share = (tpot_s - off.step_s) / (eager.step_s - off.step_s)
    at_slo_tok_s = (off.rows + share * (eager.rows - off.rows)) / tpot_s
    rate_rps = round(load * at_slo_tok_s / mix.mean_tokens, 3)
    reason = (
        f"law: off {off.step_s * 1e3:.1f} ms/step at {off.rows:.0f} rows,"
        f" eager {eager.step_s * 1e3:.1f} ms at {eager.rows:.0f};"
        f" SLO {tpot_s * 1e3:.1f} ms lies {slo_between:.0%} of the way;"
        f" offered {rate_rps:.2f} req/s = {load:.2f} x what fits the SLO,"
        f" at most {concurrency} requests in service; bound {at_slo_tok_s / off.tok_s:.2f} x off"
    )
    return Regime(
        name="contended",
        mix=mix,
        rate_rps=rate_rps,
        max_concurrency=concurrency,
        slo=Slo(tpot_s=tpot_s, ttft_s=ttft_slo_s),
        reason=reason,
    )

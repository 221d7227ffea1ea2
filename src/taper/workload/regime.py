"""Which load puts a given machine into the regime where regulating branches can pay, and why.

The reasoning, with the calibrated law T = a + b*rows + c*context + d*prefill. At most K requests are in
service, for every policy alike; arrivals come faster than they can be served, so about K always are.

* `off` runs one row per request: K rows. Its step is short, every serial request is well within a tight
  SLO, and most of the step is the fixed cost a: throughput is left on the table.
* `eager` runs every branch. A request with L output tokens and a critical path of C (the longest branch of each
  stage, one after the other) is in service for C steps instead of L: K * L / C rows, with means over requests.
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

from dataclasses import dataclass, replace

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Slo, check_range
from taper.workload.demand import Demand
from taper.workload.source import Source, Synthetic

MAX_CONCURRENCY = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A load and a promise: everything the demo and the bench need to know about one operating point."""

    name: str
    source: Source
    rate_rps: float
    max_concurrency: int  # requests in service at once, for every policy; the others wait at the client
    slo: Slo
    reason: str = ""  # how it was chosen, for the reader of the output


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """Steady state of one policy with K requests in service, from the law."""

    rows: float
    step_s: float
    tok_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a request costs besides its prompt and its output tokens."""

    template_tokens: float = 32.0  # chat template around the prompt, found in the prefix cache
    branch_prefill_tokens: float = 16.0  # recomputed per sibling: half a KV block


def operating_point(
    law: LinearLatency, demand: Demand, *, concurrency: int, eager: bool, footprint: Footprint | None = None
) -> OperatingPoint:
    """Mean rows, step time and throughput with one row per request, or with every branch in every step."""
    cost = footprint or Footprint()
    rows = concurrency * (demand.eager_width if eager else 1.0)
    prefill_per_request = demand.prompt_tokens + demand.join_tokens + demand.siblings * cost.branch_prefill_tokens
    # rows tokens leave per step, so rows / tokens requests start per step
    step_s = law.scale * (
        law.base_s
        + law.rows_s(rows)
        + law.context_s * rows * (demand.context_tokens + cost.template_tokens)
        + law.prefill_scale * law.prefill_s * prefill_per_request * rows / demand.tokens
    )
    return OperatingPoint(rows=rows, step_s=step_s, tok_s=rows / step_s)


def concurrency_for(law: LinearLatency, demand: Demand, *, fill: float, footprint: Footprint | None = None) -> int:
    """Rows that add `fill` of the base to a step, 4 to 256 of them. Raises ConfigError where rows are free."""
    context_tokens = demand.context_tokens + (footprint or Footprint()).template_tokens
    rows = law.rows_within(fill * law.base_s, context_tokens)
    return int(min(MAX_CONCURRENCY, max(4, round(rows))))


def contended(
    law: LinearLatency,
    *,
    source: Source | None = None,
    concurrency: int | None = None,
    fill: float = 0.4,
    slo_between: float = 0.6,
    tpot_slo_s: float | None = None,
    load: float = 2.0,
    rate_rps: float | None = None,
    longest_s: float | None = 8.0,
    ttft_slo_s: float = 60.0,
    footprint: Footprint | None = None,
) -> Regime:
    """The contended regime of a machine with this law.

    `slo_between` places the SLO between the mean step of off (0) and of eager (1), unless `tpot_slo_s` gives it;
    `load` is the offered load over the throughput at a step as long as that SLO, unless `rate_rps` gives the rate.
    Where a mean request would decode for more than `longest_s` at width 1, all outputs shrink by the same factor: a
    window of seconds has to hold many requests. Raises ConfigError where the law leaves no room.
    """
    source = source or Synthetic()
    demand = source.demand()
    requests = concurrency or concurrency_for(law, demand, fill=fill, footprint=footprint)
    if longest_s is not None:
        factor = output_factor(source, law, concurrency=requests, longest_s=longest_s, footprint=footprint)
        source = source.scaled(factor)
        demand = source.demand()
    off, eager = (
        operating_point(law, demand, concurrency=requests, eager=width, footprint=footprint) for width in (False, True)
    )
    if tpot_slo_s is None:
        tpot_slo_s = round(off.step_s + slo_between * (eager.step_s - off.step_s), 4)
        if not off.step_s < tpot_slo_s < eager.step_s:
            raise ConfigError("no SLO fits between off and eager: the mix has no branches worth regulating")
    at_slo_tok_s = tok_s_at(tpot_slo_s, off, eager)
    if rate_rps is None:
        rate_rps = round(load * at_slo_tok_s / demand.tokens, 3)
    reason = (
        f"law: off {off.step_s * 1e3:.1f} ms/step at {off.rows:.0f} rows,"
        f" eager {eager.step_s * 1e3:.1f} ms at {eager.rows:.0f};"
        f" SLO {tpot_slo_s * 1e3:.1f} ms;"
        f" offered {rate_rps:.2f} req/s = {rate_rps * demand.tokens / at_slo_tok_s:.2f} x what fits the SLO,"
        f" at most {requests} requests in service; bound {at_slo_tok_s / off.tok_s:.2f} x off"
    )
    return Regime(
        name="contended",
        source=source,
        rate_rps=rate_rps,
        max_concurrency=requests,
        slo=Slo(tpot_s=tpot_slo_s, ttft_s=ttft_slo_s),
        reason=reason,
    )


def tok_s_at(tpot_slo_s: float, off: OperatingPoint, eager: OperatingPoint) -> float:
    """Throughput at a step as long as the SLO: rows interpolated between off and eager, never beyond either."""
    check_range("tpot_slo_s", tpot_slo_s, low=1e-4, high=60, unit="s")
    if eager.step_s <= off.step_s or tpot_slo_s <= off.step_s:
        return off.tok_s
    share = min(1.0, (tpot_slo_s - off.step_s) / (eager.step_s - off.step_s))
    return (off.rows + share * (eager.rows - off.rows)) / (off.step_s + share * (eager.step_s - off.step_s))


def output_factor(
    source: Source, law: LinearLatency, *, concurrency: int, longest_s: float, footprint: Footprint | None = None
) -> float:
    """The factor, at most 1, on outputs with which a mean request decodes for `longest_s` at width 1, within a tenth.

    Prefill is left out: it does not get less with shorter outputs.
    """
    decode = replace(law, prefill_s=0.0)
    factor = 1.0
    for _ in range(6):  # shorter outputs have less context, too
        demand = source.scaled(factor).demand()
        step_s = operating_point(decode, demand, concurrency=concurrency, eager=False, footprint=footprint).step_s
        alone_s = demand.off_steps * step_s
        if alone_s <= 1.1 * longest_s:
            break
        factor *= longest_s / alone_s
    return factor

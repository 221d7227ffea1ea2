"""Records -> goodput, attainment, percentiles and misses by cause. Pure.

Definitions, the same for every policy and every table:

* effective TPOT of a request = (last token - first token) / (tokens - 1) over the tokens of all its branches.
* A request *meets its SLO* when it ended without error, its effective TPOT is within `tpot_slo_s` and, only
  where the record sets `ttft_slo_s`, its first token came within that time of its planned arrival.
* attainment = requests that met / requests judged. Judged are requests with more than one token and every
  request that failed, timed out or was rejected; those are misses.
* goodput = tokens of requests that met their SLO, per second of wall time. raw = all tokens per second.

Which seconds. Without a window: from the first planned arrival to the last completion, every token counts.
With a window (start, end), a request counts when it was in service at any moment of it, it is judged over its
*whole* life, ramp-up and drain included, and its tokens count as far as they fell into the window (the tokens
of a branch are taken as evenly spaced between its first and its last). A window keeps the emptying of
the machine at the end, which lasts as long as the slowest request, out of the throughput: on short runs that
tail alone would flatter wide policies against narrow ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taper.records import ChoiceRecord, RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The measured seconds on the client's clock, [start_s, end_s)."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What one policy did in one window. None where nothing was there to measure."""

    window_s: float
    requests: int
    judged: int
    met: int
    goodput_tok_s: float
    raw_tok_s: float
    attainment: float | None
    attainment_serial: float | None
    attainment_branching: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_sent_p50_s: float | None  # from the sending, the client's queue left out
    ttft_sent_p95_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    itl_p99_s: float | None
    victims: int  # serial requests that overlapped a branching one
    victim_tpot_p50_s: float | None
    victim_tpot_p95_s: float | None
    misses_error: int
    misses_ttft: int
    misses_tpot: int


def miss_cause(record: RequestRecord) -> str | None:
    """`error`, `ttft` or `tpot` (the first that applies), or None when the request met its SLO."""
    if record.error is not None:
        return "error"
    if record.ttft_slo_s is not None and (record.ttft_s is None or record.ttft_s > record.ttft_slo_s):
        return "ttft"
    if record.tpot_s is not None and record.tpot_s > record.tpot_slo_s:
        return "tpot"
    return None


def judged(record: RequestRecord) -> bool:
    """Whether the request is in attainment's denominator."""
    return record.error is not None or record.tokens > 1


def tokens_between(choice: ChoiceRecord, window: Window) -> int:
    """Tokens of a branch inside [start, end), evenly spaced between its first and its last."""
    return _tokens_before(choice, window.end_s) - _tokens_before(choice, window.start_s)


def _tokens_before(choice: ChoiceRecord, at_s: float) -> int:
    if at_s <= choice.first_token_s:
        return 0
    if at_s > choice.last_token_s:
        return choice.tokens
    gap_s = (choice.last_token_s - choice.first_token_s) / max(1, choice.tokens - 1)
    return min(choice.tokens, math.ceil((at_s - choice.first_token_s) / gap_s))


def whole_run(records: Sequence[RequestRecord]) -> Window:
    """First planned arrival to last completion; the last token itself lies inside."""
    if not records:
        raise ValueError("no records: a run without a request has no window")
    end_s = max(record.ended_s for record in records)
    return Window(start_s=min(record.scheduled_s for record in records), end_s=end_s)


def in_service(record: RequestRecord, window: Window) -> bool:
    return record.sent_s < window.end_s and record.ended_s >= window.start_s


def summarize(records: Iterable[RequestRecord], window: Window | None = None) -> Summary:
    """Summary of the records of one policy in one window. Raises ValueError for an empty window."""
    everyone = list(records)
    span = window or whole_run(everyone)
    if not span.seconds > 0:
        raise ValueError(f"a window needs a length above zero, not {span.seconds!r} s")
    counted = everyone if window is None else [one for one in everyone if in_service(one, window)]
    causes = [miss_cause(one) for one in counted]
    tokens = [_tokens(one, window) for one in counted]
    victims = [one for one in victims_of(counted) if one.tpot_s is not None]
    met = [one for one, cause in zip(counted, causes, strict=True) if cause is None and judged(one)]
    good_tokens = sum(count for count, cause in zip(tokens, causes, strict=True) if cause is None)
    tpot_p50_s, tpot_p95_s = _percentiles((one.tpot_s for one in counted), 50, 95)
    ttft_p50_s, ttft_p95_s = _percentiles((one.ttft_s for one in counted), 50, 95)
    sent_p50_s, sent_p95_s = _percentiles((one.ttft_sent_s for one in counted), 50, 95)
    victim_p50_s, victim_p95_s = _percentiles((one.tpot_s for one in victims), 50, 95)
    gaps_s = (gap / 1e3 for one in counted for choice in one.choices for gap in choice.gaps_ms)
    (itl_p99_s,) = _percentiles(gaps_s, 99)
    return Summary(
        window_s=span.seconds,
        requests=len(counted),
        judged=sum(judged(one) for one in counted),
        met=len(met),
        goodput_tok_s=good_tokens / span.seconds,
        raw_tok_s=sum(tokens) / span.seconds,
        attainment=_attainment(counted, lambda one: True),
        attainment_serial=_attainment(counted, lambda one: one.kind == "serial"),
        attainment_branching=_attainment(counted, lambda one: one.kind == "branching"),
        ttft_p50_s=ttft_p50_s,
        ttft_p95_s=ttft_p95_s,
        ttft_sent_p50_s=sent_p50_s,
        ttft_sent_p95_s=sent_p95_s,
        tpot_p50_s=tpot_p50_s,
        tpot_p95_s=tpot_p95_s,
        itl_p99_s=itl_p99_s,
        victims=len(victims),
        victim_tpot_p50_s=victim_p50_s,
        victim_tpot_p95_s=victim_p95_s,
        misses_error=causes.count("error"),
        misses_ttft=causes.count("ttft"),
        misses_tpot=causes.count("tpot"),
    )


def victims_of(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Serial requests in service at the same time as some branching one."""
    branching = [one for one in records if one.kind == "branching"]
    starts_s = sorted(one.sent_s for one in branching)
    ends_s = sorted(one.ended_s for one in branching)

    def overlaps(one: RequestRecord) -> bool:
        """More of them began before its end than were over by its beginning."""
        return bisect_left(starts_s, one.ended_s) > bisect_right(ends_s, one.sent_s)

    return [one for one in records if one.kind == "serial" and overlaps(one)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number measured several times."""

    median: float
    low: float
    high: float
    q1: float
    q3: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, range and quartiles of the values that exist; None without any."""
    known = np.asarray([value for value in values if value is not None], dtype=float)
    if known.size == 0:
        return None
    low, q1, median, q3, high = (float(x) for x in np.percentile(known, [0, 25, 50, 75, 100]))
    return Spread(median=median, low=low, high=high, q1=q1, q3=q3, n=int(known.size))


def paired_ratios(above: Mapping[int, float | None], below: Mapping[int, float | None]) -> dict[int, float]:
    """above / below for every round in which both were measured and `below` is not zero.

    Pairing within a round takes out what the machine did to both.
    """
    return {
        key: over / under
        for key in sorted(above.keys() & below.keys())
        if (over := above[key]) is not None and (under := below[key])
    }


def _tokens(record: RequestRecord, window: Window | None) -> int:
    if window is None:
        return record.tokens
    return sum(tokens_between(choice, window) for choice in record.choices)


def _attainment(records: Sequence[RequestRecord], belongs: Callable[[RequestRecord], bool]) -> float | None:
    jury = [one for one in records if belongs(one) and judged(one)]
    return sum(miss_cause(one) is None for one in jury) / len(jury) if jury else None


def _percentiles(values: Iterable[float | None], *ranks: float) -> tuple[float | None, ...]:
    known = [value for value in values if value is not None]
    if not known:
        return (None,) * len(ranks)
    return tuple(float(value) for value in np.percentile(known, ranks))

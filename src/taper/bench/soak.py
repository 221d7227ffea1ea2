"""A long run under overload: clients that give up, and the account of what they and the server's memory did.

More is offered than fits, for as long as one likes, so a soak needs two things that a bench window does without.
A request that has waited `patience_s` in the client's queue is *rejected* there and never sent: the queue, and with it
TTFT, stays bounded, and every rejection is declared. And a share of the clients *abort* at a random moment of their
stream, as people do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from taper.bench.client import Clock, LoadClient, Sending
from taper.goodput import Window, in_service, judged, miss_cause
from taper.records import RequestRecord
from taper.workload.request import Request

REJECTED, ABORTED = "rejected", "aborted"  # how the error of such a record begins
_STREAM = 3  # keeps who aborts, and when, apart from a request's shape
_HOUR_S = 3600.0
_BLOCK_S = 60.0


class SoakClient:
    """A `LoadClient` whose users have little patience, and some of them less."""

    def __init__(self, client: LoadClient, *, patience_s: float, abort_share: float, step_s: float) -> None:
        """`step_s`: the shortest that a step takes under load, of which an aborted stream gets a random share."""
        self._client = client
        self._patience_s = patience_s
        self._abort_share = abort_share
        self._step_s = step_s

    @property
    def clock(self) -> Clock:
        return self._client.clock

    async def run(self, request: Request, sending: Sending) -> RequestRecord:
        """Play one request, or reject it where it has waited too long; never raises for a request."""
        now_s = self.clock()
        waited_s = now_s - sending.scheduled_s
        if waited_s > self._patience_s:
            error = f"{REJECTED}: waited {waited_s:.0f} s for a place in service"
            return self._client.unsent(request, sending, error=error)
        after_s = abort_after_s(request, share=self._abort_share, step_s=self._step_s)
        if after_s is None or now_s + after_s >= sending.deadline_s:
            return await self._client.run(request, sending)
        record = await self._client.run(request, replace(sending, deadline_s=now_s + after_s))
        if record.error and record.error.startswith("time-out"):
            return replace(record, error=f"{ABORTED}: by its client {after_s:.1f} s after it was sent")
        return record


def abort_after_s(request: Request, *, share: float, step_s: float) -> float | None:
    """When the request's client gives up, from its sending; None for one that stays. Follows from (seed, index)."""
    rng = np.random.default_rng((request.seed, request.index, _STREAM))
    if rng.random() >= share:
        return None
    return float(rng.random()) * request.critical_path_tokens * step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What became of some requests.

    attainment is the bench's, over the requests that were served to their end or to a failure; of all offered,
    `attainment_offered` counts rejections as misses too. A request that its own client aborted is in neither.
    """

    offered: int
    rejected: int
    aborted: int
    failed: int
    met: int
    attainment: float | None
    attainment_offered: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None


def share_of(records: Iterable[RequestRecord]) -> Share:
    everyone = list(records)
    ends = Counter(outcome(one) for one in everyone)
    served = [one for one in everyone if outcome(one) not in (REJECTED, ABORTED) and judged(one)]
    met = sum(miss_cause(one) is None for one in served)
    tpots = [one.tpot_s for one in served if one.error is None and one.tpot_s is not None]
    p50_s, p95_s = (float(one) for one in np.percentile(tpots, (50, 95))) if tpots else (None, None)
    return Share(
        offered=len(everyone),
        rejected=ends[REJECTED],
        aborted=ends[ABORTED],
        failed=sum(count for end, count in ends.items() if end not in (None, REJECTED, ABORTED)),
        met=met,
        attainment=met / len(served) if served else None,
        attainment_offered=met / (len(served) + ends[REJECTED]) if served or ends[REJECTED] else None,
        tpot_p50_s=p50_s,
        tpot_p95_s=p95_s,
    )


def outcome(record: RequestRecord) -> str | None:
    """The kind of its error (`rejected`, `aborted`, `time-out`, `http 400`, ...); None where it was answered."""
    return record.error.partition(":")[0] if record.error is not None else None


def by_class(
    records: Iterable[RequestRecord], classes: Mapping[str, float], *, slo_tpot_s: float, window: Window
) -> list[dict[str, Any]]:
    """A row per class and kind, and per class; `classes` are factors on the SLO. Of requests in service in `window`."""
    inside = [one for one in records if in_service(one, window)]
    rows: list[dict[str, Any]] = []
    for name, factor in classes.items():
        mine = [one for one in inside if abs(one.tpot_slo_s / slo_tpot_s - factor) < 1e-6]
        for kind in ("serial", "branching", "all"):
            some = [one for one in mine if kind in (one.kind, "all")]
            rows.append({"class": name, "kind": kind, **asdict(share_of(some))})
    return rows


def by_minute(
    records: Iterable[RequestRecord], classes: Mapping[str, float], *, slo_tpot_s: float, begin_s: float
) -> list[dict[str, Any]]:
    """A row per minute (of the end of a request), class and kind in which something ended."""
    minutes: dict[int, list[RequestRecord]] = {}
    for record in records:
        minutes.setdefault(int((record.ended_s - begin_s) // _BLOCK_S), []).append(record)
    everything = Window(start_s=float("-inf"), end_s=float("inf"))
    return [
        {"minute": minute, **row}
        for minute, some in sorted(minutes.items())
        for row in by_class(some, classes, slo_tpot_s=slo_tpot_s, window=everything)
        if row["offered"] and row["kind"] != "all"
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """A straight line through a quantity's one-minute means: means, because neighbouring samples are much alike and
    would make the standard error too small."""

    mean: float
    per_hour: float
    stderr_per_hour: float | None  # None with two minutes, where there is no residual
    minutes: int


def slope_of(times_s: Sequence[float], values: Sequence[float], *, after_s: float) -> Slope | None:
    """Least squares over the samples from `after_s` on; None where they lie in fewer than two minutes."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at_s, value in zip(times_s, values, strict=True):
        if at_s >= after_s:
            blocks.setdefault(int((at_s - after_s) // _BLOCK_S), []).append((at_s, value))
    if len(blocks) < 2:
        return None
    x, y = np.asarray([np.mean(some, axis=0) for some in blocks.values()]).T
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    residuals = y - y.mean() - slope * dx
    freedom = len(x) - 2
    stderr = float(np.sqrt(residuals @ residuals / freedom / (dx @ dx))) if freedom else None
    return Slope(
        mean=float(y.mean()),
        per_hour=slope * _HOUR_S,
        stderr_per_hour=None if stderr is None else stderr * _HOUR_S,
        minutes=len(x),
    )

"""N engines behind a router, on one clock: whichever engine is furthest behind takes the next step.

A router that is not group-affine spreads a request's branches: those that meet on one engine are one group there, with
a protected row and an SLO clock of its own, and a prefix that the engine does not hold is computed there first. An
engine holds what it computed for the request before: its prefix, and the branches that ran there.

Whatever the router, a request takes a slot of the engine that took its first stage, from there to its end. (Should it
fork on arrival, each part of that first stage takes one, and a request with a part never served is not counted.)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from taper.records import RequestRecord
from taper.sim.loop import Simulation
from taper.sim.routers import Router
from taper.workload import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How many engines, and what places requests on them."""

    replicas: int = 1
    router: str = "round-robin"


@dataclass(slots=True, kw_only=True)
class Spread:
    """A request whose stages are placed one branch at a time."""

    spec: Request
    home: int = -1  # the engine whose slot it takes
    stage: int = 0
    prefix_tokens: int
    held_tokens: dict[int, int] = field(default_factory=dict)  # per engine, of the prefix
    pending: int = 0  # parts of this stage in service
    records: list[RequestRecord] = field(default_factory=list)  # of the parts that ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The branches of one stage that met on one engine."""

    spread: Spread
    engine: int


class FleetSimulation:
    """Engines must be built for a load without end; the load stops here, at `duration_s`."""

    def __init__(
        self, engines: list[Simulation], router: Router, requests: Iterable[Request], *, duration_s: float
    ) -> None:
        self.engines = engines
        self.records: list[RequestRecord] = []
        self._router = router
        self._duration_s = duration_s
        self._arrivals = iter(requests)
        self._upcoming = next(self._arrivals, None)
        self._serial = itertools.count()
        self._forks: list[tuple[float, int, Spread]] = []  # stages to place: (due, tie-break, request)
        self._busy: list[tuple[float, int]] = []  # (clock, engine), a heap
        self._is_busy = [False] * len(engines)
        self._is_closed = [False] * len(engines)
        self._parts: dict[int, Part] = {}
        self._seen = [0] * len(engines)  # records of each engine that were looked at

    def run(self) -> list[RequestRecord]:
        """Records of the requests, by completion."""
        while True:
            due_s = self._due_s()
            if self._busy and self._busy[0][0] < due_s:
                self._step(due_s)
            elif math.isfinite(due_s):
                self._place_next(due_s)
            else:
                return self.records

    def _due_s(self) -> float:
        arrival_s = self._upcoming.arrival_s if self._upcoming else math.inf
        fork_s = self._forks[0][0] if self._forks else math.inf
        return min(arrival_s, fork_s)

    def _step(self, due_s: float) -> None:
        """The engine that is furthest behind goes on until another is, or a request arrives, or one ends."""
        clock_s, index = heapq.heappop(self._busy)
        engine = self.engines[index]
        if clock_s >= self._duration_s and not self._is_closed[index]:
            self._is_closed[index] = True
            engine.withdraw(None if self._router.is_affine else self._has_started)
        until_s = due_s if self._router.is_affine else min(due_s, self._busy[0][0] if self._busy else math.inf)
        if not self._is_closed[index]:
            until_s = min(until_s, self._duration_s)
        engine.advance(max(until_s, math.nextafter(clock_s, math.inf)), stop_at_finish=not self._router.is_affine)
        self._collect(index)
        if engine.has_work:
            heapq.heappush(self._busy, (engine.now_s, index))
        else:
            self._is_busy[index] = False
        self._router.changed(index, engine)

    def _place_next(self, due_s: float) -> None:
        if self._forks and self._forks[0][0] <= due_s:
            self._place_stage(heapq.heappop(self._forks)[2], due_s)
            return
        request = self._upcoming
        assert request is not None  # noqa: S101 - narrows the type, checks no input
        self._upcoming = next(self._arrivals, None)
        if self._router.is_affine:
            self._submit(self._router.place(), request, due_s)
        else:
            self._place_stage(Spread(spec=request, prefix_tokens=request.prompt_tokens), due_s)

    def _submit(
        self, index: int, request: Request, now_s: float, *, held_tokens: int = 0, continues: bool = False
    ) -> None:
        engine = self.engines[index]
        engine.submit(request, held_tokens=held_tokens, continues=continues)
        if not self._is_busy[index]:
            self._is_busy[index] = True
            heapq.heappush(self._busy, (max(engine.now_s, now_s), index))
        self._router.changed(index, engine)

    # --- spread requests ---

    def _place_stage(self, spread: Spread, now_s: float) -> None:
        placed: dict[int, list[int]] = {}
        for tokens in spread.spec.stages[spread.stage]:
            index = self._router.place()
            placed.setdefault(index, []).append(tokens)
        if spread.home < 0:
            spread.home = next(iter(placed))
        spread.pending = len(placed)
        for index, branches in placed.items():
            part = replace(
                spread.spec,
                index=next(self._serial),
                arrival_s=now_s,
                prompt_tokens=spread.prefix_tokens,
                stages=(tuple(branches),),
            )
            self._parts[part.index] = Part(spread=spread, engine=index)
            held_tokens = spread.held_tokens.get(index, 0)
            self._submit(index, part, now_s, held_tokens=held_tokens, continues=spread.stage > 0)

    def _has_started(self, part: Request) -> bool:
        return self._parts[part.index].spread.stage > 0

    def _collect(self, index: int) -> None:
        """What ended on an engine: requests, or parts whose requests go on."""
        records = self.engines[index].trace.records
        fresh = records[self._seen[index] :]
        self._seen[index] = len(records)
        if self._router.is_affine:
            self.records += fresh
            return
        for record in fresh:
            self._end_part(self._parts.pop(record.index), record)

    def _end_part(self, part: Part, record: RequestRecord) -> None:
        spread = part.spread
        home = self.engines[spread.home]
        if spread.stage == 0 and part.engine == spread.home:
            home.queue.slots_taken += 1  # the engine gave it back with the part
        spread.records.append(record)
        spread.held_tokens[part.engine] = spread.prefix_tokens + record.tokens
        spread.pending -= 1
        if spread.pending:
            return
        spread.prefix_tokens += sum(spread.spec.stages[spread.stage])
        spread.stage += 1
        if spread.stage < len(spread.spec.stages):
            heapq.heappush(self._forks, (record.ended_s, next(self._serial), spread))
            return
        home.queue.slots_taken -= 1
        self.records.append(_joined(spread))


def _joined(spread: Spread) -> RequestRecord:
    """One record of all the parts."""
    first, last = spread.records[0], spread.records[-1]
    choices = [choice for record in spread.records for choice in record.choices]
    spec = spread.spec
    return replace(
        first,
        id=str(spec.index),
        index=spec.index,
        kind=spec.kind,
        branches=spec.branches,
        prompt_tokens=spec.prompt_tokens,
        scheduled_s=spec.arrival_s,
        sent_s=min(record.sent_s for record in spread.records),
        ended_s=last.ended_s,
        choices=tuple(replace(choice, index=index) for index, choice in enumerate(choices)),
    )

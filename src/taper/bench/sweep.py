"""Policies x load x branch share x SLO, in windows: the plan, the run, and the rule that rejects a window.

Rounds are outermost and policies innermost, so every comparison within a round is between neighbours in time, and a
sweep that is stopped half-way has covered every point. The order of the policies rotates from round to round.

Contamination. A window in which processes other than the server and the load generator (and time that a hypervisor
took) had more than `foreign_limit` of the machine's CPU says nothing about a policy. It is kept, marked as not
accepted, and repeated, `tries` times in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from taper.bench.campaign import one_line, order
from taper.bench.driver import WindowPlan
from taper.bench.live import Display
from taper.bench.measure import Job, Target, measure
from taper.bench.store import Store
from taper.bench.verdict import FOREIGN_CPU_LIMIT
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Slo, check_range
from taper.results import Conditions, Run
from taper.workload.demand import Demand
from taper.workload.regime import Regime, contended, operating_point, tok_s_at
from taper.workload.source import Source

_UNJUDGED_TTFT_S = 60.0  # the controller still wants one; far above what a loaded server shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load, branch share and SLO. Load and SLO are relative to the law, or absolute."""

    share: float | None = None  # None: the source's own
    load: float | None = None  # x what fits the SLO by the law
    rate_rps: float | None = None
    slo_at: float | None = None  # between off's step (0) and eager's (1)
    slo_tpot_s: float | None = None

    def __post_init__(self) -> None:
        for absolute, relative in (("rate_rps", "load"), ("slo_tpot_s", "slo_at")):
            if (getattr(self, absolute) is None) == (getattr(self, relative) is None):
                raise ConfigError(f"a point needs either {relative} or {absolute}")
        if self.load is not None:
            check_range("load", self.load, low=0.01, high=100, unit="x what fits the SLO")
        if self.slo_at is not None:
            check_range("slo_at", self.slo_at, low=0.01, high=0.99, unit="of the way from off's step to eager's")

    @property
    def name(self) -> str:
        parts = {"share": self.share, "load": self.load, "rate": self.rate_rps, "slo": self.slo_at}
        parts["slo-ms"] = None if self.slo_tpot_s is None else self.slo_tpot_s * 1e3
        return "-".join(f"{name}{value:g}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Everything to measure."""

    source: Source
    points: Sequence[Point]
    policies: Sequence[str]
    rounds: int = 3
    seed: int = 0
    plan: WindowPlan
    law: LinearLatency | None = None  # None: points must be absolute
    concurrency: int | None = None  # None: from the law
    fill: float = 0.4
    ttft_slo_s: float | None = None  # None: reported, not judged
    foreign_limit: float = FOREIGN_CPU_LIMIT
    tries: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= 1000:
            raise ConfigError(f"rounds must be between 1 and 1000, not {self.rounds!r}")
        if not 1 <= self.tries <= 100:
            raise ConfigError(f"tries must be between 1 and 100, not {self.tries!r}")
        if not self.points or not self.policies or len(set(self.policies)) != len(self.policies):
            raise ConfigError("a sweep needs points, and policies that are each named once")
        if len({point.name for point in self.points}) != len(self.points):
            raise ConfigError("two points of the sweep are the same")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A window of the sweep's plan."""

    point: Point
    round: int
    policy: str

    @property
    def name(self) -> str:
        return f"{self.point.name}/round{self.round}/{self.policy}"


class Fleet(Protocol):
    """Whoever has the servers."""

    async def target(self, policy: str) -> Target:
        """The server that runs `policy`, warm."""
        ...


def slots(sweep: Sweep) -> Iterator[Slot]:
    """Every window, in the order in which they run."""
    for round_, point in itertools.product(range(sweep.rounds), sweep.points):
        for policy in order(sweep.policies, round_):
            yield Slot(point=point, round=round_, policy=policy)


def source_at(sweep: Sweep, point: Point) -> Source:
    return sweep.source if point.share is None else sweep.source.shared(point.share)


def regime_at(sweep: Sweep, point: Point) -> Regime:
    """Load, SLO and bound on requests in service at a point. Raises ConfigError where that takes a law."""
    source = source_at(sweep, point)
    if sweep.law is not None:
        return contended(
            sweep.law,
            source=source,
            concurrency=sweep.concurrency,
            fill=sweep.fill,
            slo_between=point.slo_at or 0.5,
            tpot_slo_s=point.slo_tpot_s,
            load=point.load or 1.0,
            rate_rps=point.rate_rps,
            longest_s=None,
            ttft_slo_s=sweep.ttft_slo_s or _UNJUDGED_TTFT_S,
        )
    if point.rate_rps is None or point.slo_tpot_s is None or sweep.concurrency is None:
        raise ConfigError("without a latency profile a sweep needs absolute rates, an absolute SLO and a concurrency")
    return Regime(
        name="absolute",
        source=source,
        rate_rps=point.rate_rps,
        max_concurrency=sweep.concurrency,
        slo=Slo(tpot_s=point.slo_tpot_s, ttft_s=sweep.ttft_slo_s or _UNJUDGED_TTFT_S),
        reason="absolute rate and SLO",
    )


def bound_tok_s(sweep: Sweep, regime: Regime) -> float | None:
    """Goodput that no policy can pass by the law: rows at a step as long as the SLO, or all that is offered."""
    if sweep.law is None:
        return None
    demand: Demand = regime.source.demand()
    off, eager = (
        operating_point(sweep.law, demand, concurrency=regime.max_concurrency, eager=wide) for wide in (False, True)
    )
    return min(tok_s_at(regime.slo.tpot_s, off, eager), regime.rate_rps * demand.tokens)


async def run_sweep(sweep: Sweep, fleet: Fleet, store: Store, display: Display) -> list[Run]:
    """Every window that the store does not hold yet. Returns all runs of the store, rejected ones included.

    Raises ControlError when a server refuses a policy or stops answering; what was measured stays in the store.
    """
    for slot in slots(sweep):
        while not store.accepted(slot.name) and (attempt := store.attempts(slot.name)) < sweep.tries:
            run = await _window(sweep, slot, attempt, fleet, store, display)
            note = "" if run.conditions.accepted else "  REJECTED: the machine was busy with something else"
            display.window_ended(f"{slot.point.name}  {one_line(run)}{note}")
    return store.runs


async def _window(sweep: Sweep, slot: Slot, attempt: int, fleet: Fleet, store: Store, display: Display) -> Run:
    regime = regime_at(sweep, slot.point)
    seed = sweep.seed + slot.round
    requests = tuple(regime.source.requests(seed=seed, rate_rps=regime.rate_rps, horizon_s=sweep.plan.load_s))
    name = f"{slot.name}/try{attempt}"
    target = await fleet.target(slot.policy)
    display.window_started(name)
    bound = bound_tok_s(sweep, regime)
    conditions = Conditions(
        policy=slot.policy,
        load=slot.point.load,
        rate_rps=regime.rate_rps,
        share=slot.point.share,
        slo_tpot_s=regime.slo.tpot_s,
        slo_ttft_s=sweep.ttft_slo_s,
        slo_at=slot.point.slo_at,
        concurrency=regime.max_concurrency,
        bound_tok_s=bound,
        seed=seed,
        round=slot.round,
        window=name,
        attempt=attempt,
    )
    job = Job(regime=regime, requests=requests, plan=sweep.plan, conditions=conditions)
    measured = await measure(job, target, display, on_record=store.add_request)
    return store.finish(measured, accepted=(measured.run.engine.foreign_cpu or 0.0) <= sweep.foreign_limit)

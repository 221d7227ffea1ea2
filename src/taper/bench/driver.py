"""One measured window: open-loop arrivals, a bound on what is in service, then a drain.

Arrivals do not wait for answers. At most `max_concurrency` requests are in service, the same number for
every policy; the others wait in the client in order of arrival, and that wait counts into their time to first
token. (Without a bound, load above capacity piles up in the engine until nobody meets an SLO, whatever the
policy.)
Load runs through the ramp and the measured part, then stops; what is in service is followed to its end, since
a request is judged over its whole life. What still waits when the load stops is not sent, and is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from taper.bench.client import LoadClient, Sending
from taper.bench.control import ControlError
from taper.claims import TPOT_FIELD
from taper.goodput import Window
from taper.records import RequestRecord
from taper.workload.regime import Regime
from taper.workload.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """How long a window loads the machine before and while it counts, and how long it waits afterwards."""

    ramp_s: float = 4.0
    measure_s: float = 20.0
    drain_s: float = 30.0  # at most; a request that needs longer is a time-out

    @property
    def load_s(self) -> float:
        return self.ramp_s + self.measure_s


@dataclass(slots=True)
class Progress:
    """Where a running window stands, for whoever draws it."""

    phase: str = "ramp"
    elapsed_s: float = 0.0
    waiting: int = 0
    in_service: int = 0
    finished: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    policy: str
    round: int
    window: Window
    records: tuple[RequestRecord, ...]
    unserved: int  # due before the load stopped, still waiting in the client then
    drained_s: float  # from the end of the load to the last answer


@dataclass(slots=True)
class _Run:
    """The mutable state of one window."""

    begin_s: float
    slots: asyncio.Semaphore
    records: list[RequestRecord] = field(default_factory=list)
    sent: int = 0


async def run_window(
    client: LoadClient,
    planned: Sequence[Request],
    *,
    regime: Regime,
    plan: WindowPlan,
    policy: str,
    round_: int,
    window: str = "",
    judge_ttft: bool = False,
    on_record: Callable[[RequestRecord], None] | None = None,
    progress: Progress | None = None,
) -> WindowResult:
    """Drive `planned` through the client. The policy must already be set on the server.

    Raises ControlError where the server lets no client claim the SLOs of `planned`.
    """
    clock = client.clock
    state = progress if progress is not None else Progress()
    run = _Run(begin_s=clock(), slots=asyncio.Semaphore(regime.max_concurrency))
    stop_s = run.begin_s + plan.load_s
    salt = f"{round_}-{run.begin_s:.3f}"
    classes = len({one.slo_factor for one in planned}) > 1

    async def serve(one: Request) -> None:
        sending = Sending(
            policy=policy,
            round=round_,
            slo=regime.slo,
            scheduled_s=run.begin_s + one.arrival_s,
            deadline_s=stop_s + plan.drain_s,
            cache_salt=salt,
            judge_ttft=judge_ttft,
            claim_slo=classes,
            window=window,
        )
        state.in_service += 1
        try:
            record = await client.run(one, sending)
        finally:
            state.in_service -= 1
            run.slots.release()
        state.finished += 1
        run.records.append(record)
        if on_record:
            on_record(record)

    ticker = asyncio.create_task(_tick(state, planned, run, plan, clock))
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in planned:
                if not await _turn(run, clock, run.begin_s + one.arrival_s, stop_s):
                    break
                run.sent += 1
                tasks.create_task(serve(one))
    finally:
        ticker.cancel()
    refused = next((record.error for record in run.records if record.error and TPOT_FIELD in record.error), None)
    if refused:
        raise ControlError(f"the server refuses the SLOs of this load, see its limits.tightest_slo ({refused})")
    return WindowResult(
        policy=policy,
        round=round_,
        window=Window(start_s=run.begin_s + plan.ramp_s, end_s=stop_s),
        records=tuple(sorted(run.records, key=lambda record: record.index)),
        unserved=sum(one.arrival_s < plan.load_s for one in planned) - run.sent,
        drained_s=max(0.0, clock() - stop_s),
    )


async def _turn(run: _Run, clock: Callable[[], float], due_s: float, stop_s: float) -> bool:
    """Wait until the next request is due and a slot is free; False when the load stops first."""
    if due_s >= stop_s:
        return False
    await asyncio.sleep(max(0.0, due_s - clock()))
    try:
        async with asyncio.timeout(max(0.0, stop_s - clock())):
            await run.slots.acquire()
    except TimeoutError:
        return False
    return True


async def _tick(
    state: Progress, planned: Sequence[Request], run: _Run, plan: WindowPlan, clock: Callable[[], float]
) -> None:
    while True:
        state.elapsed_s = clock() - run.begin_s
        loading = state.elapsed_s < plan.load_s
        state.phase = "drain" if not loading else "measure" if state.elapsed_s >= plan.ramp_s else "ramp"
        due = sum(one.arrival_s <= state.elapsed_s for one in planned)
        state.waiting = due - run.sent if loading else 0
        await asyncio.sleep(0.25)

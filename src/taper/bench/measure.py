"""One window on a server: switch the policy, run the load, watch, drain, and account for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from taper.bench import machine
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import Progress, WindowPlan, WindowResult, run_window
from taper.bench.live import Display
from taper.bench.result import run_result
from taper.core.types import Slo
from taper.records import RequestRecord
from taper.results import Conditions, Run
from taper.workload.regime import Regime
from taper.workload.request import Request

_POLL_S = 0.5
_POLLS_PER_DRAIN = 20  # of the engine's step records, whose ring holds a few minutes of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server under load. `control` is None for one without TAPER: its policy is then its own business."""

    client: LoadClient
    control: ControlClient | None
    roots: tuple[int, ...] = ()  # processes of the server that are not ours, for the account of the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A window to measure."""

    regime: Regime
    requests: Sequence[Request]
    plan: WindowPlan
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A window's account and what it rests on."""

    run: Run
    result: WindowResult
    steps: list[list[dict[str, Any]]]  # records of each engine replica


@dataclass(slots=True)
class _Watch:
    """What the watcher gathers while the window runs."""

    progress: Progress = field(default_factory=Progress)
    steps: list[list[dict[str, Any]]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, engines: Iterable[list[dict[str, Any]]]) -> None:
        for number, records in enumerate(engines):
            if number == len(self.steps):
                self.steps.append([])
            self.steps[number] += records


async def measure(
    job: Job, target: Target, display: Display, *, on_record: Callable[[RequestRecord], None] | None = None
) -> Measured:
    """Raises ControlError when the server refuses the policy, stops answering, or keeps requests after the drain."""
    control, policy = target.control, job.conditions.policy
    if control is not None:
        await switch(policy, job.regime.slo, control)
        await control.steps()
    watch = _Watch()
    watcher = asyncio.create_task(_watch(control, display, watch))
    before = machine.read_cpu(target.roots)
    try:
        result = await run_window(
            target.client,
            job.requests,
            regime=job.regime,
            plan=job.plan,
            policy=policy,
            round_=job.conditions.round,
            window=job.conditions.window,
            judge_ttft=job.conditions.slo_ttft_s is not None,
            on_record=on_record,
            progress=watch.progress,
        )
    finally:
        watch.over.set()
        await watcher
    cpu = machine.cpu_share(before, machine.read_cpu(target.roots))
    snapshots: list[dict[str, Any]] = []
    if control is not None:
        snapshots = await control.engines()
        watch.add(await control.steps())
        if not await control.until_idle():
            raise ControlError(f"requests are left in the engine after the window of policy {policy}")
    run = run_result(result, conditions=job.conditions, snapshots=snapshots, steps=watch.steps, cpu=cpu)
    return Measured(run=run, result=result, steps=watch.steps)


async def switch(policy: str, slo: Slo, control: ControlClient) -> None:
    """Set policy and SLO on every engine. Raises ControlError unless each of them says it runs that policy."""
    patch: Mapping[str, Any] = {"policy": policy, "tpot_slo_s": slo.tpot_s, "ttft_slo_s": slo.ttft_s}
    for snapshot in await control.configure(patch):
        if snapshot.get("policy") != policy:
            raise ControlError(f"asked for policy {policy}, the engine runs {snapshot.get('policy')}")


async def _watch(control: ControlClient | None, display: Display, watch: _Watch) -> None:
    """Redraw twice a second; a poll that fails only leaves the line as it is."""
    polls = 0
    while not watch.over.is_set():
        snapshot: Mapping[str, Any] | None = None
        if control is not None:
            with suppress(ControlError):
                snapshot = (await control.engines())[0]
                polls += 1
                if polls % _POLLS_PER_DRAIN == 0:
                    watch.add(await control.steps())
        display.update(watch.progress, snapshot)
        with suppress(TimeoutError):
            await asyncio.wait_for(watch.over.wait(), _POLL_S)

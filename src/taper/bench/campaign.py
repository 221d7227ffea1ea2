"""Several policies on one running server, interleaved over rounds.

Within a round every policy gets the same request sequence (seed + round) and the order of the policies is
rotated from round to round, so neither a slow minute of the machine nor the order favours one of them.
Between windows the server drains, its statistics start anew, and prompts of one window are invisible to the
prefix cache of the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from taper.bench import machine
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import Progress, WindowPlan, WindowResult, run_window
from taper.bench.live import Display
from taper.bench.result import RunResult, metric, run_result
from taper.records import RequestRecord
from taper.workload.regime import Regime
from taper.workload.request import Request

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What to run. `policies` in the order of the first round."""

    regime: Regime
    policies: Sequence[str]
    rounds: int
    seed: int
    plan: WindowPlan


@dataclass(slots=True)
class Findings:
    """What has been measured so far; grows window by window."""

    runs: list[RunResult] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)


def order(policies: Sequence[str], round_: int) -> tuple[str, ...]:
    """The policies of a round: rotated by one from round to round."""
    shift = round_ % len(policies)
    return (*policies[shift:], *policies[:shift])


def planned_requests(campaign: Campaign, round_: int) -> tuple[Request, ...]:
    """The request sequence of a round, the same for each of its policies."""
    regime = campaign.regime
    return tuple(
        regime.source.requests(seed=campaign.seed + round_, rate_rps=regime.rate_rps, horizon_s=campaign.plan.load_s)
    )


async def run_campaign(campaign: Campaign, *, client: LoadClient, control: ControlClient, display: Display) -> Findings:
    """Run every window. Raises ControlError when the server refuses a switch or stops answering."""
    findings = Findings()
    for round_ in range(campaign.rounds):
        planned = planned_requests(campaign, round_)
        for policy in order(campaign.policies, round_):
            display.window_started(f"round {round_ + 1}/{campaign.rounds}  {policy}")
            run, result = await _window(campaign, policy, round_, planned, client, control, display)
            findings.runs.append(run)
            findings.records.extend(result.records)
            display.window_ended(one_line(run))
    return findings


def one_line(run: RunResult) -> str:
    """A window's result in a line, for the log while the others run."""

    def show(name: str, scale: float, digits: int = 0) -> str:
        value = metric(run, name)
        return "-" if value is None else f"{value * scale:.{digits}f}"

    foreign = f", other processes {run.cpu.foreign:.0%} of the machine" if run.cpu and run.cpu.foreign > 0.1 else ""
    return (
        f"round {run.round + 1}  {run.policy:<6} goodput {show('goodput_tok_s', 1):>5} tok/s"
        f"  attainment {show('attainment', 100):>3} %  raw {show('raw_tok_s', 1):>5} tok/s"
        f"  victim TPOT p50 {show('victim_tpot_p50_s', 1e3, 1)} ms"
        f"  step {show('step_mean_s', 1e3, 1)} ms  {run.summary.requests} requests"
        f" ({run.unserved} left waiting){foreign}"
    )


async def _window(
    campaign: Campaign,
    policy: str,
    round_: int,
    planned: Sequence[Request],
    client: LoadClient,
    control: ControlClient,
    display: Display,
) -> tuple[RunResult, WindowResult]:
    await switch(campaign.regime, policy, control)
    await control.steps()
    progress = Progress()
    watcher = asyncio.create_task(_watch(control, display, progress))
    before = machine.read_cpu(())
    try:
        result = await run_window(
            client,
            planned,
            regime=campaign.regime,
            plan=campaign.plan,
            policy=policy,
            round_=round_,
            progress=progress,
        )
    finally:
        watcher.cancel()
    cpu = machine.cpu_share(before, machine.read_cpu(()))
    snapshots, steps = await control.engines(), await control.steps()
    if not await control.until_idle():
        raise ControlError(f"requests are left in the engine after the window of policy {policy}")
    return run_result(result, snapshots=snapshots, steps=steps, cpu=cpu), result


async def switch(regime: Regime, policy: str, control: ControlClient) -> None:
    """Set policy and SLO on every engine. Raises ControlError unless each of them says it runs that policy."""
    patch: Mapping[str, Any] = {
        "policy": policy,
        "tpot_slo_s": regime.slo.tpot_s,
        "ttft_slo_s": regime.slo.ttft_s,
    }
    for snapshot in await control.configure(patch):
        if snapshot.get("policy") != policy:
            raise ControlError(f"asked for policy {policy}, the engine runs {snapshot.get('policy')}")


async def _watch(control: ControlClient, display: Display, progress: Progress) -> None:
    """Redraw twice a second; a poll that fails only leaves the line as it is."""
    snapshot: Mapping[str, Any] | None = None
    while True:
        try:
            snapshot = (await control.engines())[0]
        except ControlError:
            snapshot = None
        display.update(progress, snapshot)
        await asyncio.sleep(_POLL_S)

"""Several policies on one running server, interleaved over rounds.

Within a round every policy gets the same request sequence (seed + round) and the order of the policies is
rotated from round to round, so neither a slow minute of the machine nor the order favours one of them.
Between windows the server drains, its statistics start anew, and prompts of one window are invisible to the
prefix cache of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from taper.bench.client import LoadClient
from taper.bench.control import ControlClient
from taper.bench.driver import WindowPlan
from taper.bench.live import Display
from taper.bench.measure import Job, Target, measure
from taper.bench.result import metric
from taper.records import RequestRecord
from taper.results import Conditions, Run
from taper.workload.regime import Regime
from taper.workload.request import Request


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

    runs: list[Run] = field(default_factory=list)
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
    findings, regime = Findings(), campaign.regime
    target = Target(client=client, control=control)
    for round_ in range(campaign.rounds):
        planned = planned_requests(campaign, round_)
        for policy in order(campaign.policies, round_):
            display.window_started(f"round {round_ + 1}/{campaign.rounds}  {policy}")
            conditions = Conditions(
                policy=policy, rate_rps=regime.rate_rps, slo_tpot_s=regime.slo.tpot_s,
                concurrency=regime.max_concurrency, seed=campaign.seed + round_, round=round_,
            )  # fmt: skip
            job = Job(regime=regime, requests=planned, plan=campaign.plan, conditions=conditions)
            measured = await measure(job, target, display)
            findings.runs.append(measured.run)
            findings.records.extend(measured.result.records)
            display.window_ended(one_line(measured.run))
    return findings


def one_line(run: Run) -> str:
    """A window's result in a line, for the log while the others run."""

    def show(name: str, scale: float, digits: int = 0) -> str:
        value = metric(run, name)
        return "-" if value is None else f"{value * scale:.{digits}f}"

    others = run.engine.foreign_cpu or 0
    foreign = f", other processes {others:.0%} of the machine" if others > 0.1 else ""
    return (
        f"round {run.round + 1}  {run.policy:<6} goodput {show('goodput_tok_s', 1):>5} tok/s"
        f"  attainment {show('attainment', 100):>3} %  raw {show('raw_tok_s', 1):>5} tok/s"
        f"  victim TPOT p50 {show('victim_tpot_p50_s', 1e3, 1)} ms"
        f"  step {show('step_mean_s', 1e3, 1)} ms  {run.summary.requests} requests"
        f" ({run.engine.unserved} left waiting){foreign}"
    )

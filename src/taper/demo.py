"""`taper demo`: what regulating branches buys on this machine, measured in front of you.

Serves the model with TAPER on, calibrates the step cost unless a profile is at hand, derives from it a load under
which branches and serial requests really compete (`taper.workload.regime` says how), and runs the policies
`off`, `eager` and `taper` against each other, interleaved, through HTTP with the stock `openai` client.

Fairness. Same server, same requests and the same bound on requests in service for every policy of a round.
Throughput and goodput are taken over a window of steady load of equal length (after a ramp, before the
drain); requests are judged over their whole life. The SLO judges effective TPOT; TTFT is reported beside it, from
the *planned* arrival, waiting in the client's queue included. Under a load above capacity TTFT grows with the
length of the window whatever the policy: compare it between columns, do not take it for a latency.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from taper.bench import machine
from taper.bench.campaign import Campaign, Findings, run_campaign
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient
from taper.bench.driver import WindowPlan
from taper.bench.live import display_for
from taper.bench.pilot import measured_scale
from taper.bench.report import Setting, check_writable, document, write_json
from taper.bench.table import comparison
from taper.bench.verdict import Verdict, judge
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.engines.vllm.launch import Server
from taper.engines.vllm.supervise import AUTO, obtain_profile
from taper.model import embedded_model
from taper.profile import cache_dir
from taper.workload.mix import Mix
from taper.workload.regime import contended
from taper.workload.source import Synthetic

POLICIES = ("off", "eager", "taper")
_SERVED_NAME = "demo"
# Server and client share the cores with the model: a chunk per token and row would cost as much as the rows do.
# First and last tokens leave at once whatever the interval, so TTFT and effective TPOT do not see it.
_STREAMING = ("--stream-interval", "8")
_PIPE_COLUMNS = 130
_POOR_FIT = 0.15
_RATIO_COLUMNS = 115  # a narrower terminal gets the table without them; the targets below still name two


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the command line can change."""

    model: str | None = None  # None: the embedded one
    vllm_args: Sequence[str] = ()
    policies: Sequence[str] = POLICIES
    rounds: int = 3
    seed: int = 0
    json_path: Path | None = None
    log_path: Path | None = None  # where the server's output goes; None: a file beside the cached model
    profile_path: Path | None = None
    plan: WindowPlan = field(default_factory=WindowPlan)
    mix: Mix = field(default_factory=Mix)
    fill: float = 0.4
    slo_between: float = 0.6
    load: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= 100:
            raise ConfigError(f"rounds must be between 1 and 100, not {self.rounds!r}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be between 0 and 2**31 - 1, not {self.seed!r}")
        if not self.policies or len(set(self.policies)) != len(self.policies):
            raise ConfigError(f"policies must be named, each once, not {list(self.policies)!r}")
        if not 0 < self.slo_between < 1:
            raise ConfigError(f"slo_between must lie between 0 and 1, not {self.slo_between!r}")


def run_demo(options: DemoOptions, console: Console) -> Verdict:
    """Run the whole demonstration and print its table; the caller turns errors into one line and a status.

    Raises ConfigError for settings, ModelError when the model cannot be had, ServerError and ControlError when
    the server fails. A run that does not show the effect is no error: it is said in the output.
    """
    if options.json_path is not None:
        check_writable(options.json_path)
    console = _readable(console)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    model = options.model or str(embedded_model(say))
    log_path = options.log_path or cache_dir() / "demo-server.log"
    say(f"starting vLLM with TAPER on (its output: {log_path})")
    args = [*_STREAMING, *options.vllm_args, "--served-model-name", _SERVED_NAME]
    with Server(model, args, embedded=options.model is None, log=log_path) as server:
        choice = AUTO if options.profile_path is None else str(options.profile_path)
        profile, origin = obtain_profile(server, choice, progress=say)
        if profile is None:
            raise ConfigError("the demo derives its load from a profile and none could be made")
        say(f"profile: {origin}")
        if (error := profile.fit.get("heldout_mape")) is not None and error > _POOR_FIT:
            say(
                f"warning: the profile is off by {error:.0%} on loads it was not fitted to (was the machine busy?);"
                " the load chosen from it may miss the regime. `taper calibrate` on an idle machine makes a better one"
            )
        begun_s = time.monotonic()
        campaign, findings = asyncio.run(_measure(options, profile.latency(), server, console))
        took_s = time.monotonic() - begun_s
    verdict = judge(findings.runs, campaign.regime.slo)
    _show(campaign, findings, verdict, took_s, console)
    if options.json_path is not None:
        setting = Setting(
            campaign=campaign,
            model=options.model or "embedded",
            machine=machine.describe(),
            profile=profile.to_json(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_json(options.json_path, document(setting, findings, verdict))
        say(f"records: {options.json_path}")
    return verdict


def _readable(console: Console) -> Console:
    """A pipe or a log has no width of its own; the table needs some."""
    return console if console.is_terminal else Console(file=console.file, width=_PIPE_COLUMNS)


def _campaign(options: DemoOptions, law: LinearLatency) -> Campaign:
    regime = contended(
        law, source=Synthetic(mix=options.mix), fill=options.fill, slo_between=options.slo_between, load=options.load
    )
    return Campaign(
        regime=regime,
        policies=tuple(options.policies),
        rounds=options.rounds,
        seed=options.seed,
        plan=options.plan,
    )


async def _measure(
    options: DemoOptions, law: LinearLatency, server: Server, console: Console
) -> tuple[Campaign, Findings]:
    async with (
        LoadClient(base_url=f"{server.url}/v1", model=_SERVED_NAME) as client,
        ControlClient(url=server.url, headers=server.control_headers) as control,
    ):
        console.print("warming up and checking the calibration under load", highlight=False)
        scale = await measured_scale(_campaign(options, law), law, client=client, control=control)
        campaign = _campaign(options, law.corrected(scale=scale, prefill_scale=1.0))
        _announce(campaign, scale, console)
        windows = campaign.rounds * len(campaign.policies)
        with display_for(console, windows=windows, plan=campaign.plan) as display:
            return campaign, await run_campaign(campaign, client=client, control=control, display=display)


def _announce(campaign: Campaign, scale: float, console: Console) -> None:
    regime = campaign.regime
    for line in (
        f"load: {regime.rate_rps:.2f} requests/s (Poisson), {regime.source.describe()}; seed {campaign.seed}",
        f"SLO: {regime.slo.tpot_s * 1e3:.1f} ms of effective TPOT; TTFT is reported, not judged",
        f"regime: {regime.reason}; steps under load take {scale:.2f} x the calibrated law",
        f"plan: {campaign.rounds} rounds of {', '.join(campaign.policies)}; each window"
        f" {campaign.plan.ramp_s:.0f} s ramp, {campaign.plan.measure_s:.0f} s measured, drain",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _show(campaign: Campaign, findings: Findings, verdict: Verdict, took_s: float, console: Console) -> None:
    rounds = f"medians of {campaign.rounds} rounds (low-high)" if campaign.rounds > 1 else "one round"
    console.print()
    ratios = console.width >= _RATIO_COLUMNS
    title = f"{rounds}; ratios within rounds" if ratios else rounds
    console.print(comparison(findings.runs, campaign.policies, subject="taper", title=title, ratios=ratios))
    what = machine.describe()
    versions = ", ".join(f"{name} {number}" for name, number in what.versions.items())
    lines = [f"regime: {verdict.regime_line}"]
    for target in verdict.targets:
        mark = "reached" if target.reached else "MISSED "
        lines.append(f"{mark}  {target.name} {target.wanted}: {target.got:.3f}")
    lines += [f"note: {note}" for note in verdict.notes]
    if not verdict.reached:
        lines.append(
            "This run did not show the whole effect. The law's own bound for this machine is in the regime line above;"
            " a busy machine or a short run widens the spread: try --rounds 5 on an idle one."
        )
    lines += [
        f"machine: {what.cores} cores, {what.cpu}; {versions}",
        f"measured in {took_s:.0f} s; load generator {_client_share(findings):.1%} of the machine",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _client_share(findings: Findings) -> float:
    shares = [run.engine.client_cpu for run in findings.runs if run.engine.client_cpu is not None]
    return sum(shares) / len(shares) if shares else float("nan")

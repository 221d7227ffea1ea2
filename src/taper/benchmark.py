"""`taper bench`: a sweep of policies on the real engine, from settings to the output folder.

Serves the model (or takes a running server), finds what a step costs, turns relative loads and SLOs into numbers,
scales lengths to the model, and runs the windows of `taper.bench.sweep`. A killed bench goes on with the same
command.
"""

from __future__ import annotations

import asyncio
import datetime
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console

from taper.bench import machine
from taper.bench.campaign import Campaign
from taper.bench.control import ControlError
from taper.bench.dialogue import DialogueName
from taper.bench.driver import WindowPlan
from taper.bench.live import display_for
from taper.bench.pilot import measured_scale
from taper.bench.store import Store
from taper.bench.sweep import Point, Sweep, regime_at, run_sweep, slots, source_at
from taper.bench.table import comparison
from taper.bench.verdict import FOREIGN_CPU_LIMIT
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.files import parse_table, read_text
from taper.fleet import STOCK, LocalFleet, RemoteFleet
from taper.profile import load_profile, parse_profile
from taper.results import Run
from taper.workload import Arrivals, Mix, Replay, Source, Synthetic, parse_mix, profile, read_trace
from taper.workload.branching import NONE
from taper.workload.regime import concurrency_for, output_factor

_PROMPT_SHARE = 0.25  # of the context, for the 99th percentile of prompts
_LONGEST_S = 8.0  # of a mean request at width 1, so that a window holds many
_MOST_TRACE_ROWS = 1_000_000
_SAMPLED_PROMPTS = 2000
_PIPE_COLUMNS = 150
_PATHS = ("mix_path", "trace_path", "profile_path")
SECRET_OPTIONS = ("--token", "--api-key")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What the command line can change. Everything but the output folder and the log is a setting of the sweep."""

    out: Path
    policies: Sequence[str] = ("off", "eager", "taper")
    loads: Sequence[float] = (0.5, 1.0, 2.0)
    rates_rps: Sequence[float] | None = None  # instead of loads
    shares: Sequence[float] = (0.4,)
    slos: Sequence[float] = (0.6,)
    slos_tpot_s: Sequence[float] | None = None  # instead of slos
    ttft_slo_s: float | None = None
    branching: str | None = None  # a branch profile's name; None: the mix's own
    mix_path: Path | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    trace_path: Path | None = None
    time_scale: float | None = None  # None: from the loads
    prompt_scale: float | None = None  # None: from the model's context
    output_scale: float | None = None  # None: from the length of a window
    rounds: int = 3
    seed: int = 0
    plan: WindowPlan = field(default_factory=WindowPlan)
    concurrency: int | None = None
    fill: float = 0.4
    tries: int = 3
    foreign_limit: float = FOREIGN_CPU_LIMIT
    steps: bool = False
    model: str | None = None  # None: the embedded one, or the first that the server at `url` lists
    vllm_args: Sequence[str] = ()
    url: str | None = None
    control_token: str | None = None
    api_key: str | None = None
    dialogue: DialogueName = "tokens"
    profile_path: Path | None = None
    server_pid: int | None = None  # of the server at `url`, where it runs on this machine
    log_path: Path | None = None

    def __post_init__(self) -> None:
        if self.trace_path and self.mix_path:
            raise ConfigError("--trace and --mix do not go together: a trace has its own lengths")
        if self.time_scale is not None and not self.trace_path:
            raise ConfigError("--time-scale needs a --trace")
        if self.url and self.vllm_args:
            raise ConfigError("--url names a running server; vLLM flags do not go with it")
        if self.url and len(self.policies) > 1 and self.control_token is None:
            raise ConfigError("--url with several policies needs --token, the control token of that TAPER server")
        if STOCK in self.policies and self.url and self.control_token:
            raise ConfigError("policy stock is a server without TAPER; bench it with its own --url and no --token")

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a sweep is taken up again; nothing secret."""
        left_out = {"out", "log_path", "control_token", "api_key", "server_pid"}
        raw = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in left_out}
        return {name: _plain(value) for name, value in raw.items()}

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], *, out: Path) -> Self:
        """The options that had these settings. Raises ConfigError for settings of another version."""
        try:
            values = {
                **settings,
                "arrivals": Arrivals(**settings["arrivals"]),
                "plan": WindowPlan(**settings["plan"]),
                **{name: Path(settings[name]) for name in _PATHS if settings[name] is not None},
            }
            return cls(out=out, **values)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{out}: settings of another version: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What was found before the first window; kept, so that a resumed sweep runs under the same load."""

    law_scale: float  # measured step time over the calibrated law's
    prompt_scale: float
    output_scale: float
    context_tokens: int | None

    def of(self, source: Source) -> Source:
        """The requests as the model gets them."""
        return source.scaled(self.output_scale, prompt=self.prompt_scale).within(self.context_tokens)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line as it may be kept: what follows --token or --api-key is left out."""
    kept: list[str] = []
    for argument in arguments:
        option, _, value = argument.partition("=")
        if kept and kept[-1] in SECRET_OPTIONS:
            kept.append("...")
        else:
            kept.append(f"{option}=..." if value and option in SECRET_OPTIONS else argument)
    return kept


def run_bench(options: BenchOptions, console: Console) -> list[Run]:
    """Run or continue the sweep; returns all its runs.

    Raises ConfigError for settings, ModelError, ServerError and ControlError as the demo does.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=_PIPE_COLUMNS)
    source = source_of(options)
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["taper", *without_secrets(sys.argv[1:])]),
        "commit": machine.commit(),
        "machine": asdict(machine.describe()),
    }
    with Store(options.out, settings=options.settings(), about=about, keep_steps=options.steps) as store:
        try:
            return asyncio.run(_run(options, source, store, console))
        except asyncio.CancelledError:
            raise ControlError(f"stopped; the same command goes on with {options.out}") from None


async def _run(options: BenchOptions, source: Source, store: Store, console: Console) -> list[Run]:
    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    task = asyncio.current_task()
    if task is not None:  # the server is a process group of its own and would outlive us
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with _fleet(options, store.meta.get("profile"), say) as fleet:
        sweep = await _prepared(options, source, fleet, store, say)
        for point in sweep.points:
            say(f"{point.name}: {regime_at(sweep, point).reason}")
        left = [slot for slot in slots(sweep) if not store.accepted(slot.name)]
        say(f"plan: {len(left)} windows of {sweep.plan.load_s:.0f} s and a drain; output: {options.out}")
        with display_for(console, windows=len(left), plan=sweep.plan) as display:
            runs = await run_sweep(sweep, fleet, store, display)
    for point in sweep.points:
        _show(point, runs, sweep, console)
    if rejected := sum(not run.conditions.accepted for run in runs):
        say(f"{rejected} windows were rejected (the machine was busy with something else) and are marked in runs.json")
    say(f"draw it: taper report {options.out}")
    return runs


async def _prepared(
    options: BenchOptions,
    source: Source,
    fleet: LocalFleet | RemoteFleet,
    store: Store,
    say: Callable[[str], None],
) -> Sweep:
    """The sweep with law, lengths and operating points settled."""
    held = store.meta.get("resolved")
    first = next((policy for policy in options.policies if policy != STOCK), options.policies[0])
    if held is None or fleet.profile is None:
        await fleet.target(first)
    resolved = Resolved(**held) if held else await _resolved(options, source, fleet, first, say)
    if held is None:
        store.note(profile=fleet.profile.to_json() if fleet.profile else None, resolved=asdict(resolved))
    sweep = _sweep(options, source, fleet, resolved)
    say(
        f"load: {source_at(sweep, sweep.points[0]).describe()}; prompts x {resolved.prompt_scale:.3g}, outputs x"
        f" {resolved.output_scale:.3g}"
        + (f"; steps under load take {resolved.law_scale:.2f} x the law" if sweep.law else "")
    )
    return sweep


async def _resolved(
    options: BenchOptions, source: Source, fleet: LocalFleet | RemoteFleet, policy: str, say: Callable[[str], None]
) -> Resolved:
    target = await fleet.target(policy)
    context = fleet.context_tokens
    found = Resolved(
        law_scale=1.0,
        prompt_scale=options.prompt_scale or _prompt_scale(source, context),
        output_scale=options.output_scale or 1.0,
        context_tokens=context,
    )
    law = fleet.profile.latency() if fleet.profile else None
    if law is None:
        return found
    found = replace(found, output_scale=_output_scale(options, source, law, found))
    if target.control is None:
        return found
    say("warming up and checking the calibration under load")
    sweep = _sweep(options, source, fleet, found)
    regime = regime_at(sweep, max(sweep.points, key=lambda point: point.load or 0.0))
    trial = Campaign(regime=regime, policies=(policy,), rounds=options.rounds, seed=options.seed, plan=options.plan)
    scale = await measured_scale(trial, law, client=target.client, control=target.control)
    law = law.corrected(scale=scale, prefill_scale=1.0)
    return replace(found, law_scale=scale, output_scale=_output_scale(options, source, law, found))


def _prompt_scale(source: Source, context_tokens: int | None) -> float:
    """The 99th percentile of prompts comes to a quarter of the context where it would be more."""
    if context_tokens is None:
        return 1.0
    sample = islice(source.requests(seed=0, rate_rps=1.0, horizon_s=1e9), _SAMPLED_PROMPTS)
    long_tokens = float(np.percentile([one.prompt_tokens for one in sample], 99))
    return min(1.0, _PROMPT_SHARE * context_tokens / long_tokens)


def _output_scale(options: BenchOptions, source: Source, law: LinearLatency, found: Resolved) -> float:
    if options.output_scale is not None:
        return options.output_scale
    shared = source.scaled(1.0, prompt=found.prompt_scale).shared(options.shares[0])
    requests = options.concurrency or concurrency_for(law, shared.demand(), fill=options.fill)
    return output_factor(shared, law, concurrency=requests, longest_s=_LONGEST_S)


def _sweep(options: BenchOptions, source: Source, fleet: LocalFleet | RemoteFleet, resolved: Resolved) -> Sweep:
    scaled = resolved.of(source)
    law = fleet.profile.latency().corrected(scale=resolved.law_scale, prefill_scale=1.0) if fleet.profile else None
    return Sweep(
        source=scaled,
        points=_points(options, source),
        policies=tuple(options.policies),
        rounds=options.rounds,
        seed=options.seed,
        plan=options.plan,
        law=law,
        concurrency=options.concurrency,
        fill=options.fill,
        ttft_slo_s=options.ttft_slo_s,
        # The rule needs to know which processes are the server's; of a remote one there are none here.
        foreign_limit=options.foreign_limit if options.url is None or options.server_pid else 1.0,
        tries=options.tries,
    )


def _points(options: BenchOptions, source: Source) -> tuple[Point, ...]:
    loads: list[dict[str, float]]
    if options.time_scale is not None and isinstance(source, Replay):
        loads = [{"rate_rps": source.rate_rps / options.time_scale}]
    elif options.rates_rps:
        loads = [{"rate_rps": rate} for rate in options.rates_rps]
    else:
        loads = [{"load": load} for load in options.loads]
    slos = (
        [{"slo_tpot_s": seconds} for seconds in options.slos_tpot_s]
        if options.slos_tpot_s
        else [{"slo_at": at} for at in options.slos]
    )
    shares = (0.0,) if options.branching == NONE else options.shares
    return tuple(Point(share=share, **load, **slo) for share in shares for slo in slos for load in loads)


def source_of(options: BenchOptions) -> Source:
    """The requests of the options, before their lengths are scaled to a model."""
    shape = profile(options.branching) if options.branching else None
    if options.trace_path is not None:
        rows = tuple(islice(read_trace(options.trace_path), _MOST_TRACE_ROWS))
        return Replay(rows=rows, branching=shape)
    mix = Mix()
    if options.mix_path is not None:
        where = f"--mix {options.mix_path}"
        mix = parse_mix(parse_table(read_text(str(options.mix_path), where), where), where)
    if shape is not None:
        mix = replace(mix, branching=shape)
    return Synthetic(mix=mix, arrivals=options.arrivals)


def _fleet(
    options: BenchOptions, held: Mapping[str, Any] | None, say: Callable[[str], None]
) -> LocalFleet | RemoteFleet:
    known = parse_profile(held, where="meta.json: profile") if held else None
    if options.url is None:
        return LocalFleet(
            model=options.model,
            vllm_args=options.vllm_args,
            dialogue=options.dialogue,
            profile=known,
            profile_path=options.profile_path,
            log=options.log_path or options.out / "server.log",
            say=say,
        )
    return RemoteFleet(
        url=options.url,
        model=options.model,
        api_key=options.api_key,
        control_token=options.control_token,
        dialogue=options.dialogue,
        profile=known or (load_profile(options.profile_path) if options.profile_path else None),
        roots=(options.server_pid,) if options.server_pid else (),
    )


def _show(point: Point, runs: Sequence[Run], sweep: Sweep, console: Console) -> None:
    chosen = [run for run in runs if run.conditions.accepted and run.conditions.window.startswith(f"{point.name}/")]
    if chosen:
        console.print()
        title = f"{point.name}: medians of up to {sweep.rounds} rounds (low-high)"
        console.print(comparison(chosen, sweep.policies, subject="taper", title=title, ratios=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple | list) else value

"""The `taper` command. Heavy parts are imported by the command that needs them; `--help` imports no engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from taper import __version__
from taper.bench_commands import bench, report
from taper.config import ServerConfig, resolve_policy, settings
from taper.core.types import ConfigError, Knobs, Slo, check_range
from taper.sim_commands import simulate

USAGE_STATUS = 2
MS_PER_S = 1000.0
OURS = "--taper"
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}


class OneLineErrors(click.Group):
    """Every expected failure is one line on stderr and exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        run = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        try:
            status: Any = run()
        except click.Abort:
            sys.exit(130)
        except click.ClickException as error:
            _fail(error.format_message())
        except (ConfigError, RuntimeError) as error:
            if not isinstance(error, (ConfigError, *_expected())):
                raise
            _fail(str(error))
        sys.exit(status if isinstance(status, int) else 0)


def _expected() -> tuple[type[Exception], ...]:
    from taper.bench.control import ControlError
    from taper.engines.vllm.launch import ServerError
    from taper.model import ModelError

    return (ControlError, ServerError, ModelError)


def _fail(message: str) -> NoReturn:
    click.echo(f"taper: {' '.join(message.split())}", err=True)
    sys.exit(USAGE_STATUS)


@click.group(cls=OneLineErrors, invoke_without_command=True)
@click.version_option(__version__, prog_name="taper")
@click.pass_context
def cli(context: click.Context) -> None:
    """Per-step admission control of parallel branches, on stock vLLM.

    MODEL is always optional: without it the embedded SmolLM2-135M-Instruct is used, fetched once.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _knob_help() -> str:
    lines = [
        f"{spec.name}={spec.default:g}  {spec.metadata['low']:g} to {spec.metadata['high']:g} {spec.metadata['unit']}:"
        f" {spec.metadata['doc']}"
        for spec in fields(Knobs)
    ]
    return "\b\nKnobs for --taper-knob, with defaults:\n  " + "\n  ".join(lines)


def _server_options(command: Any) -> Any:
    """Options of every command that starts a server with TAPER's settings."""
    for option in (
        click.option("--taper-allow-control", is_flag=True, help="Let clients change policy and SLO over HTTP."),
        click.option("--taper-knob", "knobs", multiple=True, metavar="NAME=VALUE", help="Set a knob; repeatable."),
        click.option("--taper-ttft-slo-ms", "ttft_ms", type=float, metavar="MS", help="Time to the first token."),
        click.option("--taper-tpot-slo-ms", "tpot_ms", type=float, metavar="MS", help="Time per output token."),
        click.option(
            "--taper-policy", "policy", metavar="NAME",
            help="taper (default), off, cap:N, eager, taper-paper, or a plug-in's.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command(context_settings=PASS_THROUGH, epilog=_knob_help())
@_server_options
@click.option(
    "--taper-profile", "profile", default="auto", show_default=True, metavar="PATH|auto|skip",
    help="Step-cost profile. auto: the cached one, else calibrate; skip: start conservatively and learn.",
)  # fmt: skip
@click.option(
    "--taper-calibration-s", "calibration_s", type=float, default=45.0, show_default=True, metavar="S",
    help="Time a calibration at start may take.",
)  # fmt: skip
@click.option(
    "--taper-trace", "trace", metavar="PATH",
    help="Write every planned step there as JSON lines; bounded and rotating. For taper replay.",
)  # fmt: skip
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]...")
def serve(
    args: Sequence[str],
    profile: str,
    calibration_s: float,
    trace: str | None,
    policy: str | None,
    tpot_ms: float | None,
    ttft_ms: float | None,
    knobs: Sequence[str],
    taper_allow_control: bool,
) -> int:
    """Serve MODEL with TAPER on: an OpenAI-compatible vLLM server.

    MODEL comes first; every flag that does not begin with --taper goes to vLLM untouched. Listens on 127.0.0.1
    unless --host says otherwise. TAPER_CONFIG, where set, holds the settings that the flags below do not name.
    """
    config = _config(policy, tpot_ms, ttft_ms, knobs, allow_control=taper_allow_control)
    if trace is not None:
        config = replace(config, trace=_writable(trace))
    check_range("--taper-calibration-s", calibration_s, low=5, high=3600, unit="s")
    model, rest = _model_and_flags(args)
    from taper.engines.vllm.supervise import AUTO, SKIP, ServeOptions
    from taper.engines.vllm.supervise import serve as supervise

    if profile not in (AUTO, SKIP):
        from taper.profile import load_profile

        load_profile(profile)
    options = ServeOptions(
        model=model or _embedded(),
        embedded=model is None,
        vllm_args=rest,
        config=config,
        profile=profile,
        calibration_s=calibration_s,
    )
    return supervise(options, Console(stderr=True))


@cli.command(context_settings=PASS_THROUGH)
@click.option(
    "--taper-budget-s", "budget_s", type=float, default=120.0, show_default=True, metavar="S",
    help="Time to measure for.",
)  # fmt: skip
@click.option(
    "--taper-output", "output", type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the profile; default: the cache, where taper serve finds it.",
)  # fmt: skip
@click.option("--taper-url", "url", metavar="URL", help="Calibrate a running taper server instead of starting one.")
@click.option(
    "--taper-token", "token", envvar="TAPER_CONTROL_TOKEN", metavar="TOKEN",
    help="Control token of that server, unless it runs with --taper-allow-control.  [env: TAPER_CONTROL_TOKEN]",
)  # fmt: skip
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]...")
def calibrate(args: Sequence[str], budget_s: float, output: Path | None, url: str | None, token: str | None) -> None:
    """Measure what a step costs on this machine, and keep it as a profile."""
    check_range("--taper-budget-s", budget_s, low=5, high=3600, unit="s")
    model, rest = _model_and_flags(args)
    if url is not None and (model is not None or rest):
        raise ConfigError("--taper-url names a running server; MODEL and vLLM flags do not go with it")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(f"--taper-url must begin with http:// or https://, not {url!r}")
    from taper.engines.vllm import report
    from taper.engines.vllm.calibrate import calibrate as run
    from taper.engines.vllm.launch import CONTROL_HEADER, Server, exit_on_sigterm
    from taper.profile import cache_dir, save_profile

    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if url is not None:
        headers = {CONTROL_HEADER: token or ""}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        done = run(url.rstrip("/"), headers, budget_s=budget_s, progress=say)
    else:
        log = cache_dir() / "calibrate-server.log"
        exit_on_sigterm()
        say(f"starting vLLM (its output: {log})")
        with Server(model or _embedded(), rest, embedded=model is None, log=log) as server:
            done = run(server.url, server.control_headers, budget_s=budget_s, apply=False, progress=say)
    path = save_profile(done.profile, output)
    out = Console()
    out.print(f"{done.profile.key}, measured for {done.seconds:.0f} s", highlight=False, soft_wrap=True)
    out.print(report.calibration_report(done.fit, done.samples), highlight=False)
    out.print(f"profile: {path}", highlight=False, soft_wrap=True)


@cli.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--once", is_flag=True, help="Print one picture and end; status 1 if the server does not answer.")
def top(url: str, once: bool) -> int:
    """Watch the TAPER server at URL: requests, branches, step time against budget. Ctrl-C ends it."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"URL must begin with http:// or https://, not {url!r}")
    from taper.top import top as watch

    return watch(url.rstrip("/"), Console(), once=once)


@cli.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", metavar="NAME", help="Decide with this policy; default: with the one recorded.")
@click.option("--steps", "shown", type=click.IntRange(0, 1000), default=10, show_default=True, help="How many to show.")
@click.option("--perfetto", type=click.Path(dir_okay=False, path_type=Path), help="Write a file for ui.perfetto.dev.")
def replay(path: Path, policy: str | None, shown: int, perfetto: Path | None) -> int:
    """Decide the steps of a trace (taper serve --taper-trace) again, and show where and why the plans differ.

    With the recorded policy the plans must be the same; exit status 1 if they are not.
    """
    from taper.trace import perfetto as chrome
    from taper.trace.file import read_trace
    from taper.trace.replay import replay as decide_again
    from taper.trace.report import render

    if perfetto is not None:
        with perfetto.open("w", encoding="utf-8") as out:
            count = chrome.export(read_trace(path), out)
        click.echo(f"{count} events: {perfetto}", err=True)
    found = decide_again(
        read_trace(path), None if policy is None else resolve_policy(policy), resolve_policy, shown=shown
    )
    render(found, policy, Console())
    return int(policy is None and found.identical < found.decisions)


@cli.command()
@click.option("--deep", is_flag=True, help="Compare checksums of all files, not only their sizes.")
def model(deep: bool) -> None:
    """Bring the embedded model into the cache and print its folder."""
    from taper.model import embedded_model

    click.echo(embedded_model(lambda line: click.echo(line, err=True), deep=deep))


@cli.command()
@click.option("--repair", is_flag=True, help="Remove broken torchvision, torchaudio and torchcodec; text needs none.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to check.")
def doctor(repair: bool, port: int) -> int:
    """Check versions, seams, processor, memory and ports, and say what to do."""
    from taper import doctor as office

    checks = office.run_checks(repair=repair, port=port)
    office.render(checks)
    return office.exit_code(checks)


@cli.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep all records here.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Rounds of all policies, interleaved.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals and lengths.")
@click.option("--policies", default="off,eager,taper", show_default=True, help="Which, comma-separated.")
@click.option("--model", "model_name", metavar="MODEL", help="Another model than the embedded one.")
@click.option("--profile", "profile_path", type=click.Path(dir_okay=False, path_type=Path), help="A profile file.")
@click.option("--log", "log_path", type=click.Path(dir_okay=False, path_type=Path), help="The server's output.")
def demo(
    json_path: Path | None,
    rounds: int,
    seed: int,
    policies: str,
    model_name: str | None,
    profile_path: Path | None,
    log_path: Path | None,
) -> None:
    """Serve a real model under a contended load, and compare policies off, eager and taper."""
    names = tuple(name.strip() for name in policies.split(",") if name.strip())
    for name in names:
        resolve_policy(name)
    from taper.demo import DemoOptions, run_demo
    from taper.engines.vllm.launch import exit_on_sigterm

    exit_on_sigterm()
    options = DemoOptions(
        model=model_name,
        policies=names,
        rounds=rounds,
        seed=seed,
        json_path=json_path,
        log_path=log_path,
        profile_path=profile_path,
    )
    run_demo(options, Console())


cli.add_command(bench)
cli.add_command(report)
cli.add_command(simulate)


def _config(
    policy: str | None, tpot_ms: float | None, ttft_ms: float | None, knobs: Sequence[str], *, allow_control: bool
) -> ServerConfig:
    """What the flags say, over what `TAPER_CONFIG` says."""
    base = ServerConfig.from_env()
    if base.profile is not None:
        raise ConfigError("TAPER_CONFIG holds a profile; give taper serve its file with --taper-profile")
    slo = asdict(base.slo)
    for flag, value, name in (("--taper-tpot-slo-ms", tpot_ms, "tpot_s"), ("--taper-ttft-slo-ms", ttft_ms, "ttft_s")):
        if value is not None:
            limits = next(spec.metadata for spec in fields(Slo) if spec.name == name)
            low, high = limits["low"] * MS_PER_S, limits["high"] * MS_PER_S
            slo[name] = check_range(flag, value, low=low, high=high, unit="ms") / MS_PER_S
    return replace(
        base,
        policy=base.policy if policy is None else policy,
        slo=Slo(**slo),
        knobs=settings(Knobs, {**asdict(base.knobs), **_knobs(knobs)}, "--taper-knob"),
        allow_control=base.allow_control or allow_control,
    )


def _writable(path: str) -> str:
    """The absolute path of a file to write to. Raises `ConfigError` before an engine is started for nothing."""
    target = Path(path).absolute()
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"--taper-trace {path}: not a file that can be written")
    return str(target)


def _knobs(texts: Sequence[str]) -> Mapping[str, float]:
    values: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError:
            raise ConfigError(f"--taper-knob {text!r}: write NAME=VALUE with a number") from None
        if not equals:
            raise ConfigError(f"--taper-knob {text!r}: write NAME=VALUE with a number")
    return values


def _model_and_flags(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model (None: the embedded one) and what goes to vLLM. Raises `ConfigError` for a misspelt flag of ours."""
    from taper.engines.vllm.command import value_of, with_file, without

    for arg in args:
        if arg.startswith(OURS):
            raise ConfigError(f"unknown option {arg.partition('=')[0]}; see taper serve --help")
    if args and not args[0].startswith("-"):
        return args[0], list(args[1:])
    named = value_of(with_file(args), "--model")
    return (named, without(args, "--model")) if named else (None, list(args))


def _embedded() -> str:
    from taper.model import embedded_model

    return str(embedded_model(lambda line: click.echo(line, err=True)))


def main() -> None:
    cli()


if __name__ == "__main__":
    main()

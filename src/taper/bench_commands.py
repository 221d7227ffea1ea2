"""`taper bench` and `taper report`: what a user types, turned into options. Heavy parts are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from taper.config import resolve_policy
from taper.core.types import ConfigError

MS_PER_S = 1000.0
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(",")) if isinstance(value, str) else tuple(value)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, such as 0.5,1,2", param, ctx)


class Scale(click.ParamType[float | None]):
    """A factor, or `auto` (None)."""

    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value in (None, "auto"):
            return None
        try:
            factor = float(value)
        except ValueError:
            factor = 0.0
        if not 0 < factor < 1e6:
            self.fail(f"{value!r} is neither auto nor a factor above 0", param, ctx)
        return factor


NUMBERS, SCALE = Numbers(), Scale()
OPTIONS = (
    click.option("--out", required=True, type=FOLDER, help="Output folder; the same command goes on in it."),
    click.option("--policies", default="off,eager,taper", show_default=True, help="Also cap:N, taper-paper, stock."),
    click.option("--loads", type=NUMBERS, default="0.5,1,2", show_default=True, help="x what the law fits in the SLO."),
    click.option("--rates", type=NUMBERS, help="Requests per second, instead of --loads."),
    click.option("--shares", type=NUMBERS, default="0.4", show_default=True, help="Shares of branching requests."),
    click.option("--slos", type=NUMBERS, default="0.6", show_default=True, help="From off's step (0) to eager's (1)."),
    click.option("--slos-ms", type=NUMBERS, help="TPOT SLOs in milliseconds, instead of --slos."),
    click.option("--ttft-slo-ms", type=float, help="Also judge time to first token; without it, it is reported."),
    click.option("--branches", metavar="PROFILE", help="Branch profile: none, best-of-n, multiverse, sprint, ..."),
    click.option("--mix", "mix_path", type=FILE, help="Request lengths and branching, a TOML file."),
    click.option("--cv", type=float, default=1.0, show_default=True, help="Variation of the gaps; 1 is Poisson."),
    click.option("--burst-period-s", type=float, default=0.0, show_default=True, help="On/off bursts; 0: steady."),
    click.option("--burst-share", type=float, default=1.0, show_default=True, help="Part of a period with arrivals."),
    click.option("--trace", "trace_path", type=FILE, help="Azure or BurstGPT CSV, Mooncake JSONL."),
    click.option("--time-scale", type=SCALE, default="auto", show_default=True, help="auto: the rate --loads ask for."),
    click.option("--prompt-scale", type=SCALE, default="auto", show_default=True, help="auto: from the context."),
    click.option("--output-scale", type=SCALE, default="auto", show_default=True, help="auto: decodes 8 s at width 1."),
    click.option("--rounds", type=int, default=3, show_default=True, help="Windows of every policy at every point."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--ramp-s", type=click.FloatRange(0), default=6.0, show_default=True, help="Load before it counts."),
    click.option("--measure-s", type=click.FloatRange(1), default=30.0, show_default=True, help="Load that counts."),
    click.option("--drain-s", type=click.FloatRange(1), default=60.0, show_default=True, help="Then, at most."),
    click.option("--concurrency", type=click.IntRange(1), help="Requests in service at most; default: from the law."),
    click.option("--tries", type=int, default=3, show_default=True, help="At a window on a busy machine."),
    click.option("--foreign-cpu", type=click.FloatRange(0, 1), default=0.1, show_default=True,
                 help="Share of the machine that others may take before a window is repeated."),
    click.option("--steps/--no-steps", help="Keep a record of every engine step."),
    click.option("--model", help="Another model than the embedded one."),
    click.option("--url", help="A running OpenAI-compatible server instead of our own."),
    click.option("--token", envvar="TAPER_CONTROL_TOKEN", help="Control token of a TAPER server at --url."),
    click.option("--api-key", envvar="OPENAI_API_KEY", help="API key of the server at --url."),
    click.option("--server-pid", type=int, help="Process of the server at --url, where it runs on this machine."),
    click.option("--dialogue", type=click.Choice(["tokens", "chat"]), default="tokens", show_default=True,
                 help="chat: plain OpenAI fields only, for servers other than vLLM."),
    click.option("--profile", "profile_path", type=FILE, help="Step-cost profile; default: the cache, or calibrate."),
    click.option("--log", "log_path", type=FILE, help="The server's output; default: OUT/server.log."),
    click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]..."),
)  # fmt: skip


def _with_options(command: Any) -> Any:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command()
@_with_options
def bench(**given: Any) -> None:
    """Sweep policies, loads, branch shares and SLOs on the real engine; keep every request in a folder."""
    from taper.bench.driver import WindowPlan
    from taper.benchmark import BenchOptions, run_bench
    from taper.fleet import STOCK
    from taper.workload import Arrivals

    policies = tuple(name.strip() for name in given["policies"].split(",") if name.strip())
    for name in policies:
        if name != STOCK and (given["url"] is None or given["token"]):
            resolve_policy(name)
    slos_ms, ttft_ms = given["slos_ms"], given["ttft_slo_ms"]
    same = ("out", "loads", "shares", "slos", "mix_path", "trace_path", "time_scale", "prompt_scale", "output_scale",
            "rounds", "seed", "concurrency", "tries", "steps", "model", "url", "api_key", "server_pid", "dialogue",
            "profile_path", "log_path", "vllm_args")  # fmt: skip
    options = BenchOptions(
        policies=policies,
        rates_rps=given["rates"],
        slos_tpot_s=tuple(ms / MS_PER_S for ms in slos_ms) if slos_ms else None,
        ttft_slo_s=None if ttft_ms is None else ttft_ms / MS_PER_S,
        branching=given["branches"],
        arrivals=Arrivals(cv=given["cv"], burst_period_s=given["burst_period_s"], burst_share=given["burst_share"]),
        plan=WindowPlan(ramp_s=given["ramp_s"], measure_s=given["measure_s"], drain_s=given["drain_s"]),
        foreign_limit=given["foreign_cpu"],
        control_token=given["token"],
        **{name: given[name] for name in same},
    )
    run_bench(options, Console())


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=FILE, default=Path("report.html"), show_default=True, help="One HTML file, works offline.")
@click.option("--png", type=FOLDER, help="Also write each figure as a PNG into this folder.")
def report(paths: tuple[Path, ...], out: Path, png: Path | None) -> None:
    """Draw the folders of taper bench and the JSON files of taper simulate: one HTML file, and PNGs."""
    try:
        from taper.bench.page import write_report
    except ImportError as error:
        raise ConfigError("taper report needs its plotting packages: pip install 'taper-llm[report]'") from error
    for path in write_report(paths, out, png):
        click.echo(path)

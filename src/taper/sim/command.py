"""`taper simulate`: which runs the options ask for, and the tables and the results file that come of them."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from taper.core.types import ConfigError
from taper.results import Run, document
from taper.sim import scenario as scenarios
from taper.sim.fleet import Fleet
from taper.sim.hardware import Hardware, hardware
from taper.sim.routers import check_router
from taper.sim.run import Case, policy_named, run_all
from taper.sim.scenario import Scenario

POLICIES = "off,cap:2,cap:5,eager,taper-paper,taper"
ALL = "all"
CONTENDED = "contended"  # no file: it follows from the hardware's law
MAX_LOAD = 1000
MAX_REPLICAS = 10_000
NEEDS_A_FILE = ("trace",)
PIPE_COLUMNS = 130  # a pipe or a log has no width of its own
BETWEEN = 3  # characters between two columns of a table
COLUMNS: Mapping[str, tuple[str, float, str]] = {  # heading: field of a run, factor, format; by worth
    "goodput": ("goodput_tok_s", 1, ".0f"),
    "att %": ("attainment", 100, ".1f"),
    "serial %": ("attainment_serial", 100, ".1f"),
    "branch %": ("attainment_branching", 100, ".1f"),
    "raw tok/s": ("raw_tok_s", 1, ".0f"),
    "step ms": ("step_mean_s", 1e3, ".1f"),
    "ttft p95 s": ("ttft_p95_s", 1, ".2f"),
    "tpot p95 ms": ("tpot_p95_s", 1e3, ".1f"),
    "rows": ("rows_mean", 1, ".1f"),
    "itl p99 ms": ("itl_p99_s", 1e3, ".0f"),
    "reqs": ("requests_mean", 1, ".1f"),
    "mape %": ("predictor_mape", 100, ".1f"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to simulate. Lists of names are separated by commas."""

    scenarios: str = "headline"
    hardware: str = "a100x8-qwen3-32b"
    policies: str = POLICIES
    seeds: int = 5
    loads: str = "1"  # x the scenario's own load
    shares: str | None = None  # of requests that branch, instead of the scenario's own
    steps: int | None = None  # length of the load in steps of off, instead of the scenario's
    trace: Path | None = None
    replicas: str = "1"
    routers: str = "round-robin"
    hold_steps: int = 1
    stage_clocks: bool = False
    workers: int = 2


def cases_of(options: Options) -> list[list[Case]]:
    """One list of runs per table. Raises `ConfigError` for anything that does not exist, before anything runs."""
    machine = hardware(options.hardware)
    policies = _split(options.policies, "--policies")
    for name in policies:
        policy_named(name)
    return [
        [
            Case(
                scenario=scenario,
                machine=machine,
                policy=policy,
                seed=seed,
                fleet=fleet,
                hold_steps=options.hold_steps,
                stage_clocks=options.stage_clocks,
            )
            for policy in policies
            for seed in range(options.seeds)
        ]
        for scenario in scenarios_of(options, machine)
        for fleet in fleets_of(options)
    ]


def scenarios_of(options: Options, machine: Hardware) -> list[Scenario]:
    """Every scenario at every load and branching share."""
    every = [name for name in scenarios.names() if options.trace or name not in NEEDS_A_FILE]
    names = every if options.scenarios == ALL else _split(options.scenarios, "--scenario")
    loads = _numbers(options.loads, "--load")
    shares = _numbers(options.shares, "--share", high=1.0) if options.shares else [None]
    chosen: list[Scenario] = []
    for name, share in itertools.product(names, shares):
        if name == CONTENDED:
            chosen += [scenarios.contended_on(machine, load=x * scenarios.CONTENDED_LOAD, share=share) for x in loads]
            continue
        scenario = scenarios.load(name, trace=options.trace)
        if share is not None:
            scenario = replace(scenario, source=scenario.source.shared(share))
        chosen += [_loaded(scenario, load) for load in loads]
    if options.steps:
        chosen = [replace(scenario, duration_steps=options.steps, duration_s=None) for scenario in chosen]
    return chosen


def simulate(options: Options, console: Console, *, json_path: Path | None = None) -> list[Run]:
    """Run everything, print a table per scenario, load and fleet, and keep the figures."""
    tables = cases_of(options)
    _check_writable(json_path)
    if not console.is_terminal:
        console = Console(file=console.file, width=PIPE_COLUMNS)
    done: list[Run] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("runs", total=sum(map(len, tables)))
        runs = run_all((case for table in tables for case in table), workers=options.workers)
        for table in tables:
            rows = list(_counted(runs, len(table), progress, task))
            console.print(title_of(table[0]), highlight=False, soft_wrap=True)
            console.print(table_of(rows, width=console.width))
            done += rows
    if json_path:
        json_path.write_text(json.dumps(document(done), allow_nan=False) + "\n", encoding="utf-8")
    return done


def title_of(case: Case) -> str:
    """Two lines: what was run, and where that lies on the machine."""
    setting = scenarios.settle(case.scenario, case.machine)
    fleet = f", {case.fleet.replicas} replicas, {case.fleet.router}" if case.fleet.replicas > 1 else ""
    branching = case.scenario.branching_share
    share = "" if branching is None else f", {branching:.0%} branching"
    return (
        f"{case.scenario.name} on {case.machine.name}{fleet}: load {case.scenario.load:g}{share}, "
        f"{setting.rate_per_s:.2f} req/s per replica for {setting.duration_s:.0f} s\n"
        f"TPOT SLO {setting.slo.tpot_s * 1e3:.1f} ms; "
        f"off {setting.off.step_s * 1e3:.1f} ms at {setting.off.rate_per_s:.2f} req/s, "
        f"eager {setting.eager.step_s * 1e3:.1f} ms at {setting.eager.rate_per_s:.2f} req/s"
    )


def table_of(runs: Sequence[Run], *, width: int) -> Table:
    """Medians over the seeds; as many columns as `width` characters hold, but never less than goodput."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    taken = max(map(len, ("policy", *policies))) + 2
    columns: list[list[str]] = []
    for heading, (key, factor, spec) in COLUMNS.items():
        column = [_cell([run.to_json()[key] for run in runs if run.policy == one], factor, spec) for one in policies]
        taken += max(map(len, (heading, *column))) + BETWEEN
        if columns and taken > width:
            break
        table.add_column(heading, justify="right", no_wrap=True)
        columns.append(column)
    for policy, *cells in zip(policies, *columns, strict=True):
        table.add_row(policy, *cells)
    return table


def fleets_of(options: Options) -> list[Fleet]:
    """Every number of replicas with every router; one engine needs none."""
    routers = _split(options.routers, "--router")
    for name in routers:
        check_router(name)
    fleets = []
    for number in _numbers(options.replicas, "--replicas", high=MAX_REPLICAS):
        if number != int(number):
            raise ConfigError(f"--replicas must be whole numbers, not {options.replicas!r}")
        fleets += [Fleet(replicas=int(number), router=router) for router in (routers if number > 1 else routers[:1])]
    return fleets


def _counted(runs: Iterator[Run], count: int, progress: Progress, task: object) -> Iterator[Run]:
    for _ in range(count):
        yield next(runs)
        progress.advance(task)  # type: ignore[arg-type]


def _loaded(scenario: Scenario, load: float) -> Scenario:
    rate_per_s = None if scenario.rate_per_s is None else scenario.rate_per_s * load
    return replace(scenario, load=scenario.load * load, rate_per_s=rate_per_s)


def _cell(values: list[float | None], factor: float, spec: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known) * factor, spec) if known else "-"


def _split(text: str, where: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{where} names nothing")
    return names


def _numbers(text: str, where: str, *, high: float = MAX_LOAD) -> list[float]:
    try:
        numbers = [float(name) for name in _split(text, where)]
    except ValueError as error:
        raise ConfigError(f"{where} must be numbers, separated by commas, not {text!r}") from error
    if not all(0 < number <= high for number in numbers):
        raise ConfigError(f"{where} must be above 0 and at most {high:g}, not {text!r}")
    return numbers


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    if path and not path.parent.is_dir():
        raise ConfigError(f"--json {path}: no such folder")

"""`python -m taper.sim`: run scenarios and print a table."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from taper.core.types import ConfigError
from taper.sim import scenario as scenarios
from taper.sim.hardware import hardware
from taper.sim.run import Case, run_all
from taper.sim.summary import Summary

SCHEMA = "taper.runs/1"
COLUMNS = {
    "goodput": ("goodput_tok_s", 1, ".0f"),
    "att %": ("attainment", 100, ".1f"),
    "serial %": ("attainment_serial", 100, ".1f"),
    "branch %": ("attainment_branching", 100, ".1f"),
    "raw tok/s": ("raw_tok_s", 1, ".0f"),
    "ttft p95 s": ("ttft_p95_s", 1, ".2f"),
    "tpot p95 ms": ("tpot_p95_s", 1e3, ".1f"),
    "step ms": ("step_mean_s", 1e3, ".1f"),
    "step p99": ("step_p99_s", 1e3, ".1f"),
    "rows": ("rows_mean", 1, ".1f"),
    "reqs": ("requests_mean", 1, ".1f"),
    "mape %": ("predictor_mape", 100, ".1f"),
}


@click.command()
@click.option("--scenario", "names", default="headline", show_default=True, help="Names by comma, or 'all'.")
@click.option("--hardware", "machine_name", default="a100x8-qwen3-32b", show_default=True)
@click.option("--policies", default="off,cap:2,cap:5,eager,taper-paper,taper", show_default=True)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 1000))
@click.option("--slower", default=1.0, show_default=True, help="Slow the hardware down by this factor.")
@click.option("--steps", type=click.IntRange(100), help="Length of the load in steps of off, instead of the file's.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 256))
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    names: str,
    machine_name: str,
    policies: str,
    seeds: int,
    slower: float,
    steps: int | None,
    workers: int,
    json_path: Path | None,
) -> None:
    """Simulate scenarios with the shipped controller; medians over seeds."""
    console = Console(width=150, soft_wrap=False)
    try:
        machine = hardware(machine_name).scaled(slower)
        chosen = [scenarios.load(n) for n in (scenarios.names() if names == "all" else names.split(","))]
        if steps:
            chosen = [replace(scenario, duration_steps=steps, duration_s=None) for scenario in chosen]
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    runs = []
    for scenario in chosen:
        cases = [
            Case(scenario=scenario, machine=machine, policy=policy, seed=seed)
            for policy in policies.split(",")
            for seed in range(seeds)
        ]
        results = list(run_all(cases, workers=workers))
        console.print(_table(scenario, machine.name, results, scenarios.settle(scenario, machine)))
        runs += [{"scenario": scenario.name, "hardware": machine.name, **r.as_dict()} for r in results]
    if json_path:
        json_path.write_text(json.dumps({"schema": SCHEMA, "runs": runs}, indent=1) + "\n", "utf-8")


def _table(scenario: scenarios.Scenario, machine: str, results: list[Summary], setting: scenarios.Setting) -> Table:
    table = Table(
        title=f"{scenario.name} on {machine}: {setting.rate_per_s:.2f} req/s for {setting.duration_s:.0f} s, "
        f"TPOT SLO {setting.slo.tpot_s * 1e3:.1f} ms (off {setting.off.step_s * 1e3:.1f} ms / "
        f"{setting.off.rate_per_s:.2f} req/s, eager {setting.eager.step_s * 1e3:.1f} ms / "
        f"{setting.eager.rate_per_s:.2f} req/s)"
    )
    for heading in ("policy", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy in dict.fromkeys(r.policy for r in results):
        rows = [r.as_dict() for r in results if r.policy == policy]
        cells = [_cell([row[key] for row in rows], factor, spec) for key, factor, spec in COLUMNS.values()]
        table.add_row(policy, *cells)
    return table


def _cell(values: list[float | str | None], factor: float, spec: str) -> str:
    known = [value for value in values if isinstance(value, (int, float))]
    return format(statistics.median(known) * factor, spec) if known else "-"


if __name__ == "__main__":
    main()

"""The `simulate` command. The simulator is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console


@click.command()
@click.option("--scenario", "scenarios", default="headline", show_default=True, help="Names, .toml paths, or 'all'.")
@click.option("--hardware", default="a100x8-qwen3-32b", show_default=True, help="Name, or path of a profile.")
@click.option("--policies", default="off,cap:2,cap:5,eager,taper-paper,taper", show_default=True)
@click.option("--seeds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many.")
@click.option("--load", "loads", default="1", show_default=True, metavar="X[,X]", help="x the scenario's own load.")
@click.option("--share", "shares", metavar="P[,P]", help="Of requests that branch, not the scenario's.")
@click.option("--steps", type=click.IntRange(100), help="Length of the load in steps of off, not the scenario's.")
@click.option("--trace", type=click.Path(dir_okay=False, path_type=Path), help="File that scenario trace replays.")
@click.option("--replicas", default="1", show_default=True, metavar="N[,N]", help="Engines behind one router.")
@click.option(
    "--router", "routers", default="group-affine", show_default=True,
    help="round-robin, least-loaded, group-affine, slack-aware; several by comma.",
)  # fmt: skip
@click.option(
    "--hold-steps", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Keep a decision so long while the batch's composition lasts: faster, approximate.",
)  # fmt: skip
@click.option("--stage-clocks", is_flag=True, help="Each stage of a request is a new one to the controller.")
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Processes.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the runs here.")
def simulate(json_path: Path | None, **options: Any) -> None:
    """Run the shipped controller on simulated hardware; prints medians over the seeds.

    Comma-separated lists multiply: every scenario, load and fleet gets a table. The file of --json is read by
    taper report.
    """
    from taper.sim.command import Options
    from taper.sim.command import simulate as run

    run(Options(**options), Console(), json_path=json_path)

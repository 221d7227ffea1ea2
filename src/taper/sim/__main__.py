"""`python -m taper.sim`: as `taper simulate`."""

import click
from rich.console import Console

from taper.sim.command import POLICIES, Options, simulate


@click.command()
@click.option("--scenario", default="headline")
@click.option("--hardware", default="a100x8-qwen3-32b")
@click.option("--policies", default=POLICIES)
@click.option("--seeds", default=3)
@click.option("--steps", type=int)
@click.option("--workers", default=2)
def main(scenario: str, hardware: str, policies: str, seeds: int, steps: int | None, workers: int) -> None:
    options = Options(
        scenarios=scenario, hardware=hardware, policies=policies, seeds=seeds, steps=steps, workers=workers
    )
    simulate(options, Console(width=150))


if __name__ == "__main__":
    main()

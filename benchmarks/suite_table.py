"""Results of `taper simulate` as a Markdown table, with policy `taper` against the best other one.

    python benchmarks/suite_table.py FILE... [--by scenario|load|replicas] [--fluid]

Cells are goodput in tok/s and attainment, medians over the seeds. `of best` is taper's goodput over that of the best
other policy among those that attain 95 % or, where none does, of all; `*` marks what falls short of P4 (95 % attainment
where another policy attains it, and 0.97 of its goodput; 0.95 elsewhere). `--fluid` adds the fraction of
`taper.sim.fluid.fluid_estimate` that taper reaches, and the largest of any run of any policy.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from taper.results import ResultsError, Run, read_runs
from taper.sim.fluid import fluid_estimate
from taper.sim.hardware import hardware
from taper.sim.scenario import load, settle

TARGET = 0.95


def median(runs: list[Run], field: str) -> float:
    return statistics.median(getattr(run.summary, field) or 0.0 for run in runs)


def fractions(runs: list[Run]) -> tuple[float, float]:
    """taper's median over the estimates, and the largest of any run."""
    first = runs[0].conditions
    scenario = load(first.scenario)
    scenario = replace(scenario, load=first.load)
    machine = hardware(first.hardware)
    assert settle(scenario, machine).slo.tpot_s == first.slo_tpot_s, "the scenario has changed since"
    best = {seed: fluid_estimate(scenario, machine, seed=seed) for seed in {run.conditions.seed for run in runs}}
    over = [(run.policy, run.summary.goodput_tok_s / best[run.conditions.seed].goodput_tok_s) for run in runs]
    return statistics.median(x for policy, x in over if policy == "taper"), max(x for _, x in over)


def row(runs: list[Run], policies: list[str]) -> str:
    cells, found = [], {}
    for policy in policies:
        mine = [run for run in runs if run.policy == policy]
        if mine:
            found[policy] = median(mine, "goodput_tok_s"), median(mine, "attainment")
        cells.append(f"{found[policy][0]:,.0f} / {found[policy][1]:.1%}" if mine else "-")
    if "taper" in found:
        others = {name: value for name, value in found.items() if name != "taper"}
        reaching = {name: value for name, value in others.items() if value[1] >= TARGET}
        best = max((reaching or others).values())[0]
        goodput, attainment = found["taper"]
        short = goodput < (0.97 if reaching else 0.95) * best or (bool(reaching) and attainment < TARGET)
        cells.append(f"{goodput / best:.2f}{'*' if short else ''}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--by", choices=("scenario", "load", "replicas"), default="scenario")
    parser.add_argument("--fluid", action="store_true")
    options = parser.parse_args()
    try:
        runs = [run for path in options.files for run in read_runs(path)]
    except ResultsError as error:
        parser.error(str(error))
    policies = list(dict.fromkeys(run.policy for run in runs))
    heading = [
        options.by,
        *policies,
        *(["of best"] if "taper" in policies else []),
        *(["of fluid", "most"] * options.fluid),
    ]
    print("| " + " | ".join(heading) + " |\n|" + " --- |" * len(heading))
    for key in dict.fromkeys(getattr(run.conditions, options.by) for run in runs):
        mine = [run for run in runs if getattr(run.conditions, options.by) == key]
        fluid = " | {:.2f} | {:.2f}".format(*fractions(mine)) if options.fluid else ""
        print(f"| {key} | {row(mine, policies)}{fluid} |")


if __name__ == "__main__":
    main()

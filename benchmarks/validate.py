"""The simulator against the real engine: every window of a `taper bench` sweep, simulated with the same requests.

    python benchmarks/validate.py MEASURED.json --profile PROFILE.json [--json SIMULATED.json]

MEASURED is a results file of the default mix with its `resolved` block: results/engine/loads.json, say. The simulated
machine is the profile's, slowed by what the bench found steps to take under load; requests, arrivals, SLO, bound on
requests in service and windows are the measured ones. Printed are medians over the rounds, per point and policy, and
how far they lie apart. SIMULATED has the same schema, for `taper report MEASURED.json SIMULATED.json`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from taper.core.types import Slo
from taper.results import Run, document, read_runs
from taper.sim.hardware import Hardware, calibrated
from taper.sim.run import Case, conditions_of, simulate, window_of
from taper.sim.scenario import Scenario, of_regime, settle
from taper.sim.summary import summarise
from taper.workload import Regime, Synthetic

TOLERANCE = 0.10
SCENARIO = "contended"


def seconds_of(command: str, option: str) -> float:
    """The value of an option of the recorded command."""
    words = shlex.split(command)
    return float(words[words.index(option) + 1])


def scenario_of(run: Run, measured: dict[str, Any]) -> Scenario:
    """The window's load, as the simulator takes it."""
    conditions, resolved = run.conditions, measured["resolved"]
    source = Synthetic().shared(conditions.share)
    regime = Regime(
        name=SCENARIO,
        source=source.scaled(resolved["output_scale"], prompt=resolved["prompt_scale"]),
        rate_rps=conditions.rate_rps,
        max_concurrency=conditions.concurrency,
        slo=Slo(tpot_s=conditions.slo_tpot_s, ttft_s=60.0),
    )
    ramp_s, measure_s = (seconds_of(measured["command"], option) for option in ("--ramp-s", "--measure-s"))
    load_s = ramp_s + measure_s
    return of_regime(regime, load=conditions.load, duration_s=load_s, warm_share=ramp_s / load_s)


def simulated(run: Run, machine: Hardware, measured: dict[str, Any]) -> Run:
    case = Case(scenario=scenario_of(run, measured), machine=machine, policy=run.policy, seed=run.conditions.seed)
    setting = settle(case.scenario, machine)
    trace = simulate(case)
    conditions = replace(conditions_of(case, setting), round=run.conditions.round)
    return summarise(conditions, trace.records, [trace], window_of(case, setting))


def median(runs: Sequence[Run], field: Callable[[Run], float | None]) -> float:
    return statistics.median(field(run) or 0.0 for run in runs)


def table(measured: Sequence[Run], simulated: Sequence[Run]) -> tuple[list[str], list[float]]:
    """Markdown rows, one per point and policy, and how far each figure lies off: shares for goodput, points / 100."""
    lines = [
        "| share | load | policy | goodput measured | simulated | ratio | attainment measured | simulated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    off: list[float] = []
    keys = dict.fromkeys((run.conditions.share, run.conditions.load, run.policy) for run in measured)
    for share, load, policy in keys:
        pair = [
            [run for run in runs if (run.conditions.share, run.conditions.load, run.policy) == (share, load, policy)]
            for runs in (measured, simulated)
        ]
        goodput = [median(runs, lambda run: run.summary.goodput_tok_s) for runs in pair]
        attained = [median(runs, lambda run: run.summary.attainment) for runs in pair]
        ratio = goodput[1] / goodput[0]
        off += [abs(ratio - 1), abs(attained[1] - attained[0])]
        lines.append(
            f"| {share:g} | {load:g} | {policy} | {goodput[0]:.0f} | {goodput[1]:.0f} | {ratio:.2f} "
            f"| {attained[0]:.0%} | {attained[1]:.0%} |"
        )
    return lines, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = json.loads(options.measured.read_text())
    runs = [run for run in read_runs(options.measured) if run.conditions.accepted]
    machine = calibrated(options.profile).scaled(about["resolved"]["law_scale"])
    made = [simulated(run, machine, about) for run in runs]
    lines, off = table(runs, made)
    print("\n".join(lines))
    close = sum(one <= TOLERANCE for one in off)
    print(f"{close} of {len(off)} figures within {TOLERANCE:.0%}, median {statistics.median(off):.1%} off")
    if options.json:
        options.json.write_text(json.dumps(document(made), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()

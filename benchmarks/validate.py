"""The simulator against the real engine: every window of a `taper bench` sweep, simulated with the same requests.

    python benchmarks/validate.py MEASURED... [--hardware NAME] [--trace FILE] [--json SIMULATED.json]

MEASURED are output folders of `taper bench`, or results files that keep its settings (results/engine/loads.json).
Requests, arrivals, SLO, bound on requests in service and windows are the measured ones; the machine is --hardware, and
its controller starts from the bench's calibration, as the engine's did. A machine that others share is not equally fast
in every window: with --paced, which needs folders with steps, the simulated machine is in each as fast as the window's
steps say, so that what is left is the simulator's own error. Printed are medians over the rounds, per point
and policy. SIMULATED has the schema of MEASURED: `taper report MEASURED... SIMULATED.json` draws one against the other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taper.benchmark import BenchOptions, Resolved, source_of
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Slo
from taper.profile import parse_profile
from taper.records import step_file
from taper.results import Run, document, read_runs
from taper.sim.fit import clean_steps, executed_s
from taper.sim.hardware import Hardware, hardware
from taper.sim.run import Case, simulate, window_of
from taper.sim.scenario import of_regime, settle
from taper.sim.summary import summarise
from taper.workload import Regime, Source

TOLERANCE = 0.10
UNJUDGED_TTFT_S = 60.0  # what the bench gives the controller where TTFT is not judged
ABOUT = ("settings", "resolved", "profile")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was measured, and under what."""

    runs: list[Run]
    options: BenchOptions
    source: Source
    law: LinearLatency  # the controller's, to start with
    pace: Mapping[str, float]  # window -> how much slower than the machine's law its steps were


def paces(path: Path, law: LinearLatency) -> dict[str, float]:
    """Geometric mean of measured / predicted over the clean steps of each window, decisions left out of both."""
    logs: dict[str, list[float]] = {}
    for step in clean_steps(step_file().read(path / "steps.jsonl")):
        predicted_s = law.predict(step.rows, step.context_tokens, step.prefill_tokens)
        logs.setdefault(step.window, []).append(math.log(executed_s(step) / predicted_s))
    return {window: math.exp(statistics.fmean(values)) for window, values in logs.items()}


def read(path: Path, *, trace: Path | None, paced_by: LinearLatency | None) -> Sweep:
    """Raises ConfigError for a sweep that does not say how it was made, or judged TTFT."""
    runs = read_runs(path / "runs.json" if path.is_dir() else path)
    about: dict[str, Any] = json.loads((path / "meta.json" if path.is_dir() else path).read_text("utf-8"))
    if missing := [key for key in ABOUT if not about.get(key)]:
        raise ConfigError(f"{path}: has no {missing[0]}: not a bench of a TAPER server with a calibration")
    options = BenchOptions.of_settings(about["settings"], out=path)
    if paced_by and not (path / "steps.jsonl").exists():
        raise ConfigError(f"{path}: --paced needs an output folder of taper bench --steps")
    if options.trace_path and trace:
        options = replace(options, trace_path=trace)
    if options.ttft_slo_s is not None:
        raise ConfigError(f"{path}: time to first token was judged; the simulator's records do not")
    return Sweep(
        runs=[run for run in runs if run.conditions.accepted],
        options=options,
        source=Resolved(**about["resolved"]).of(source_of(options)),
        law=parse_profile(about["profile"], where=f"{path}: profile").latency(),
        pace=paces(path, paced_by) if paced_by else {},
    )


def case_of(run: Run, sweep: Sweep, machine: Hardware) -> Case:
    """The window's load, as the simulator takes it."""
    conditions, plan = run.conditions, sweep.options.plan
    regime = Regime(
        name=machine.name,
        source=sweep.source if conditions.share is None else sweep.source.shared(conditions.share),
        rate_rps=conditions.rate_rps or 0.0,
        max_concurrency=conditions.concurrency or 1,
        slo=Slo(tpot_s=conditions.slo_tpot_s or 0.0, ttft_s=UNJUDGED_TTFT_S),
    )
    scenario = of_regime(
        regime, load=conditions.load or 1.0, duration_s=plan.load_s, warm_share=plan.ramp_s / plan.load_s
    )
    machine = machine.scaled(sweep.pace.get(conditions.window, 1.0))
    return Case(scenario=scenario, machine=machine, policy=run.policy, seed=conditions.seed, law=sweep.law)


def simulated(run: Run, sweep: Sweep, machine: Hardware, draws: int) -> Iterator[Run]:
    """The window, under several draws of the noise."""
    case = case_of(run, sweep, machine)
    window = window_of(case, settle(case.scenario, case.machine))
    conditions = replace(run.conditions, hardware=machine.name, window="", attempt=0, bound_tok_s=None)
    for draw in range(draws):
        trace = simulate(case, draw=draw)
        yield summarise(conditions, trace.records, [trace], window)


def median(runs: Sequence[Run], field: Callable[[Run], float | None]) -> float:
    return statistics.median(field(run) or 0.0 for run in runs)


def table(measured: Sequence[Run], made: Sequence[Run]) -> tuple[list[str], list[float]]:
    """Markdown rows, one per point and policy, and by what share each simulated figure lies off."""
    lines = [
        "| share | load | policy | goodput measured | simulated | ratio | attainment measured | simulated | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def key(run: Run) -> tuple[Any, ...]:
        return run.conditions.share, run.conditions.rate_rps, run.conditions.slo_tpot_s, run.policy

    off: list[float] = []
    for point in dict.fromkeys(map(key, measured)):
        pair = [[run for run in runs if key(run) == point] for runs in (measured, made)]
        goodput = [median(runs, lambda run: run.summary.goodput_tok_s) for runs in pair]
        attained = [median(runs, lambda run: run.summary.attainment) for runs in pair]
        ratios = [after / before if before else float(after == before) for before, after in (goodput, attained)]
        off += [abs(ratio - 1) for ratio in ratios]
        first = pair[0][0].conditions
        lines.append(
            f"| {first.share or 0:g} | {first.load or 0:g} | {first.policy} | {goodput[0]:.0f} | {goodput[1]:.0f} "
            f"| {ratios[0]:.2f} | {attained[0]:.0%} | {attained[1]:.0%} | {ratios[1]:.2f} |"
        )
    return lines, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+", metavar="MEASURED")
    parser.add_argument("--hardware", default="cpu-smollm2")
    parser.add_argument("--trace", type=Path, help="the file of a replay, where it lies elsewhere now")
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--draws", type=int, default=3, help="of the noise, per window")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = hardware(options.hardware)
    law = machine.predictor() if options.paced else None
    sweeps = [read(path, trace=options.trace, paced_by=law) for path in options.measured]
    measured = [run for sweep in sweeps for run in sweep.runs]
    made = [one for sweep in sweeps for run in sweep.runs for one in simulated(run, sweep, machine, options.draws)]
    lines, off = table(measured, made)
    print("\n".join(lines))
    close = sum(one <= TOLERANCE for one in off)
    print(f"{close} of {len(off)} figures within {TOLERANCE:.0%}, median {statistics.median(off):.1%} off")
    if options.json:
        options.json.write_text(json.dumps(document(made), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()

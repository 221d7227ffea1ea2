"""What each part of policy `taper` is worth: the simulated suite with one part taken out at a time.

    python benchmarks/ablation.py [--hardware NAME] [--seeds N] [--scenarios NAMES] [--without PARTS] [--json PATH]

Half an hour to an hour and a half on two cores for everything. The file of --json is written after each part, and parts
that are in it already are not run again.

Per part, against the whole controller and in medians over the seeds: goodput and the change in attainment, means over
the scenarios, how many of them lose half a per cent of the goodput or half a point, how many gain as much, and the
scenario that suffers most. Every run is that of `taper simulate`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import taper.sim.run as sim
from taper.bench.machine import commit
from taper.core import policies, slack
from taper.core.types import Knobs
from taper.sim.hardware import hardware
from taper.sim.scenario import load, names

SMALL = 0.005


@dataclass(frozen=True)
class Variant:
    """The whole controller but for one part: a knob at the value that switches it off, or a function replaced."""

    knobs: Knobs = field(default_factory=Knobs)
    replaced: dict[str, object] = field(default_factory=dict)  # "module.function" -> stand-in


def _nobody_is_hopeless(credit, tpot_slo_s, at_best, remaining, baseline_s):
    return np.zeros(len(credit), dtype=np.bool_)


def _no_prefill_limit(view, predict, knobs, *, decode_s, limit_s):
    return view.max_prefill_tokens


_ALLOWED_S = slack.allowed_s


def _debt_over_the_horizon(view, credit, live, *, knobs, margin, mean_path_tokens):
    return _ALLOWED_S(view, credit, live, knobs=knobs, margin=margin, mean_path_tokens=0.0)


BASE = Knobs()
VARIANTS = {
    "nothing": Variant(),
    "outer loop (floor)": Variant(replace(BASE, throughput_floor=0)),
    "hopeless exclusion": Variant(replaced={"slack.hopeless": _nobody_is_hopeless}),
    "prefill bound": Variant(replaced={"policies.prefill_limit": _no_prefill_limit}),
    "margin feedback": Variant(replace(BASE, margin_gain=0.0)),
    "predictor correction": Variant(replace(BASE, correction_rate=0.0)),
    "pacing (H = 1)": Variant(replace(BASE, horizon_steps=1)),
    "debt over a life": Variant(replaced={"slack.allowed_s": _debt_over_the_horizon}),
    "margin (0)": Variant(replace(BASE, margin=0.0)),
    "quantum (1)": Variant(replace(BASE, quantum_tokens=1)),
}


def run(case: tuple[str, sim.Case]) -> tuple[float, float]:
    """Goodput and attainment of one case under the named variant, in whatever process."""
    name, one = case
    variant = VARIANTS[name]
    modules = {"slack": slack, "policies": policies}
    shipped = {path: getattr(modules[path.split(".")[0]], path.split(".")[1]) for path in variant.replaced}
    for path, stand_in in variant.replaced.items():
        setattr(modules[path.split(".")[0]], path.split(".")[1], stand_in)
    try:
        summary = sim.run(replace(one, knobs=variant.knobs)).summary
    finally:
        for path, original in shipped.items():
            setattr(modules[path.split(".")[0]], path.split(".")[1], original)
    return summary.goodput_tok_s, summary.attainment or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="a100x8-qwen3-32b")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenarios", default=",".join(n for n in names() if n not in ("trace", "headline-one-slo")))
    parser.add_argument("--without", default=",".join(VARIANTS), help="Parts, by comma.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine, scenarios = hardware(options.hardware), options.scenarios.split(",")
    asked = {"commit": commit(), "hardware": options.hardware, "seeds": options.seeds, "scenarios": scenarios}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text())
        if kept.get("asked") != asked:
            parser.error(f"{options.json} holds other runs: {kept.get('asked')}")
        found = kept["results"]
    whole = options.without.split(",")[0]
    with ProcessPoolExecutor(2) as pool:
        for name in options.without.split(","):
            if name not in found:
                cases = [
                    (name, sim.Case(scenario=load(scenario), machine=machine, policy="taper", seed=seed))
                    for scenario in scenarios
                    for seed in range(options.seeds)
                ]
                results = list(pool.map(run, cases))
                for at, scenario in enumerate(scenarios):
                    mine = results[at * options.seeds : (at + 1) * options.seeds]
                    found.setdefault(name, {})[scenario] = (
                        statistics.median(goodput for goodput, _ in mine),
                        statistics.median(attainment for _, attainment in mine),
                    )
                if options.json:
                    kept = {"schema": "taper.ablation/1", "asked": asked, "results": found}
                    options.json.write_text(json.dumps(kept, indent=1) + "\n")
            _print(name, found[name], found[whole])


def _print(name: str, mine: dict[str, tuple[float, float]], whole: dict[str, tuple[float, float]]) -> None:
    ratio = {s: mine[s][0] / whole[s][0] if whole[s][0] else 1.0 for s in whole}
    points = {s: 100 * (mine[s][1] - whole[s][1]) for s in whole}
    loses = [s for s in whole if ratio[s] < 1 - SMALL or points[s] < -100 * SMALL]
    gains = [s for s in whole if (ratio[s] > 1 + SMALL or points[s] > 100 * SMALL) and s not in loses]
    worst = min(whole, key=lambda s: ratio[s] + points[s] / 100)
    print(
        f"| {name} | {statistics.mean(ratio.values()):.3f} | {statistics.mean(points.values()):+.1f} |"
        f" {len(loses)} | {len(gains)} | `{worst}` {ratio[worst]:.2f}, {points[worst]:+.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""A machine for `taper simulate --hardware`, from the records of a bench on it: TOML on stdout.

    python benchmarks/fit_hardware.py DIR... [--like NAME] > src/taper/sim/machines/NAME.toml

DIR are output folders of `taper bench --steps`. KV, slots and usual lengths are not in them: they are those of --like.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from taper.records import request_file, step_file
from taper.sim.fit import fitted
from taper.sim.hardware import Hardware, hardware

DIGITS = 4


def toml(machine: Hardware) -> str:
    """Every field that is not the default."""
    lines = []
    for spec in fields(machine):
        value = getattr(machine, spec.name)
        if spec.name != "name" and value != spec.default:
            text = f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
            lines.append(f"{spec.name} = {list(value) if isinstance(value, tuple) else text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--like", default="cpu-smollm2")
    options = parser.parse_args()
    steps, requests = [], []
    for folder in options.folders:  # windows of two sweeps may have the same name
        steps += [replace(one, window=f"{folder}/{one.window}") for one in step_file().read(folder / "steps.jsonl")]
        requests += [
            replace(one, window=f"{folder}/{one.window}") for one in request_file().read(folder / "requests.jsonl")
        ]
    print(toml(fitted(steps, requests, hardware(options.like))))


if __name__ == "__main__":
    main()

"""What one decision costs: decide() over batch sizes and policies.

    python benchmarks/decide.py [--json PATH]

The goal (P7 of docs/controller.md) is p99 <= 150 us at 256 rows and <= 1.5 ms at 4,096 rows, the controller's
state included. Latencies are of this process alone; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.core.views import random_view

from taper.core.controller import Controller
from taper.core.latency import LinearLatency
from taper.core.policies import resolve
from taper.core.types import Knobs

CPU_LAW = LinearLatency(base_s=0.014, row_s=0.0005, context_s=1.7e-6, prefill_s=0.00036)
GPU_LAW = LinearLatency(
    base_s=0.0112, row_s=1e-4, context_s=33e-9, prefill_s=55e-6, capture_sizes=tuple(range(8, 513, 8))
)
SHAPES = ((64, 64), (64, 16), (256, 256), (256, 40), (4096, 400), (4096, 4096))
POLICIES = ("off", "eager", "taper-paper", "taper")


def measure(law: LinearLatency, policy: str, rows: int, requests: int, calls: int) -> tuple[float, float]:
    """Median and 99th percentile of decide() in microseconds."""
    rng = np.random.default_rng(7)
    views = [random_view(rng, rows=rows, requests=requests) for _ in range(32)]
    controller = Controller(latency=law, policy=resolve(policy), knobs=Knobs())
    for view in views:
        controller.decide(view)
    taken_us = np.empty(calls)
    gc.disable()  # an engine freezes its heap at start-up for the same reason
    for i in range(calls):
        view = views[i % len(views)]
        start = time.perf_counter_ns()
        controller.decide(view)
        taken_us[i] = (time.perf_counter_ns() - start) / 1000
    gc.enable()
    return float(np.median(taken_us)), float(np.percentile(taken_us, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    results = []
    print(f"{'law':>4} {'rows':>5} {'requests':>8}  {'policy':<12} {'p50 us':>8} {'p99 us':>8}")
    for label, law in (("cpu", CPU_LAW), ("gpu", GPU_LAW)):
        for rows, requests in SHAPES:
            for policy in POLICIES:
                p50_us, p99_us = measure(law, policy, rows, requests, options.calls)
                print(f"{label:>4} {rows:>5} {requests:>8}  {policy:<12} {p50_us:>8.0f} {p99_us:>8.0f}")
                results.append(
                    {"law": label, "rows": rows, "requests": requests, "policy": policy}
                    | {"p50_s": p50_us / 1e6, "p99_s": p99_us / 1e6}
                )
    if options.json:
        options.json.write_text(json.dumps({"schema": "taper.decide-bench/1", "results": results}, indent=1))


if __name__ == "__main__":
    main()

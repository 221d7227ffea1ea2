"""Measure TAPER on one large GPU: what a step costs there, and what the policies are worth, on the same server.

    PYTHONPATH=BUNDLE/site VLLM_USE_FLASHINFER_SAMPLER=0 python benchmarks/gpu/run.py BUNDLE/qwen3-32b OUT

About nine minutes on one H200. `--parts` names some of the parts, the options say for how long each is measured.

Serves the model of a bundle (bundle.py) with random weights, then, as far as the time goes:

- surface: step latency over rows x context, the linear law fitted to it and its held-out error (OUT/profile.json,
  OUT/surface.json: medians per cell);
- staircase: a few row counts around sizes of captured graphs;
- policies: `taper bench` on the running server (OUT/bench).

Everything is written as soon as it is measured. OUT/about.json names versions, card and commands.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from taper.config import ServerConfig
from taper.core.calibration import Samples
from taper.core.types import Slo
from taper.engines.vllm import calibrate
from taper.engines.vllm.drive import Driver
from taper.engines.vllm.grid import Visit
from taper.engines.vllm.launch import Server, exit_on_sigterm

# Neither needs a compiler on the machine. With "prompts" steps that carry prompt tokens are captured as well, piece by
# piece, and not launched kernel by kernel; the start takes longer.
GRAPHS = {
    "decode": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "prompts": {"mode": 3, "backend": "eager", "cudagraph_mode": "FULL_AND_PIECEWISE"},
}
SERVER_ARGS = (
    "--load-format=dummy",
    "--max-model-len=8448",
    "--max-num-seqs=512",
    "--max-num-batched-tokens=1024",
    "--gpu-memory-utilization=0.93",
    "--stream-interval=4",  # four tokens per event: 512 streams would keep the HTTP process busy with less
)
STAIRCASE_ROWS = (60, 62, 64, 66, 68, 72, 124, 128, 130, 136, 252, 256, 258, 264, 272)
STAIRCASE_CONTEXT_TOKENS = 256
STEPS = 12
TAPER = "from taper.cli import main; main()"  # the bundle has no scripts


def about(model: Path, server: Server) -> dict[str, Any]:
    import torch

    versions = {name: metadata.version(name) for name in ("vllm", "torch", "transformers", "taper-llm")}
    return {
        "schema": "taper.gpu/1",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "card": torch.cuda.get_device_name(),
        "versions": versions,
        "model": json.loads((model / "config.json").read_text()),
        "server": server.argv[1:],
        "command": " ".join(sys.argv),
    }


def cells(samples: Samples) -> list[dict[str, float]]:
    """Medians of the cells that were visited on purpose, with the spread of their samples."""
    found = []
    assert samples.cell is not None
    for cell in np.unique(samples.cell[samples.cell >= 0]):
        own = samples.take(samples.cell == cell)
        p10, p50, p90 = np.quantile(own.measured_s, [0.1, 0.5, 0.9])
        found.append(
            {
                "rows": int(np.median(own.rows)),
                "context_tokens": int(np.median(own.context_tokens)),
                "steps": len(own),
                "p10_s": float(p10),
                "p50_s": float(p50),
                "p90_s": float(p90),
            }
        )
    return found


def surface(server: Server, out: Path, budget_s: float) -> None:
    found = calibrate.calibrate(server.url, server.control_headers, budget_s=budget_s, progress=print)
    (out / "profile.json").write_text(json.dumps(found.profile.to_json(), indent=1))
    rows = {
        "cells": cells(found.samples),
        "prefill_steps": [
            {"rows": int(r), "context_tokens": int(c), "prefill_tokens": int(p), "measured_s": float(s)}
            for r, c, p, s in zip(
                found.samples.rows,
                found.samples.context_tokens,
                found.samples.prefill_tokens,
                found.samples.measured_s,
                strict=True,
            )
            if p
        ],
    }
    (out / "surface.json").write_text(json.dumps(rows))
    law = found.fit
    print(f"law: {law.latency}")
    print(f"  {law.samples} samples ({law.moved} not timed by themselves) in {law.cells} cells")
    print(f"  MAPE in sample {law.mape:.3f}, held out {law.heldout_mape}")
    print(f"  held-out cell medians {law.heldout_cell_mape}, noise floor {law.noise_floor:.3f}")
    for cell in rows["cells"]:
        print(f"  rows {cell['rows']:4d} context {cell['context_tokens']:7d}: {1e3 * cell['p50_s']:.2f} ms")


def staircase(server: Server, out: Path) -> None:
    async def visits() -> Samples:
        async with Driver(server.url, server.control_headers, seed=1) as driver:
            await driver.configure({"policy": "off"})
            for rows in STAIRCASE_ROWS:
                await driver.visit(Visit(rows=rows, context_tokens=STAIRCASE_CONTEXT_TOKENS, steps=STEPS))
            return driver.samples()

    found = cells(asyncio.run(visits()))
    (out / "staircase.json").write_text(json.dumps(found))
    print("staircase:", ", ".join(f"{cell['rows']}: {1e3 * cell['p50_s']:.2f} ms" for cell in found))


def policies(server: Server, out: Path, options: argparse.Namespace) -> None:
    command = [
        sys.executable, "-c", TAPER, "bench", "--url", server.url, "--profile", str(out / "profile.json"),
        "--out", str(out / "bench"), "--policies", options.policies, "--loads", options.loads, "--shares", "0.4",
        "--output-scale", options.output_scale, "--slos", "0.6", "--rounds", str(options.rounds),
        "--ramp-s", "4", "--measure-s", str(options.measure_s),
        "--drain-s", "25", "--tries", "1", "--steps",
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    try:
        token = {"TAPER_CONTROL_TOKEN": server.config.control_token or ""}
        subprocess.run(command, check=True, timeout=options.policies_s, env=os.environ | token)
    except subprocess.TimeoutExpired:
        print(f"the sweep was stopped after {options.policies_s:.0f} s; its finished windows are kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="surface,staircase,policies")
    parser.add_argument("--graphs", choices=GRAPHS, default="decode", help="which steps are captured")
    parser.add_argument("--surface-s", type=float, default=100.0, help="time for the surface")
    parser.add_argument("--policies", default="off,cap:2,cap:5,eager,taper")
    parser.add_argument("--policies-s", type=float, default=330.0, help="time for the sweep; what is cut short stays")
    parser.add_argument("--loads", default="1.5")
    parser.add_argument("--output-scale", default="auto", help="as of taper bench")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure-s", type=float, default=14.0)
    options = parser.parse_args()
    exit_on_sigterm()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = options.parts.split(",")
    start_s = time.monotonic()
    config = ServerConfig(slo=Slo(tpot_s=0.05))
    arguments = (*SERVER_ARGS, "--compilation-config=" + json.dumps(GRAPHS[options.graphs]))
    with Server(str(options.model), arguments, config=config, log=options.out / "server.log") as server:
        print(f"server ready after {time.monotonic() - start_s:.0f} s", flush=True)
        (options.out / "about.json").write_text(json.dumps(about(options.model, server), indent=1))
        if "surface" in parts:
            surface(server, options.out, options.surface_s)
        if "staircase" in parts:
            staircase(server, options.out)
        if "policies" in parts:
            policies(server, options.out, options)
        print(f"done after {time.monotonic() - start_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()

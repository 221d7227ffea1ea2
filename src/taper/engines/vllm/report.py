"""What a calibration found and what a server decided, for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from taper.config import ENV_VAR, ServerConfig
from taper.core.calibration import Fit, Samples
from taper.core.latency import LinearLatency
from taper.engines.vllm.command import CLI_MODULE, PLUGIN

RESIDUAL_ROWS = 10  # at most so many lines of the residual table


def law_line(law: LinearLatency) -> str:
    """The law in words, in ms and us."""
    steep = f" (+ {law.steep_s * 1e3:.3f} ms beyond {law.knee_rows:g})" if law.steep_s else ""
    return (
        f"{law.base_s * 1e3:.2f} ms + {law.row_s * 1e3:.3f} ms/row{steep} + {law.context_s * 1e6:.3f} us/context token"
        f" + {law.prefill_s * 1e3:.3f} ms/prompt token"
    )


def error_line(stats: Mapping[str, Any]) -> str:
    """The errors of a fit, from a profile's `fit` or a `Fit` as a dict."""
    return (
        f"held-out error {percent(stats.get('heldout_mape'))}, in-sample {percent(stats.get('mape'))},"
        f" noise floor {percent(stats.get('noise_floor'))}"
    )


def percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else "unknown"


def calibration_report(result: Fit, samples: Samples) -> RenderableType:
    """Coefficients, errors and residuals of a calibration."""
    return Group(_coefficients(result.latency), _errors(result), _residuals(result.latency, samples))


def decisions(server: Mapping[str, Any], *, url: str, how: str, law: LinearLatency | None) -> Iterator[str]:
    """What a server decided, one line each; `server` is an engine's snapshot, `how` where its profile is from."""
    seams = server["seams"]
    holding = sum(bool(holds) for holds in seams["seams"].values())
    yield f"url      {url}/v1   (state: {url}/taper/state)"
    yield f"policy   {server['policy']}"
    yield (
        f"SLO      {server['tpot_slo_s'] * 1e3:g} ms per output token over all of a request's branches;"
        f" first token within {server['ttft_slo_s'] * 1e3:g} ms"
    )
    yield f"profile  {how}"
    if law is not None:
        yield f"cost     step = {law_line(law)}"
    yield f"seams    {holding} of {len(seams['seams'])} hold ({seams['distribution']} {seams['version']})"


def plain_line(argv: Sequence[str], config: ServerConfig) -> str:
    """How to get the same from a plain vLLM server, without the supervisor; `argv` as from `server_command`."""
    settings: dict[str, Any] = {"policy": config.policy, "slo": asdict(config.slo)}
    for name in ("knobs", "limits"):
        chosen, default = asdict(getattr(config, name)), asdict(getattr(ServerConfig(), name))
        if changed := {key: value for key, value in chosen.items() if value != default[key]}:
            settings[name] = changed
    shown = ["vllm", *argv[2:]] if argv[1] == CLI_MODULE else ["python", *argv]
    return f"{ENV_VAR}={shlex.quote(json.dumps(settings))} VLLM_PLUGINS={PLUGIN} {shlex.join(shown)}"


def _coefficients(law: LinearLatency) -> Table:
    table = Table(title="step = base + row x rows + context x tokens + prompt x tokens", title_justify="left", box=None)
    for name in ("coefficient", "value", "unit"):
        table.add_column(name, justify="right" if name == "value" else "left")
    table.add_row("base", f"{law.base_s * 1e3:.3f}", "ms")
    table.add_row("row", f"{law.row_s * 1e3:.4f}", "ms per row")
    if law.steep_s:
        table.add_row("  beyond the knee", f"+{law.steep_s * 1e3:.4f}", f"ms per row beyond {law.knee_rows:g}")
    table.add_row("context", f"{law.context_s * 1e6:.4f}", "us per context token")
    table.add_row("prompt", f"{law.prefill_s * 1e3:.4f}", "ms per prompt token")
    return table


def _errors(result: Fit) -> Table:
    table = Table(title=f"{result.samples} steps in {result.cells} loads", title_justify="left", box=None)
    table.add_column("error")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    table.add_row("held-out MAPE", percent(result.heldout_mape), "each quarter of the loads, by the others' law")
    table.add_row("  of medians", percent(result.heldout_cell_mape), "the same, on the loads' median steps")
    table.add_row("in-sample MAPE", percent(result.mape), "all loads")
    table.add_row("noise floor", percent(result.noise_floor), "steps of one load against their own median")
    table.add_row("outliers", percent(result.outliers / result.samples), "far from their load's median; left out above")
    spread = f"{result.residual_p05:+.1%} {result.residual_p50:+.1%} {result.residual_p95:+.1%}"
    table.add_row("residuals", spread, "measured over predicted, 5th, 50th and 95th percentile")
    return table


def _residuals(law: LinearLatency, samples: Samples) -> Table:
    """Median of measured / predicted - 1, by rows and by context per row: shows where the law bends."""
    decode = (samples.prefill_tokens == 0) & (samples.rows > 0)
    rows, context = samples.rows[decode], samples.context_tokens[decode]
    measured = samples.measured_s[decode]
    residual = measured / law.predict(rows, context, np.zeros_like(rows)) - 1.0
    octave = np.round(np.log2(np.maximum(context / np.maximum(rows, 1), 1.0))).astype(np.int64)
    columns = np.unique(octave)
    counts = [int(count) for count in np.unique(rows) if np.count_nonzero(rows == count) >= 4]
    chosen = counts[:: max(1, -(-len(counts) // RESIDUAL_ROWS))]
    table = Table(title="median residual, rows by context tokens per row", title_justify="left", box=None)
    table.add_column("rows", justify="right")
    for column in columns:
        table.add_column(f"~{2 ** int(column)}", justify="right")
    for count in chosen:
        cells = [residual[(rows == count) & (octave == column)] for column in columns]
        table.add_row(str(count), *(f"{np.median(cell):+.0%}" if len(cell) else "" for cell in cells))
    return table

"""The JSON document of a run: everything needed to recompute its table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from taper.bench.campaign import Campaign, Findings
from taper.bench.machine import Machine
from taper.bench.result import over_rounds, ratio_over_rounds
from taper.bench.verdict import Verdict
from taper.core.types import ConfigError
from taper.goodput import Spread, Summary
from taper.records import request_file
from taper.results import EngineStats

DEMO_SCHEMA = "taper.demo/1"
_RATIOS = ("goodput_tok_s", "raw_tok_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Under what a run was made."""

    campaign: Campaign
    model: str
    machine: Machine
    profile: Mapping[str, Any]
    created: str  # ISO date and time


def document(setting: Setting, findings: Findings, verdict: Verdict) -> dict[str, Any]:
    """`{"schema", ..., "runs": [one flat object per policy and round], "requests": [one per request]}`.

    Times inside requests are seconds on the client's monotonic clock.
    """
    campaign = setting.campaign
    names = [spec.name for kind in (Summary, EngineStats) for spec in fields(kind)]
    writer = request_file()
    return {
        "schema": DEMO_SCHEMA,
        "created": setting.created,
        "model": setting.model,
        "seed": campaign.seed,
        "rounds": campaign.rounds,
        "policies": list(campaign.policies),
        "window": asdict(campaign.plan),
        "regime": asdict(campaign.regime),
        "contended": verdict.contended,
        "regime_line": verdict.regime_line,
        "machine": asdict(setting.machine),
        "profile": dict(setting.profile),
        "summary": {
            policy: {name: _spread(over_rounds(findings.runs, policy, name)) for name in names}
            for policy in campaign.policies
        },
        "ratios": {name: _ratios(findings, campaign.policies, name) for name in _RATIOS},
        "targets": [asdict(target) for target in verdict.targets],
        "notes": list(verdict.notes),
        "runs": [run.to_json() for run in findings.runs],
        "requests": [writer.to_dict(record) for record in findings.records],
    }


def check_writable(path: Path) -> None:
    """Raise ConfigError now rather than after six minutes."""
    if path.is_dir():
        raise ConfigError(f"--json {path}: is a directory")
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--json {path}: cannot write into {folder}")


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write beside the final name and rename, so that a reader sees a whole document or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(body, out, allow_nan=False)
            out.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _spread(value: Spread | None) -> dict[str, Any] | None:
    return asdict(value) if value else None


def _ratios(findings: Findings, policies: Sequence[str], name: str) -> dict[str, dict[str, Any] | None]:
    others = [policy for policy in policies if policy != "taper"] if "taper" in policies else []
    return {f"taper/{other}": _spread(ratio_over_rounds(findings.runs, name, "taper", other)) for other in others}

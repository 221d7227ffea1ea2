"""What a run of one policy came to: the summary that bench and simulator both write and `taper report` reads.

A results file is one JSON object, `{"schema": "taper.runs/1", "runs": [...]}`, a flat object per run: the fields of
`Conditions` (what was run), of `goodput.Summary` (the client's figures) and of `EngineStats` (the engine's). Unknown
fields are refused; fields with a default may be left out. Times are seconds, shares lie between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from taper.core.types import ConfigError
from taper.goodput import Summary

SCHEMA = "taper.runs/1"
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class ResultsError(ConfigError):
    """A results file that cannot be read; the message names the file, the run and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What was run. None where the figure does not apply or is not known."""

    __pydantic_config__ = _STRICT

    policy: str
    load: float | None = None  # offered load over the throughput that fits the SLO by the law
    rate_rps: float | None = None  # requests offered per second
    share: float | None = None  # of requests that branch
    slo_tpot_s: float | None = None  # of a request with SLO factor 1
    slo_ttft_s: float | None = None  # None: time to first token was reported, not judged
    slo_at: float | None = None  # where the TPOT SLO lies between off's step (0) and eager's (1)
    concurrency: int | None = None  # requests in service at most, the same for every policy
    bound_tok_s: float | None = None  # goodput that no policy can pass by the latency law
    seed: int = 0  # of the request sequence
    round: int = 0
    scenario: str | None = None
    hardware: str | None = None
    replicas: int = 1  # engines behind one router
    router: str | None = None
    window: str = ""  # the records with this window belong to the run
    attempt: int = 0  # 0 is the first; a rejected window is repeated
    accepted: bool = True  # False: the machine was busy with something else; kept, left out of medians


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's own account of a window. None where it does not report the number."""

    __pydantic_config__ = _STRICT

    planner_p50_s: float | None = None
    planner_p99_s: float | None = None
    predictor_mape: float | None = None
    fallbacks: int | None = None  # steps in which the planner failed and everything ran
    steps: int = 0
    step_mean_s: float | None = None
    step_p99_s: float | None = None
    rows_mean: float | None = None
    extra_mean: float | None = None
    deferred_mean: float | None = None
    requests_mean: float | None = None  # in service
    preemptions: int | None = None  # of branches, for want of KV
    recomputed_tokens: int | None = None  # by preempted branches
    unserved: int | None = None  # due before the load stopped, never sent
    drained_s: float | None = None  # from the end of the load to the last answer
    foreign_cpu: float | None = None  # share of the machine that other processes took
    client_cpu: float | None = None  # share of the machine that the load generator took


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy under one set of conditions, once."""

    conditions: Conditions
    summary: Summary
    engine: EngineStats

    @property
    def policy(self) -> str:
        return self.conditions.policy

    @property
    def round(self) -> int:
        return self.conditions.round

    def to_json(self) -> dict[str, Any]:
        """Flat."""
        return {**asdict(self.conditions), **asdict(self.summary), **asdict(self.engine)}


_PARTS = {"conditions": Conditions, "summary": Summary, "engine": EngineStats}
_OWNER = {spec.name: part for part, kind in _PARTS.items() for spec in fields(kind)}
_RUN = TypeAdapter(Run)


def document(runs: Iterable[Run], **about: Any) -> dict[str, Any]:
    """The whole JSON object; `about` are further top-level keys, such as the command."""
    return {"schema": SCHEMA, **about, "runs": [run.to_json() for run in runs]}


def parse_runs(body: object, *, where: str) -> list[Run]:
    """Raises ResultsError naming `where`, the run and the field."""
    if not isinstance(body, Mapping) or body.get("schema") != SCHEMA or not isinstance(body.get("runs"), Sequence):
        raise ResultsError(f"{where}: no {SCHEMA} document with a list of runs")
    return [_parse(raw, f"{where}: run {number}") for number, raw in enumerate(body["runs"])]


def read_runs(path: Path) -> list[Run]:
    """Raises ResultsError for a file that is not there or not a results file."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not JSON: {error}") from error
    return parse_runs(body, where=str(path))


def _parse(raw: object, where: str) -> Run:
    if not isinstance(raw, Mapping):
        raise ResultsError(f"{where}: not a JSON object")
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for name, value in raw.items():
        if name not in _OWNER:
            raise ResultsError(f"{where}: unknown field {name!r}")
        parts[_OWNER[name]][name] = value
    try:
        return _RUN.validate_python(parts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ResultsError(f"{where}: {first['loc'][-1]}: {first['msg']}") from None

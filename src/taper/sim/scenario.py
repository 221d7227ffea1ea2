"""Scenarios: small TOML files whose load and SLO are relative to the hardware, so one file serves them all.

With N concurrent requests of a workload, all rows busy, the two extremes of the step are (steady state)

    off    one row per request:            rows = N
    eager  every branch of every request:  rows = N * mean tokens / mean critical path
    step   = T(rows, rows * mean context, prompt tokens per step)
    rate   = N / (mean steps per request * step)

The scenario's SLO is off.step + slo_at * (eager.step - off.step), its load a multiple of the rate half-way
between off's and eager's.

Requests come from a mix (tables `mix` and `arrivals`), or from a trace file that the caller names, with the branches
that the table `trace` lays over a share of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from taper.core.types import ConfigError, Slo, StepLoad, check_range
from taper.files import parse_table, read_text
from taper.sim.cost import Disturbance
from taper.sim.hardware import Hardware
from taper.sim.loop import Engine
from taper.workload import (
    Arrivals,
    Demand,
    Regime,
    Replay,
    Source,
    Synthetic,
    contended,
    parse_branching,
    parse_mix,
    profile,
    read_trace,
)
from taper.workload.regime import Footprint

CONTENDED_LOAD = 2.0  # x the throughput that fits the SLO, by default
_RANGES: Mapping[str, tuple[float, float]] = {
    "load": (1e-6, 1e6),
    "rate_per_s": (1e-6, 1e6),
    "slo_at": (-100, 100),
    "tpot_slo_s": (1e-6, 1e6),
    "ttft_slo_s": (1e-6, 1e6),
    "concurrency": (1e-6, 1e6),
    "bias": (1e-3, 1e3),
    "duration_steps": (1, 1e9),
    "duration_s": (1e-3, 1e9),
    "warm_share": (0, 0.99),
    "fork_prefill_tokens": (1, 1e6),
    "max_requests": (1, 1e6),
}
_WHOLE = ("duration_steps", "fork_prefill_tokens", "max_requests")
_FLAGS = ("absolute_lengths", "join_prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """The saturated steady state of one extreme policy."""

    rows: float
    step_s: float
    rate_per_s: float  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything about a run but the hardware, the policy and the seed."""

    name: str
    summary: str
    source: Source
    load: float = 1.0  # x the rate half-way between off's and eager's
    rate_per_s: float | None = None  # absolute, instead of `load`
    slo_at: float = 0.5  # 0 = off's step, 1 = eager's
    tpot_slo_s: float | None = None  # absolute, instead of `slo_at`
    ttft_slo_s: float = 5.0
    concurrency: float = 1.0  # x the hardware's nominal requests, for every policy
    bias: float = 1.0  # predictor / truth
    duration_steps: int = 12_000  # of off's step
    duration_s: float | None = None  # absolute, instead of `duration_steps`
    warm_share: float = 0.25  # of the duration: the ramp before the measured window
    absolute_lengths: bool = False  # the workload is for this hardware already
    join_prefill: bool = False
    fork_prefill_tokens: int = 8
    max_requests: int | None = None  # absolute, instead of `concurrency`
    disturbance: Disturbance = field(default_factory=Disturbance)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, low=low, high=high, unit="")
            if name in _WHOLE and isinstance(value, float):
                raise ConfigError(f"{name} must be a whole number, not {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def branching_share(self) -> float | None:
        """Of requests; None where the source does not say."""
        if isinstance(self.source, Synthetic):
            return self.source.mix.branching_share
        return self.source.branching_share if isinstance(self.source, Replay) else None

    def source_on(self, machine: Hardware) -> Source:
        if self.absolute_lengths:
            return self.source
        return self.source.scaled(machine.output_scale, prompt=machine.prompt_scale)

    def engine_on(self, machine: Hardware) -> Engine:
        return Engine(
            max_requests=self.max_requests or round(self.concurrency * machine.nominal_requests),
            fork_prefill_tokens=self.fork_prefill_tokens,
            join_prefill=self.join_prefill,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A scenario on a machine: the numbers that the relative ones have become."""

    rate_per_s: float
    slo: Slo
    duration_s: float
    off: OperatingPoint
    eager: OperatingPoint


def operating_points(machine: Hardware, demand: Demand, requests: int) -> tuple[OperatingPoint, OperatingPoint]:
    """Off's and eager's steady state with `requests` concurrent requests."""

    def point(steps: float) -> OperatingPoint:
        rows = requests * demand.tokens / steps
        load = StepLoad(
            rows=round(rows),
            context_tokens=round(rows * demand.context_tokens),
            prefill_tokens=round(requests * demand.prompt_tokens / steps),
        )
        step_s = machine.seconds(load)
        return OperatingPoint(rows=rows, step_s=step_s, rate_per_s=requests / (steps * step_s))

    return point(demand.off_steps), point(demand.eager_steps)


def settle(scenario: Scenario, machine: Hardware) -> Setting:
    demand = scenario.source_on(machine).demand()
    off, eager = operating_points(machine, demand, machine.nominal_requests)
    tpot_slo_s = scenario.tpot_slo_s or off.step_s + scenario.slo_at * (eager.step_s - off.step_s)
    return Setting(
        rate_per_s=scenario.rate_per_s or scenario.load * (off.rate_per_s + eager.rate_per_s) / 2,
        slo=Slo(tpot_s=tpot_slo_s, ttft_s=scenario.ttft_slo_s),
        duration_s=scenario.duration_s or scenario.duration_steps * off.step_s,
        off=off,
        eager=eager,
    )


def of_regime(regime: Regime, *, load: float, **settings: Any) -> Scenario:
    """The scenario of an operating point of the bench or the demo: the same requests, rate, SLO and bound.

    `settings` are further fields, such as the duration. A sibling computes half a KV block again, as there.
    """
    return Scenario(
        name=regime.name,
        summary=regime.reason,
        source=regime.source,
        load=load,
        rate_per_s=regime.rate_rps,
        tpot_slo_s=regime.slo.tpot_s,
        ttft_slo_s=regime.slo.ttft_s,
        max_requests=regime.max_concurrency,
        absolute_lengths=True,
        fork_prefill_tokens=int(Footprint().branch_prefill_tokens),
        **settings,
    )


def contended_on(machine: Hardware, *, load: float = CONTENDED_LOAD, share: float | None = None) -> Scenario:
    """The regime that the demo and the bench choose for a machine with this law, at a multiple of what fits the SLO."""
    source = Synthetic()
    regime = contended(machine.predictor(), source=source if share is None else source.shared(share), load=load)
    return of_regime(regime, load=load)


def names() -> list[str]:
    folder = resources.files("taper.sim") / "scenarios"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str, *, trace: Path | None = None) -> Scenario:
    """The scenario shipped under that name, or in the file of that path, which ends in .toml.

    `trace` is the file that a trace scenario replays. Raises `ConfigError` naming what exists.
    """
    if name.endswith(".toml"):
        return parse(Path(name).stem, read_text(name, f"scenario {name}"), trace=trace)
    if name not in names():
        raise ConfigError(
            f"unknown scenario {name!r}; known: {', '.join(names())}, contended, or the path of a .toml file"
        )
    text = (resources.files("taper.sim") / "scenarios" / f"{name}.toml").read_text("utf-8")
    return parse(name, text, trace=trace)


def parse(name: str, text: str, *, trace: Path | None = None) -> Scenario:
    """A scenario from TOML text. Raises `ConfigError` for anything that is not one."""
    where = f"scenario {name}"
    table = parse_table(text, where)
    if "mix" not in table and "trace" not in table:
        raise ConfigError(f"{where}: needs a table mix or trace")
    replays = "trace" in table
    parts = {key: _table(table, key, where) for key in ("mix", "arrivals", "trace", "disturbance")}
    if replays and (parts["mix"] or parts["arrivals"]):
        raise ConfigError(f"{where}: trace does not go with mix and arrivals")
    source = (
        _replay(parts["trace"], trace, where)
        if replays
        else Synthetic(
            mix=parse_mix(parts["mix"], f"{where}: mix"),
            arrivals=_build(Arrivals, parts["arrivals"], f"{where}: arrivals"),
        )
    )
    disturbance = _build(Disturbance, parts["disturbance"], f"{where}: disturbance")
    scenario: Scenario = _build(Scenario, {"name": name, **table, "source": source, "disturbance": disturbance}, where)
    return scenario


def _replay(table: dict[str, Any], path: Path | None, where: str) -> Source:
    """`branching_share`, and either `profile` or the fields of a `Branching`."""
    if path is None:
        raise ConfigError(f"{where} replays a trace: name its file with --trace")
    share = table.pop("branching_share", 0.0)
    name = table.pop("profile", None)
    if name is not None and table:
        raise ConfigError(f"{where}: trace: profile and {sorted(table)[0]} do not go together")
    branching = profile(name) if name is not None else parse_branching(table, f"{where}: trace") if table else None
    return Replay(rows=tuple(read_trace(path)), branching=branching, branching_share=share)


def _table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.pop(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} must be a table, not {value!r}")
    return dict(value)


def _build(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    known = {spec.name for spec in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error

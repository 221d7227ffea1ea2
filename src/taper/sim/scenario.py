"""Scenarios: small TOML files whose load and SLO are relative to the hardware, so one file serves them all.

With N concurrent requests of a mix, all rows busy, the two extremes of the step are (steady state)

    off    one row per request:            rows = N
    eager  every branch of every request:  rows = N * mean tokens / mean critical path
    step   = T(rows, rows * mean context, prompt tokens per step)
    rate   = N / (mean steps per request * step)

The scenario's SLO is off.step + slo_at * (eager.step - off.step), its load a multiple of the rate half-way
between off's and eager's.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import numpy as np

from taper.core.types import ConfigError, StepLoad
from taper.sim.cost import Disturbance
from taper.sim.hardware import Hardware
from taper.sim.loop import Engine
from taper.sim.workload import Arrivals, Lengths, Mix, Request, generate

SAMPLED_REQUESTS = 2000


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
    mix: Mix
    arrivals: Arrivals = field(default_factory=Arrivals)
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
    absolute_lengths: bool = False  # the mix is for this hardware already
    join_prefill: bool = False
    fork_prefill_tokens: int = 8
    max_requests: int | None = None  # absolute, instead of `concurrency`
    disturbance: Disturbance = field(default_factory=Disturbance)

    def mix_on(self, machine: Hardware) -> Mix:
        if self.absolute_lengths:
            return self.mix
        return self.mix.scaled(prompt=machine.prompt_scale, output=machine.output_scale)

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
    tpot_slo_s: float
    duration_s: float
    off: OperatingPoint
    eager: OperatingPoint


def operating_points(machine: Hardware, mix: Mix, requests: int) -> tuple[OperatingPoint, OperatingPoint]:
    """Off's and eager's steady state with `requests` concurrent requests of the mix."""
    sample = generate(
        mix=mix,
        arrivals=Arrivals(),
        rate_per_s=1.0,
        duration_s=SAMPLED_REQUESTS,
        seed=0,
    )
    tokens = float(np.mean([r.tokens for r in sample]))
    path = float(np.mean([r.critical_path_tokens for r in sample]))
    prompt = float(np.mean([r.prompt_tokens for r in sample]))
    context = sum(map(_context_sum, sample)) / sum(r.tokens for r in sample)

    def point(steps: float) -> OperatingPoint:
        rows = requests * tokens / steps
        load = StepLoad(
            rows=round(rows), context_tokens=round(rows * context), prefill_tokens=round(requests * prompt / steps)
        )
        step_s = machine.seconds(load)
        return OperatingPoint(rows=rows, step_s=step_s, rate_per_s=requests / (steps * step_s))

    return point(tokens), point(path)


def _context_sum(request: Request) -> float:
    """Sum over the request's tokens of the context each was computed with."""
    prefix, total = float(request.prompt_tokens), 0.0
    for stage in request.stages:
        total += sum(prefix * n + n * n / 2 for n in stage)
        prefix += sum(stage)
    return total


def settle(scenario: Scenario, machine: Hardware) -> Setting:
    off, eager = operating_points(machine, scenario.mix_on(machine), machine.nominal_requests)
    slo_s = scenario.tpot_slo_s or off.step_s + scenario.slo_at * (eager.step_s - off.step_s)
    rate = scenario.rate_per_s or scenario.load * (off.rate_per_s + eager.rate_per_s) / 2
    return Setting(
        rate_per_s=rate,
        tpot_slo_s=slo_s,
        duration_s=scenario.duration_s or scenario.duration_steps * off.step_s,
        off=off,
        eager=eager,
    )


def names() -> list[str]:
    folder = resources.files("taper.sim") / "scenarios"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str) -> Scenario:
    """The scenario shipped under that name. Raises `ConfigError` naming what exists."""
    if name not in names():
        raise ConfigError(f"unknown scenario {name!r}; known: {', '.join(names())}")
    text = (resources.files("taper.sim") / "scenarios" / f"{name}.toml").read_text("utf-8")
    return parse(name, text)


def parse(name: str, text: str) -> Scenario:
    """A scenario from TOML text. Raises `ConfigError` for anything that is not one."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario {name}: not TOML: {error}") from error
    mix = dict(table.pop("mix", {}))
    for key in ("prompt", "serial", "stage", "fanout", "branch"):
        if key in mix:
            mix[key] = _build(Lengths, mix[key], f"scenario {name}: mix.{key}")
    if "slo_classes" in mix:
        mix["slo_classes"] = tuple((float(share), float(factor)) for share, factor in mix["slo_classes"])
    parts = {
        "mix": _build(Mix, mix, f"scenario {name}: mix"),
        "arrivals": _build(Arrivals, table.pop("arrivals", {}), f"scenario {name}: arrivals"),
        "disturbance": _build(Disturbance, table.pop("disturbance", {}), f"scenario {name}: disturbance"),
    }
    scenario: Scenario = _build(Scenario, {"name": name, **table, **parts}, f"scenario {name}")
    return scenario


def _build(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table, not {values!r}")
    known = {spec.name for spec in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error

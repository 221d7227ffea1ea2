"""Machines to simulate: the coefficients of the true step cost, and what one engine replica holds.

The shipped ones are the TOML files in `machines`, their origin is in docs/simulator.md; a file of the same form, or any
profile that `taper calibrate` wrote, is one more.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, StepLoad
from taper.files import parse_table, read_text
from taper.profile import load_profile

# vLLM's default decode graphs: 1, 2, 4, then multiples of 8 up to 256, of 16 up to 512.
CUDA_GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
DEFAULT_GRAPHS = "vllm"  # how a file names them
UNBOUNDED = 1 << 40
SLOW_PREFILL_S = 200e-6  # per prompt token
USUAL_CONTEXT_TOKENS = 1000
NOMINAL_FILL = 0.76  # nominal requests over a / (b + c * context): of a100x8-qwen3-32b
MEAN_DEVIATION_TO_SIGMA = 1.2533  # of a normal distribution

_Cost = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1, le=10**12)]  # above any machine, below what is no float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Coefficients of the law, what happens beside it, and what one engine replica holds."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    base_s: Annotated[float, Field(gt=0)]
    row_s: _Cost
    context_s: _Cost
    prefill_s: _Cost
    knee_rows: _Cost = 0.0
    steep_s: _Cost = 0.0
    capture_sizes: tuple[_Count, ...] = ()
    # Of a decision where there is one to take; zero where the engine schedules a step while the last one runs.
    planner_s: _Cost = 0.0
    turnaround_s: _Cost = 0.0  # from the last token of a request until one that waited for its place is in the engine
    max_batched_tokens: _Count = 2048  # tokens of any kind in one step
    max_rows: _Count = 1024  # resident branches, running or deferred
    kv_tokens: _Count = 2_000_000
    noise: _Cost = 0.03  # sigma of the lognormal factor on every step
    slow_share: _Share = 0.0  # of the noise's variance that comes and goes over `slow_steps` steps
    slow_steps: Annotated[float, Field(gt=0)] = 1.0
    # What scenario files are relative to: a usual number of concurrent requests, and usual lengths.
    nominal_requests: _Count = 64
    prompt_scale: Annotated[float, Field(gt=0)] = 1.0
    output_scale: Annotated[float, Field(gt=0)] = 1.0

    def seconds(self, load: StepLoad) -> float:
        """The noiseless step time."""
        sizes = self.capture_sizes
        rows = load.rows
        if sizes and rows <= sizes[-1]:
            rows = sizes[bisect_left(sizes, rows)]
        return (
            self.base_s
            + self.row_s * rows
            + self.steep_s * max(rows - self.knee_rows, 0)
            + self.context_s * load.context_tokens
            + self.prefill_s * load.prefill_tokens
        )

    def predictor(self, bias: float = 1.0) -> LinearLatency:
        """What a calibration would have found, off by the factor `bias`; without the staircase."""
        return LinearLatency(
            base_s=self.base_s * bias,
            row_s=self.row_s * bias,
            context_s=self.context_s * bias,
            prefill_s=self.prefill_s * bias,
            knee_rows=self.knee_rows,
            steep_s=self.steep_s * bias,
        )

    def scaled(self, factor: float) -> Hardware:
        """The same machine, `factor` times slower."""
        return replace(
            self,
            base_s=self.base_s * factor,
            row_s=self.row_s * factor,
            context_s=self.context_s * factor,
            prefill_s=self.prefill_s * factor,
            steep_s=self.steep_s * factor,
            planner_s=self.planner_s * factor,
            turnaround_s=self.turnaround_s * factor,
        )


_MACHINE = TypeAdapter(Hardware)


def machines() -> list[str]:
    """Names of the shipped ones."""
    folder = resources.files("taper.sim") / "machines"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def hardware(name: str) -> Hardware:
    """The machine called `name` (a prefix is enough where it is unique), that of a .toml file, or that of a calibrated
    profile's file.

    Raises `ConfigError` naming what exists.
    """
    if name.endswith(".toml"):
        return parse(Path(name).stem, read_text(name, f"hardware {name}"))
    if name.endswith(".json") or "/" in name:
        return calibrated(name)
    matches = [known for known in machines() if known == name] or [
        known for known in machines() if known.startswith(name)
    ]
    if len(matches) != 1:
        raise ConfigError(
            f"hardware must be one of {', '.join(machines())}, the path of a .toml file or of a profile, not {name!r}"
        )
    return parse(matches[0], (resources.files("taper.sim") / "machines" / f"{matches[0]}.toml").read_text("utf-8"))


def parse(name: str, text: str) -> Hardware:
    """A machine from TOML text: the fields of `Hardware`. Raises `ConfigError` naming the field."""
    table: Mapping[str, Any] = parse_table(text, f"hardware {name}")
    if table.get("capture_sizes") == DEFAULT_GRAPHS:
        table = {**table, "capture_sizes": CUDA_GRAPH_SIZES}
    try:
        return _MACHINE.validate_json(json.dumps({"name": name, **table}, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(f"hardware {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def calibrated(path: str | Path) -> Hardware:
    """A machine with the law and the noise of a `taper calibrate` profile.

    A profile says nothing about KV and row slots: they do not bind; nor about what happens beside the steps: that, and
    how noise lasts, are taken from the shipped machine that is most like it. The nominal concurrency is the same share
    of a / (b + c * context) as on `a100x8-qwen3-32b`. A machine whose prefill is slow is like `cpu-smollm2`, its
    short requests included: with longer ones a run of thousands of steps would hold only a few.
    """
    profile = load_profile(path)
    law = profile.latency()
    like = hardware("cpu-smollm2" if law.prefill_s > SLOW_PREFILL_S else "a100x8-qwen3-32b")
    rows = law.rows_within(NOMINAL_FILL * law.base_s, USUAL_CONTEXT_TOKENS * like.output_scale)
    floor = profile.fit.get("noise_floor")
    return replace(
        like,
        name=f"{Path(profile.key.model).name} on {profile.key.device}",
        base_s=law.base_s,
        row_s=law.row_s,
        context_s=law.context_s,
        prefill_s=law.prefill_s,
        knee_rows=law.knee_rows,
        steep_s=law.steep_s,
        capture_sizes=law.capture_sizes,
        max_rows=UNBOUNDED,
        kv_tokens=UNBOUNDED,
        noise=MEAN_DEVIATION_TO_SIGMA * floor if isinstance(floor, float) else like.noise,
        nominal_requests=min(256, max(4, round(rows))),
    )

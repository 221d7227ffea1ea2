"""Machines to simulate: the coefficients of the true step cost, and what one engine replica holds.

The shipped ones are derived in docs/simulator.md; any profile that `taper calibrate` wrote is one more.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, StepLoad
from taper.profile import load_profile

# vLLM's default decode graphs: 1, 2, 4, then multiples of 8 up to 256, of 16 up to 512.
CUDA_GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
UNBOUNDED = 1 << 40
SLOW_PREFILL_S = 200e-6  # per prompt token
USUAL_CONTEXT_TOKENS = 1000
NOMINAL_FILL = 0.76  # nominal requests over a / (b + c * context): of a100x8-qwen3-32b, and about that of cpu-smollm2
MAD_TO_SIGMA = 1.2533  # from the mean absolute deviation of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Coefficients of the law above, and what one engine replica holds."""

    name: str
    base_s: float
    row_s: float
    context_s: float
    prefill_s: float
    knee_rows: float = 0.0
    steep_s: float = 0.0
    capture_sizes: tuple[int, ...] = ()
    max_batched_tokens: int = 2048  # tokens of any kind in one step
    max_rows: int = 1024  # resident branches, running or deferred
    kv_tokens: int = 2_000_000
    noise: float = 0.03  # sigma of the lognormal factor on every step
    # What scenario files are relative to: a usual number of concurrent requests, and usual lengths.
    nominal_requests: int = 64
    prompt_scale: float = 1.0
    output_scale: float = 1.0

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
        )


HARDWARE = {
    spec.name: spec
    for spec in (
        Hardware(
            name="cpu-smollm2",
            base_s=14e-3,
            row_s=0.5e-3,
            context_s=1.7e-6,
            prefill_s=0.36e-3,
            max_batched_tokens=256,
            max_rows=256,
            kv_tokens=100_000,
            noise=0.06,
            nominal_requests=16,
            prompt_scale=0.05,
            output_scale=0.2,
        ),
        Hardware(
            name="a100x8-qwen3-32b",
            base_s=11.2e-3,
            row_s=100e-6,
            context_s=33e-9,
            prefill_s=55e-6,
            capture_sizes=CUDA_GRAPH_SIZES,
        ),
        Hardware(
            name="h200x8-32b",
            base_s=6.99e-3,
            row_s=39.4e-6,
            context_s=14.3e-9,
            prefill_s=30e-6,
            capture_sizes=CUDA_GRAPH_SIZES,
            kv_tokens=3_500_000,
        ),
        Hardware(
            name="h200x1-qwen3-32b",
            base_s=19.3e-3,
            row_s=28e-6,
            context_s=59e-9,
            prefill_s=90e-6,
            knee_rows=128,
            steep_s=73.5e-6,
            capture_sizes=CUDA_GRAPH_SIZES,
            kv_tokens=280_000,
        ),
    )
}


def hardware(name: str) -> Hardware:
    """The machine called `name` (a prefix is enough where it is unique), or that of a calibrated profile's file.

    Raises `ConfigError` naming what exists.
    """
    if name.endswith(".json") or "/" in name:
        return calibrated(name)
    matches = [spec for known, spec in HARDWARE.items() if known == name] or [
        spec for known, spec in HARDWARE.items() if known.startswith(name)
    ]
    if len(matches) != 1:
        raise ConfigError(f"hardware must be one of {', '.join(sorted(HARDWARE))}, or a profile's path, not {name!r}")
    return matches[0]


def calibrated(path: str | Path) -> Hardware:
    """A machine with the law and the noise of a `taper calibrate` profile.

    A profile says nothing about KV and row slots: they do not bind. The nominal concurrency is the same share of
    a / (b + c * context) as on the shipped machines. A machine whose prefill is slow gets the short requests of
    `cpu-smollm2`: with longer ones a run of thousands of steps would hold only a few.
    """
    profile = load_profile(path)
    law = profile.latency()
    like = HARDWARE["cpu-smollm2" if law.prefill_s > SLOW_PREFILL_S else "a100x8-qwen3-32b"]
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
        noise=MAD_TO_SIGMA * floor if isinstance(floor, float) else like.noise,
        nominal_requests=min(256, max(4, round(rows))),
    )

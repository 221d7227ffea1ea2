"""What a step really costs, known to the simulator alone.

    T = drift(t) * spike * noise * (a + b * pad(rows) + c * context_tokens + d * prefill_tokens)

The controller never sees these coefficients: it is given a predictor (possibly biased) and measurements.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, StepLoad

# vLLM's default decode graphs: 1, 2, 4, then multiples of 8 up to 512.
CUDA_GRAPH_SIZES = (1, 2, 4, *range(8, 513, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Coefficients of the law above, and what one engine replica holds."""

    name: str
    base_s: float
    row_s: float
    context_s: float
    prefill_s: float
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
        )

    def scaled(self, factor: float) -> Hardware:
        """The same machine, `factor` times slower."""
        return replace(
            self,
            base_s=self.base_s * factor,
            row_s=self.row_s * factor,
            context_s=self.context_s * factor,
            prefill_s=self.prefill_s * factor,
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
        # One card reads all the weights itself (65.6 GB at about 4.3 TB/s effective); rows and context
        # cost about six times the eight-card figure, since sharding also pays for communication.
        Hardware(
            name="h200x1-qwen3-32b",
            base_s=15.4e-3,
            row_s=70e-6,
            context_s=62e-9,
            prefill_s=110e-6,
            capture_sizes=CUDA_GRAPH_SIZES,
            kv_tokens=210_000,
        ),
    )
}


def hardware(name: str) -> Hardware:
    """The profile called `name`; a prefix is enough where it is unique."""
    matches = [spec for known, spec in HARDWARE.items() if known == name] or [
        spec for known, spec in HARDWARE.items() if known.startswith(name)
    ]
    if len(matches) != 1:
        raise ConfigError(f"hardware must be one of {', '.join(sorted(HARDWARE))}, not {name!r}")
    return matches[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What goes wrong on the machine while the scenario runs."""

    spike_share: float = 0.0  # of steps
    spike_factor: float = 1.0
    drift_to: float = 1.0  # the machine's slowness at the end of the run, linear from 1 at its start


class StepCost:
    """Draws one step time after another; the draws are the same for every policy of a seed."""

    def __init__(self, machine: Hardware, disturbance: Disturbance, *, duration_s: float, seed: int) -> None:
        self._machine = machine
        self._disturbance = disturbance
        self._duration_s = duration_s
        self._rng = np.random.default_rng((seed, 7))
        self._factors: list[float] = []

    def seconds(self, load: StepLoad, now_s: float) -> float:
        if not self._factors:
            self._factors = self._draw(4096)
        drift = 1 + (self._disturbance.drift_to - 1) * min(1.0, now_s / self._duration_s)
        return self._machine.seconds(load) * self._factors.pop() * drift

    def _draw(self, count: int) -> list[float]:
        noise = np.exp(self._rng.normal(0.0, self._machine.noise, count))
        spiked = self._rng.random(count) < self._disturbance.spike_share
        drawn: list[float] = np.where(spiked, noise * self._disturbance.spike_factor, noise).tolist()
        return drawn

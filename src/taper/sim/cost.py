"""What a step really costs, known to the simulator alone.

    T = drift(t) * spike * noise * (a + b * pad(rows) + c * context_tokens + d * prefill_tokens)

The controller never sees these coefficients: it is given a predictor (possibly biased) and measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from taper.core.types import StepLoad
from taper.sim.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What goes wrong on the machine while the scenario runs."""

    spike_share: float = 0.0  # of steps
    spike_factor: float = 1.0
    drift_to: float = 1.0  # the machine's slowness at the end of the run, linear from 1 at its start


class StepCost:
    """Draws one step time after another; the draws are the same for every policy of a seed."""

    def __init__(
        self, machine: Hardware, disturbance: Disturbance, *, duration_s: float, seed: int, replica: int = 0
    ) -> None:
        self._machine = machine
        self._disturbance = disturbance
        self._duration_s = duration_s
        self._rng = np.random.default_rng((seed, 7, replica))
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

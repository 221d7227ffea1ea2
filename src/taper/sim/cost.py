"""What a step really costs, known to the simulator alone.

    T = drift(t) * spike * noise * (a + b * rows + e * max(rows - k, 0) + c * context_tokens + d * prefill_tokens)

with rows as the device pads them.

The noise is lognormal. Part of its variance can last: a machine that is slow now is slow for a while, and then a
request's mean step is, too.

The controller never sees these coefficients: it is given a predictor (possibly biased) and measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from taper.core.types import Floats, StepLoad, check_range
from taper.sim.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What goes wrong on the machine while the scenario runs."""

    spike_share: float = 0.0  # of steps
    spike_factor: float = 1.0
    drift_to: float = 1.0  # the machine's slowness at the end of the run, linear from 1 at its start

    def __post_init__(self) -> None:
        check_range("spike_share", self.spike_share, low=0, high=1, unit="of steps")
        check_range("spike_factor", self.spike_factor, low=1e-3, high=1e6, unit="x")
        check_range("drift_to", self.drift_to, low=1e-3, high=1e6, unit="x")


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
        self._slow = 0.0  # the lasting part of the noise, in sigmas of it

    def seconds(self, load: StepLoad, now_s: float) -> float:
        if not self._factors:
            self._factors = self._draw(4096)
        drift = 1 + (self._disturbance.drift_to - 1) * min(1.0, now_s / self._duration_s)
        return self._machine.seconds(load) * self._factors.pop() * drift

    def _draw(self, count: int) -> list[float]:
        share = self._machine.slow_share
        log = self._rng.normal(0.0, self._machine.noise * math.sqrt(1 - share), count)
        if share:
            log += self._machine.noise * math.sqrt(share) * self._lasting(count)[::-1]  # drawn factors go from the end
        noise = np.exp(log)
        spiked = self._rng.random(count) < self._disturbance.spike_share
        drawn: list[float] = np.where(spiked, noise * self._disturbance.spike_factor, noise).tolist()
        return drawn

    def _lasting(self, count: int) -> Floats:
        """The next values of a unit autoregressive process with a memory of `slow_steps`."""
        kept = math.exp(-1 / self._machine.slow_steps)
        values = math.sqrt(1 - kept**2) * self._rng.normal(0.0, 1.0, count)
        for at, fresh in enumerate(values.tolist()):
            self._slow = kept * self._slow + fresh
            values[at] = self._slow
        return values

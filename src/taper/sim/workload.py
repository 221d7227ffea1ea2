"""Requests for the simulator: arrivals, lengths and branch shapes, all from one seeded generator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from taper.core.types import ConfigError

Stage = tuple[int, ...]  # output tokens of each branch; one entry = a serial stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One logical request as the client sends it, with the lengths its answers will turn out to have."""

    seed: int = 0
    index: int = 0
    arrival_s: float
    prompt_tokens: int
    stages: tuple[Stage, ...]
    slo_factor: float = 1.0  # on the run's TPOT SLO

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.stages))

    @property
    def serial_tokens(self) -> int:
        return sum(stage[0] for stage in self.stages if len(stage) == 1)

    @property
    def critical_path_tokens(self) -> int:
        return sum(map(max, self.stages))

    @property
    def branching(self) -> bool:
        return any(len(stage) > 1 for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts: uniform on [low, high], or lognormal with that range as its 5th and 95th percentile."""

    low: int
    high: int
    shape: Literal["uniform", "lognormal"] = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"lengths must satisfy 1 <= low <= high, not {self.low}..{self.high}")

    def scaled(self, factor: float) -> Lengths:
        low = max(1, round(self.low * factor))
        return replace(self, low=low, high=max(low, round(self.high * factor)))

    def draw(self, rng: np.random.Generator) -> int:
        if self.shape == "uniform":
            return int(rng.integers(self.low, self.high + 1))
        mean = (np.log(self.low) + np.log(self.high)) / 2
        sigma = (np.log(self.high) - np.log(self.low)) / (2 * 1.645)
        return max(1, int(np.exp(rng.normal(mean, sigma))))

    @property
    def mean(self) -> float:
        if self.shape == "uniform":
            return (self.low + self.high) / 2
        mean = (np.log(self.low) + np.log(self.high)) / 2
        sigma = (np.log(self.high) - np.log(self.low)) / (2 * 1.645)
        return float(np.exp(mean + sigma**2 / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What kinds of request arrive: a share of branching ones among serial ones.

    A branching request is (serial, parallel) `forks` times and a closing serial stage; with
    `fork_at_arrival` it is one parallel stage and nothing else (n > 1).
    """

    branching_share: float
    prompt: Lengths
    serial: Lengths  # output of a serial request
    stage: Lengths = Lengths(low=60, high=100)  # serial stages of a branching request
    fanout: Lengths = Lengths(low=8, high=16)
    branch: Lengths = Lengths(low=200, high=400)
    forks: int = 2
    fork_at_arrival: bool = False
    # (share of requests, factor on the TPOT SLO); what is left over has factor 1.
    slo_classes: tuple[tuple[float, float], ...] = ()

    def scaled(self, *, prompt: float, output: float) -> Mix:
        """The same shape with other lengths; fan-out and number of stages stay."""
        return replace(
            self,
            prompt=self.prompt.scaled(prompt),
            serial=self.serial.scaled(output),
            stage=self.stage.scaled(output),
            branch=self.branch.scaled(output),
        )

    def stages(self, rng: np.random.Generator) -> tuple[Stage, ...]:
        if rng.random() >= self.branching_share:
            return ((self.serial.draw(rng),),)
        if self.fork_at_arrival:
            return (self._fork(rng),)
        stages: list[Stage] = []
        for _ in range(self.forks):
            stages += [(self.stage.draw(rng),), self._fork(rng)]
        return (*stages, (self.stage.draw(rng),))

    def _fork(self, rng: np.random.Generator) -> Stage:
        return tuple(self.branch.draw(rng) for _ in range(self.fanout.draw(rng)))

    def slo_factor(self, rng: np.random.Generator) -> float:
        at = rng.random()
        for share, factor in self.slo_classes:
            if at < share:
                return factor
            at -= share
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Gamma renewal arrivals (cv 1 is Poisson), or on/off bursts with the same mean rate."""

    cv: float = 1.0
    burst_period_s: float = 0.0  # 0: steady
    burst_share: float = 1.0  # of each period, the part in which all of its requests arrive

    def times(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> list[float]:
        count = int(rate_per_s * duration_s * 1.5 + 30 * self.cv + 30)
        shape = 1 / self.cv**2
        at = np.cumsum(rng.gamma(shape, 1 / (shape * rate_per_s), count))
        if self.burst_period_s:
            period, share = self.burst_period_s, self.burst_share
            at = (at // period) * period + (at % period) * share
        return [float(t) for t in at[at < duration_s]]


def generate(
    *,
    mix: Mix,
    arrivals: Arrivals,
    rate_per_s: float,
    duration_s: float,
    seed: int,
) -> list[Request]:
    """The requests of one run, by arrival. Same arguments, same requests."""
    times = arrivals.times(rate_per_s, duration_s, np.random.default_rng((seed, 1)))
    requests = []
    for index, at in enumerate(times):
        rng = np.random.default_rng((seed, 2, index))  # request i stays the same at any load
        requests.append(
            Request(
                seed=seed,
                index=index,
                arrival_s=at,
                prompt_tokens=mix.prompt.draw(rng),
                stages=mix.stages(rng),
                slo_factor=mix.slo_factor(rng),
            )
        )
    return requests

"""Where requests come from: drawn from a mix, or replayed from a trace with a branch profile laid over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np

from taper.core.types import ConfigError
from taper.workload.arrivals import Arrivals
from taper.workload.branching import Branching
from taper.workload.demand import Demand
from taper.workload.mix import Mix, check_share
from taper.workload.request import Request
from taper.workload.traces import TraceRow

_STREAM = 2  # the overlay's draws
_SAMPLED = 400  # requests of each kind from which a source's means are taken
_SAMPLE_SEED = 0


class Source(Protocol):
    """Anything that gives a run its requests."""

    def requests(self, *, seed: int, rate_rps: float, horizon_s: float) -> Iterator[Request]:
        """By arrival, all before `horizon_s`. The same arguments give the same requests."""
        ...

    def demand(self) -> Demand:
        """What its requests cost on average."""
        ...

    def scaled(self, factor: float, *, prompt: float = 1.0) -> Self:
        """Outputs `factor` and prompts `prompt` times as long."""
        ...

    def within(self, context_tokens: int | None) -> Self:
        """The same with every request shrunk to fit a context; None: no bound."""
        ...

    def describe(self) -> str:
        """For a reader of the output."""
        ...

    def shared(self, share: float) -> Self:
        """The same with `share` of the requests branching."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """Requests of a mix at drawn times."""

    mix: Mix = field(default_factory=Mix)
    arrivals: Arrivals = field(default_factory=Arrivals)
    context_tokens: int | None = None  # requests are shrunk to fit; None: no bound

    def requests(self, *, seed: int, rate_rps: float, horizon_s: float) -> Iterator[Request]:
        times = self.arrivals.times(seed=seed, rate_rps=rate_rps, horizon_s=horizon_s)
        return (self._request(seed, index, at_s) for index, at_s in enumerate(times))

    def demand(self) -> Demand:
        """Each kind is sampled by itself and weighed with its share: no luck in how many branch."""
        share = self.mix.branching_share
        weighed: list[tuple[Request, float]] = []
        for part, weight in ((1.0, share), (0.0, 1 - share)):
            if weight:
                kind = self.shared(part)
                weighed += [(kind._request(_SAMPLE_SEED, index, 0.0), weight / _SAMPLED) for index in range(_SAMPLED)]
        return Demand.of(weighed)

    def describe(self) -> str:
        mix = self.mix
        return (
            f"arrivals with CV {self.arrivals.cv:g}, {mix.branching_share:.0%} branch ({mix.branching}), the others"
            f" answer in {mix.serial} tokens"
        )

    def scaled(self, factor: float, *, prompt: float = 1.0) -> Synthetic:
        return replace(self, mix=self.mix.scaled(factor, prompt=prompt))

    def within(self, context_tokens: int | None) -> Synthetic:
        return replace(self, context_tokens=context_tokens)

    def shared(self, share: float) -> Synthetic:
        return replace(self, mix=replace(self.mix, branching_share=share))

    def _request(self, seed: int, index: int, at_s: float) -> Request:
        request = self.mix.request(seed=seed, index=index, arrival_s=at_s)
        return request if self.context_tokens is None else request.fitted(self.context_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The rows of a trace, from its beginning and over again when it ends; `branching` is laid over a share of them.

    Time is stretched so that the trace's mean rate becomes the rate asked for; its bursts keep their form.
    """

    rows: Sequence[TraceRow]
    branching: Branching | None = None
    branching_share: float = 0.0
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        check_share(self.branching_share)
        if len(self.rows) < 2 or self.rows[-1].at_s <= 0:
            raise ConfigError("a trace needs at least two requests at different times")
        if self.branching is None and self.branching_share:
            raise ConfigError("branching_share above 0 needs a branch profile other than none")

    @property
    def lap_s(self) -> float:
        """Length of the trace and the mean gap after its last row."""
        return self.rows[-1].at_s * len(self.rows) / (len(self.rows) - 1)

    @property
    def rate_rps(self) -> float:
        """The trace's own mean rate."""
        return len(self.rows) / self.lap_s

    def requests(self, *, seed: int, rate_rps: float, horizon_s: float) -> Iterator[Request]:
        if not 0 < rate_rps < 1e6:
            raise ConfigError(f"rate_rps must be above 0 and below 1e6 requests/s, not {rate_rps!r}")
        stretch, index = self.rate_rps / rate_rps, 0
        while True:
            lap, position = divmod(index, len(self.rows))
            at_s = (lap * self.lap_s + self.rows[position].at_s) * stretch
            if at_s >= horizon_s:
                return
            yield self._request(seed, index, at_s)
            index += 1

    def demand(self) -> Demand:
        count = min(2 * _SAMPLED, len(self.rows))
        chosen = np.linspace(0, len(self.rows) - 1, count).astype(int)
        return Demand.of([(self._request(_SAMPLE_SEED, int(index), 0.0), 1 / count) for index in chosen])

    def describe(self) -> str:
        shape = f" ({self.branching.scaled(self.output_scale)})" if self.branching else ""
        return f"trace of {len(self.rows)} requests, {self.branching_share:.0%} branch{shape}"

    def scaled(self, factor: float, *, prompt: float = 1.0) -> Replay:
        return replace(self, output_scale=self.output_scale * factor, prompt_scale=self.prompt_scale * prompt)

    def within(self, context_tokens: int | None) -> Replay:
        return replace(self, context_tokens=context_tokens)

    def shared(self, share: float) -> Replay:
        return replace(self, branching_share=share)

    def _request(self, seed: int, index: int, at_s: float) -> Request:
        row = self.rows[index % len(self.rows)]
        own_tokens = max(1, round(row.output_tokens * self.output_scale))
        rng = np.random.default_rng((seed, index, _STREAM))
        stages: tuple[tuple[int, ...], ...] = ((own_tokens,),)
        if self.branching is not None and rng.random() < self.branching_share:
            stages = self.branching.scaled(self.output_scale).stages(rng, own_tokens)
        request = Request(
            seed=seed,
            index=index,
            arrival_s=at_s,
            prompt_tokens=max(1, round(row.prompt_tokens * self.prompt_scale)),
            stages=stages,
        )
        return request if self.context_tokens is None else request.fitted(self.context_tokens)

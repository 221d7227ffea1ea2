"""Request shapes: serial chats beside requests that branch n ways from one prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from taper.core.types import ConfigError
from taper.records import Kind
from taper.workload.prompts import branching_prompt, serial_prompt

_STREAM = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Who asks for what. Ranges are inclusive and drawn from uniformly."""

    branching_share: float = 0.4
    fan_out: tuple[int, int] = (4, 16)
    serial_tokens: tuple[int, int] = (100, 150)
    branch_tokens: tuple[int, int] = (48, 72)  # per branch; siblings get the same

    def __post_init__(self) -> None:
        if not 0 <= self.branching_share <= 1:
            raise ConfigError(f"branching_share must be between 0 and 1, not {self.branching_share!r}")
        for name, least in (("fan_out", 2), ("serial_tokens", 1), ("branch_tokens", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ConfigError(f"{name} must be a range {least} <= low <= high, not {low}..{high}")

    def scaled(self, factor: float) -> Mix:
        """The same shape with other lengths, at least 2 tokens each; fan-out and shares stay."""

        def scale(ends: tuple[int, int]) -> tuple[int, int]:
            return max(2, round(ends[0] * factor)), max(2, round(ends[1] * factor))

        return replace(self, serial_tokens=scale(self.serial_tokens), branch_tokens=scale(self.branch_tokens))

    @property
    def mean_fan_out(self) -> float:
        return sum(self.fan_out) / 2

    @property
    def mean_serial_tokens(self) -> float:
        return sum(self.serial_tokens) / 2

    @property
    def mean_branch_tokens(self) -> float:
        return sum(self.branch_tokens) / 2

    @property
    def mean_tokens(self) -> float:
        """Output tokens of a request, all branches counted."""
        branching = self.mean_fan_out * self.mean_branch_tokens
        return self.branching_share * branching + (1 - self.branching_share) * self.mean_serial_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One request of the mix; the same for every policy that is given the same (seed, index)."""

    seed: int
    index: int
    kind: Kind
    branches: int
    max_tokens: int  # per branch, reached exactly: the end-of-text token is ignored
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request and when it is due, in seconds from the start of the window."""

    offset_s: float
    spec: RequestSpec


def request(mix: Mix, *, seed: int, index: int) -> RequestSpec:
    """Request number `index` of a run; depends on nothing but the arguments."""
    rng = np.random.default_rng((seed, index, _STREAM))
    branching = bool(rng.random() < mix.branching_share)
    lengths = mix.branch_tokens if branching else mix.serial_tokens
    branches = int(rng.integers(mix.fan_out[0], mix.fan_out[1] + 1)) if branching else 1
    return RequestSpec(
        seed=seed,
        index=index,
        kind="branching" if branching else "serial",
        branches=branches,
        max_tokens=int(rng.integers(lengths[0], lengths[1] + 1)),
        prompt=branching_prompt(rng) if branching else serial_prompt(rng),
    )


def schedule(mix: Mix, arrivals_s: Iterable[float], *, seed: int) -> tuple[Planned, ...]:
    """Request i at the i-th arrival."""
    return tuple(
        Planned(offset_s=at_s, spec=request(mix, seed=seed, index=index)) for index, at_s in enumerate(arrivals_s)
    )

"""Request shapes: serial requests beside a share that branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taper.core.types import ConfigError, check_range
from taper.workload.branching import Branching, parse_branching, profile
from taper.workload.lengths import Draw, Lengths, parse_draw
from taper.workload.request import Request, Stage

_STREAM = 0  # keeps a request's shape independent of its gap, which comes from the same (seed, index)
_SHARE = ("branching_share", "branching_slo", "prompt", "serial", "slo_classes", "profile")


def n_siblings() -> Branching:
    """The branching requests of the demo: 4 to 16 equally long answers to one prompt."""
    return Branching(at_arrival=True, equal=True, fanout=Lengths(low=4, high=16), branch=Lengths(low=48, high=72))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Who asks for what. The defaults are the demo's."""

    branching_share: float = 0.4
    prompt: Draw = Lengths(low=30, high=50)
    serial: Draw = Lengths(low=100, high=150)  # output of a serial request
    branching: Branching = field(default_factory=n_siblings)
    # (share of requests, factor on the TPOT SLO); what is left over has factor 1.
    slo_classes: tuple[tuple[float, float], ...] = ()
    branching_slo: tuple[tuple[float, float], ...] = ()  # the same of the requests that branch, where it differs

    def __post_init__(self) -> None:
        check_share(self.branching_share)
        for name in ("slo_classes", "branching_slo"):
            for share, factor in getattr(self, name):
                if not (0 <= share <= 1 and 0 < factor < 1e3):
                    raise ConfigError(f"{name} must be pairs of a share and a factor, not {share!r}, {factor!r}")

    def scaled(self, factor: float, *, prompt: float = 1.0) -> Mix:
        """The same shape with outputs `factor` and prompts `prompt` times as long; fan-outs and shares stay."""
        return replace(
            self,
            prompt=self.prompt.scaled(prompt),
            serial=self.serial.scaled(factor),
            branching=self.branching.scaled(factor),
        )

    def request(self, *, seed: int, index: int, arrival_s: float = 0.0) -> Request:
        """Request number `index` of a run. A larger branching share only turns further requests into branching ones."""
        rng = np.random.default_rng((seed, index, _STREAM))
        branches = rng.random() < self.branching_share
        classes = self.branching_slo if branches and self.branching_slo else self.slo_classes
        slo_factor = _drawn(classes, rng.random())
        prompt_tokens, own_tokens = self.prompt.draw(rng), self.serial.draw(rng)
        stages: tuple[Stage, ...] = self.branching.stages(rng, own_tokens) if branches else ((own_tokens,),)
        return Request(
            seed=seed,
            index=index,
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            stages=stages,
            slo_factor=slo_factor,
        )


def _drawn(classes: tuple[tuple[float, float], ...], at: float) -> float:
    """The factor of the class in which `at`, from 0 to 1, falls."""
    for share, factor in classes:
        if at < share:
            return factor
        at -= share
    return 1.0


def check_share(value: float) -> None:
    check_range("branching_share", value, low=0, high=1, unit="")


def parse_mix(table: Mapping[str, Any], where: str) -> Mix:
    """A mix from a flat table: `branching_share`, `prompt`, `serial`, `slo_classes`, `branching_slo`, and either
    `profile` (a name) or the fields of `Branching`. Raises ConfigError naming `where`."""
    values: dict[str, Any] = {key: table[key] for key in ("branching_share",) if key in table}
    values |= {key: parse_draw(table[key], f"{where}: {key}") for key in ("prompt", "serial") if key in table}
    for key in ("slo_classes", "branching_slo"):
        if key in table:
            values[key] = _classes(table[key], f"{where}: {key}")
    shape = {key: value for key, value in table.items() if key not in _SHARE}
    if "profile" in table:
        if shape:
            raise ConfigError(f"{where}: profile and {sorted(shape)[0]} do not go together")
        branching = profile(table["profile"])
        if branching is None:
            values["branching_share"] = 0.0
        else:
            values["branching"] = branching
    elif shape:
        values["branching"] = parse_branching(shape, where)
    return Mix(**values)


def _classes(value: object, where: str) -> tuple[tuple[float, float], ...]:
    try:
        return tuple((float(share), float(factor)) for share, factor in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} must be pairs of a share and a factor, not {value!r}") from error

"""How a branching request branches: drawn stage by stage, from a few named profiles or from one's own numbers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from taper.core.types import ConfigError
from taper.workload.lengths import Draw, Lengths, parse_draw
from taper.workload.request import Stage

NONE = "none"
_DRAWS = ("forks", "stage", "fanout", "branch", "parent")
_FLAGS = ("at_arrival", "closing", "equal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branching:
    """(serial stage, fork) `forks` times, then a closing serial stage unless `closing` is False.

    With `at_arrival` it is one fork and nothing else (n > 1).
    """

    name: str = "custom"
    forks: Draw = Lengths(low=2, high=2)
    stage: Draw = Lengths(low=60, high=100)  # tokens of a serial stage
    fanout: Draw = Lengths(low=8, high=16)
    branch: Draw | None = Lengths(low=200, high=400)  # tokens of a branch; None: the request's own output length
    parent: Draw | None = None  # a further branch of each fork: the parent that writes on beside its children
    at_arrival: bool = False
    closing: bool = True
    equal: bool = False  # the branches of a fork are equally long

    def __str__(self) -> str:
        tokens = "their own length" if self.branch is None else f"{self.branch} tokens"
        times = "at arrival" if self.at_arrival else f"{self.forks} x between serial stages of {self.stage} tokens"
        return f"{self.name}: {self.fanout} ways {times}, {tokens} each"

    def stages(self, rng: np.random.Generator, own_tokens: int) -> tuple[Stage, ...]:
        """`own_tokens` is what the request would have answered without branches."""
        if self.at_arrival:
            return (self._fork(rng, own_tokens),)
        stages: list[Stage] = []
        for _ in range(self.forks.draw(rng)):
            stages += [(self.stage.draw(rng),), self._fork(rng, own_tokens)]
        return (*stages, (self.stage.draw(rng),)) if self.closing else tuple(stages)

    def scaled(self, factor: float) -> Branching:
        """Other lengths; fan-out and number of forks stay."""
        return replace(
            self,
            stage=self.stage.scaled(factor),
            branch=self.branch and self.branch.scaled(factor),
            parent=self.parent and self.parent.scaled(factor),
        )

    def _fork(self, rng: np.random.Generator, own_tokens: int) -> Stage:
        width = self.fanout.draw(rng)

        def length() -> int:
            return own_tokens if self.branch is None else self.branch.draw(rng)

        children = (length(),) * width if self.equal else tuple(length() for _ in range(width))
        return (self.parent.draw(rng), *children) if self.parent else children


def profile_names() -> tuple[str, ...]:
    return (NONE, *_profile_tables())


def profile(name: str) -> Branching | None:
    """The branch profile called `name`; None for `none`. Raises ConfigError naming what exists."""
    if name == NONE:
        return None
    tables = _profile_tables()
    if name not in tables:
        raise ConfigError(f"branch profile must be one of {', '.join(profile_names())}, not {name!r}")
    return parse_branching({"name": name, **tables[name]}, f"branch profile {name}")


def parse_branching(table: Mapping[str, Any], where: str) -> Branching:
    """A table of `Branching`'s fields; distributions as in `parse_draw`. Raises ConfigError naming `where`."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "branch" and value == "own":
            values[key] = None
        elif key in _DRAWS:
            values[key] = parse_draw(value, f"{where}: {key}")
        elif (key in _FLAGS and isinstance(value, bool)) or (key == "name" and isinstance(value, str)):
            values[key] = value
        elif key in _FLAGS:
            raise ConfigError(f"{where}: {key} must be true or false, not {value!r}")
        else:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(('name', *_DRAWS, *_FLAGS))}")
    return Branching(**values)


def _profile_tables() -> dict[str, dict[str, Any]]:
    text = (resources.files("taper.workload") / "profiles.toml").read_text("utf-8")
    return tomllib.loads(text)

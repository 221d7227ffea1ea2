"""Where a fleet's router sends requests: by what it knows of the engines when a request arrives.

| router       | unit it places  | chooses                                                              |
| ---          | ---             | ---                                                                  |
| round-robin  | each branch     | the next engine                                                      |
| least-loaded | each branch     | the engine with the fewest branches, queue included                  |
| group-affine | whole requests  | the same                                                             |
| slack-aware  | whole requests  | the engine with the most slack: TPOT SLO - T(S0), queue included     |

The first two know nothing of groups, as a router in front of stock engines: the branches of a stage are so many
requests to it. In T(S0) extras do not count: they can be deferred, the protected rows cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from taper.core.types import ConfigError, Floats
from taper.sim.loop import Simulation


class Router(Protocol):
    """Places one unit at a time; `changed` is called whenever an engine's state has."""

    @property
    def is_affine(self) -> bool:
        """Whether it places whole requests."""
        ...

    def place(self) -> int:
        """Index of the engine."""
        ...

    def changed(self, index: int, engine: Simulation) -> None: ...


@dataclass(slots=True)
class RoundRobin:
    replicas: int
    is_affine: bool = False
    _next: int = -1

    def place(self) -> int:
        self._next = (self._next + 1) % self.replicas
        return self._next

    def changed(self, index: int, engine: Simulation) -> None:
        pass


class Least:
    """The engine with the least of a measure; the first of several."""

    def __init__(self, replicas: int, measure: Callable[[Simulation], float], *, is_affine: bool) -> None:
        self._is_affine = is_affine
        self._measure = measure
        self._values: Floats = np.zeros(replicas)

    @property
    def is_affine(self) -> bool:
        return self._is_affine

    def place(self) -> int:
        index = int(self._values.argmin())
        self._values[index] += 1  # until the engine has it: the next branch of the stage goes elsewhere
        return index

    def changed(self, index: int, engine: Simulation) -> None:
        self._values[index] = self._measure(engine)


def branches(engine: Simulation) -> float:
    """Live ones and queued requests."""
    return len(engine.batch.request) + engine.waiting


def baseline_s(engine: Simulation) -> float:
    """Predicted T(S0) with the queue in service; the TPOT SLO is the same on every engine, so this ranks slack."""
    batch = engine.batch
    requests = len(batch) + engine.waiting
    context = int(batch.context.mean() * requests) if len(batch) else 0
    return float(engine.latency.predict(requests, context, 0)) if requests else 0.0


ROUTERS: Mapping[str, Callable[[int], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": lambda replicas: Least(replicas, branches, is_affine=False),
    "group-affine": lambda replicas: Least(replicas, branches, is_affine=True),
    "slack-aware": lambda replicas: Least(replicas, baseline_s, is_affine=True),
}


def check_router(name: str) -> None:
    if name not in ROUTERS:
        raise ConfigError(f"router must be one of {', '.join(ROUTERS)}, not {name!r}")

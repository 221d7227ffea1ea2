"""How far a state machine is explored, and what it met on the way.

By default one bounded round, the same everywhere. With TAPER_FUZZ_STEPS=N rounds of new examples, from seed
TAPER_FUZZ_SEED (drawn where not given) upwards, until N steps were run. Hypothesis chooses, shrinks and prints.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

STEPS_VAR, SEED_VAR = "TAPER_FUZZ_STEPS", "TAPER_FUZZ_SEED"
MOST_SEEDS = 1_000_000


@dataclass(slots=True)
class Tally:
    """What one machine was put through; `counts["steps"]` decides when it is enough."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    seeds: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {what}" for what, number in self.counts.items())
        return f"{self.name}: {counts}" + (f"; seeds {self.seeds[0]} to {self.seeds[-1]}" if self.seeds else "")


def explore(machine: Callable[[Tally], RuleBasedStateMachine], tally: Tally, *, examples: int, rules: int) -> None:
    """`examples` sequences of `rules` rules each, again and again with TAPER_FUZZ_STEPS."""
    wanted = int(os.environ.get(STEPS_VAR, "0"))
    bounds = settings(
        max_examples=examples,
        stateful_step_count=rules,
        derandomize=not wanted,
        print_blob=bool(wanted),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def build() -> RuleBasedStateMachine:
        return machine(tally)

    if not wanted:
        run_state_machine_as_test(build, settings=bounds)
        return
    first = int(os.environ.get(SEED_VAR) or random.SystemRandom().randrange(MOST_SEEDS))
    for number in count(first):
        tally.seeds.append(number)
        print(f"{tally.name}: {SEED_VAR}={number}")  # shown by pytest where the round fails
        run_state_machine_as_test(seed(number)(build), settings=bounds)
        if tally.counts["steps"] >= wanted:
            return


def examples(usual: int) -> settings:
    """Of a stateless test: `usual` many, the same everywhere; with TAPER_FUZZ_STEPS twenty times as many, new ones."""
    is_long = bool(int(os.environ.get(STEPS_VAR, "0")))
    return settings(
        max_examples=usual * (20 if is_long else 1),
        derandomize=not is_long,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

"""How far a state machine is explored, and what it met on the way.

Rounds of examples from seed 0 upwards, until the usual number of steps were run. With TAPER_FUZZ_STEPS=N that many,
from seed TAPER_FUZZ_SEED (drawn where not given). Hypothesis chooses, shrinks and prints. It takes constants of the
loaded modules into its draws, so that one seed comes to the same only where the same tests are run.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

STEPS_VAR, SEED_VAR = "TAPER_FUZZ_STEPS", "TAPER_FUZZ_SEED"
MOST_SEEDS = 1_000_000


@dataclass(slots=True)
class Tally:
    """What one machine was put through; `counts` decides when it is enough."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    seeds: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {what}" for what, number in self.counts.items())
        return f"{self.name}: {counts}" + (f"; seeds {self.seeds[0]} to {self.seeds[-1]}" if self.seeds else "")


def explore(
    machine: Callable[[Tally], RuleBasedStateMachine],
    tally: Tally,
    *,
    steps: int,
    wanted: Sequence[str],
    examples: int,
    rules: int,
) -> None:
    """Rounds of `examples` sequences of `rules` rules each, until there were `steps` steps, or TAPER_FUZZ_STEPS.

    What is `wanted` must have occurred by then, or in ten times as many steps: chance may take its time.
    """
    asked = int(os.environ.get(STEPS_VAR, "0"))
    bounds = settings(
        max_examples=examples,
        stateful_step_count=rules,
        derandomize=False,
        print_blob=bool(asked),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def build() -> RuleBasedStateMachine:
        return machine(tally)

    first = int(os.environ.get(SEED_VAR) or random.SystemRandom().randrange(MOST_SEEDS)) if asked else 0
    for number in count(first):
        tally.seeds.append(number)
        print(f"{tally.name}: {SEED_VAR}={number}")  # shown by pytest where the round fails
        run_state_machine_as_test(seed(number)(build), settings=bounds)
        missing = [what for what in wanted if not tally.counts[what]]
        if tally.counts["steps"] >= (asked or steps) * (10 if missing else 1):
            assert missing == []
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

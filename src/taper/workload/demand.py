"""What a workload's requests cost on average: the numbers an operating point follows from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from taper.core.types import ConfigError
from taper.workload.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Means per request, over requests with their weights (which add up to 1)."""

    tokens: float  # output, all branches
    prompt_tokens: float
    join_tokens: float  # computed again after joins
    siblings: float  # branches beyond the first of each fork
    context_tokens: float  # per output token
    off_steps: float  # decode steps with one row per request
    eager_steps: float  # decode steps with every branch in every step

    @classmethod
    def of(cls, weighed: Iterable[tuple[Request, float]]) -> Demand:
        """Raises ConfigError without requests."""
        pairs = list(weighed)
        if not pairs:
            raise ConfigError("a workload without requests has no demand")
        tokens = sum(weight * one.tokens for one, weight in pairs)
        return cls(
            tokens=tokens,
            prompt_tokens=sum(weight * one.prompt_tokens for one, weight in pairs),
            join_tokens=sum(weight * one.join_tokens for one, weight in pairs),
            siblings=sum(weight * sum(len(stage) - 1 for stage in one.stages) for one, weight in pairs),
            context_tokens=sum(weight * one.context_sum_tokens for one, weight in pairs) / tokens,
            off_steps=tokens,
            eager_steps=sum(weight * one.critical_path_tokens for one, weight in pairs),
        )

    @property
    def eager_width(self) -> float:
        """Mean rows of a request with every branch in every step."""
        return self.off_steps / self.eager_steps

    @property
    def has_branches(self) -> bool:
        return not math.isclose(self.off_steps, self.eager_steps)

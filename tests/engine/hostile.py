"""Policies as somebody else's package may bring them: right at most steps, and then not."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taper.core.policies import Taper

FAULTS = (RuntimeError, ZeroDivisionError, MemoryError, RecursionError)


@dataclass(slots=True)
class Unsound:
    """Policy `taper`, but for the step that `_fault` spoils."""

    name: str = "unsound"
    is_stock: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def __call__(self, view: Any, predict: Any, knobs: Any, guidance: Any) -> Any:
        return Taper()(view, predict, knobs, guidance)


class Raising(Unsound):
    """Fails in three steps of ten, before or after it has decided."""

    def __call__(self, view: Any, predict: Any, knobs: Any, guidance: Any) -> Any:
        plan = Taper()(view, predict, knobs, guidance)
        if self.rng.random() < 0.3:
            raise self.rng.choice(FAULTS)("at random")
        return plan


class Planning(Unsound):
    """Returns plans that no engine should carry out, and sound ones between."""

    def __call__(self, view: Any, predict: Any, knobs: Any, guidance: Any) -> Any:
        plan = Taper()(view, predict, knobs, guidance)
        spoilt: list[Any] = [
            plan,
            None,
            replace(plan, run=np.zeros_like(plan.run)),
            replace(plan, run=plan.run[:-1]),
            replace(plan, run=plan.run.astype(int)),
            replace(plan, protected=~plan.protected),
            replace(plan, baseline_s=math.nan),
            replace(plan, predicted_s="soon"),
            replace(plan, prefill_limit_tokens=7.5),
            replace(plan, prefill_limit_tokens=-(10**9)),
        ]
        return self.rng.choice(spoilt)


@dataclass(slots=True)
class Misleading:
    """A predictor that is off by a factor."""

    law: Any
    factor: float

    def predict(self, rows: Any, context_tokens: Any, prefill_tokens: Any) -> Any:
        return self.law.predict(rows, context_tokens, prefill_tokens) * self.factor

    def prefill_tokens_within(self, seconds: float) -> float:
        return float(self.law.prefill_tokens_within(seconds) * self.factor)


class Predicting(Unsound):
    """Asks a predictor that says zero, infinity, nothing, less than nothing, or the truth."""

    def __call__(self, view: Any, predict: Any, knobs: Any, guidance: Any) -> Any:
        factor = self.rng.choice([0.0, math.inf, math.nan, -1.0, 1.0])
        return Taper()(view, Misleading(predict, factor), knobs, guidance)


class Jumping(Unsound):
    """Reads a clock that jumps, by days and by centuries, either way."""

    def __call__(self, view: Any, predict: Any, knobs: Any, guidance: Any) -> Any:
        jump_s = self.rng.choice([0.0, 1e5, -1e5, 1e10, -1e10])
        return Taper()(replace(view, now_s=view.now_s + jump_s), predict, knobs, guidance)

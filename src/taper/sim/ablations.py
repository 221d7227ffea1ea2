"""Policy `taper` with one of its parts taken out: the ablations of the publication (arXiv 2605.06914), of our rule.

Each is the shipped policy, called with something else or with its answer changed; nothing of it is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from taper.core.budget import StepBudget
from taper.core.latency import LatencyModel
from taper.core.policies import Guidance, PolicyFactory, Taper
from taper.core.types import Floats, Ints, Knobs, Plan, StepView


@dataclass(frozen=True, slots=True)
class NoBudget:
    """Without the slack budget: extras in the same order, as long as there is KV, whatever they cost."""

    name: str = "taper:no-budget"
    is_stock: bool = False
    taper: Taper = field(default_factory=Taper)

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        return self.taper(view, predict, knobs, replace(guidance, floor_s=math.inf))


@dataclass(slots=True)
class NoReplan:
    """Without replanning per step: the width that `taper` gives a request when it forks stays until the join.

    A request is known by the time of its arrival.
    """

    name: str = "taper:no-replan"
    is_stock: bool = False
    taper: Taper = field(default_factory=Taper)
    _widths: dict[float, int] = field(default_factory=dict)  # of requests in a parallel stage

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        planned = self.taper(view, predict, knobs, guidance)
        requests = len(view.tokens)
        width = np.bincount(view.request[planned.run], minlength=requests)
        live = np.bincount(view.request, minlength=requests)
        before, self._widths = self._widths, {}
        for group in np.flatnonzero(live > 1).tolist():
            key = float(view.arrival_s[group])
            width[group] = self._widths[key] = before.get(key, int(width[group]))
        plan = StepBudget(view, predict, quantum_tokens=knobs.quantum_tokens).plan(
            width, budget_s=planned.budget_s, slack_min_s=planned.slack_min_s
        )
        return replace(plan, prefill_limit_tokens=planned.prefill_limit_tokens)


@dataclass(frozen=True, slots=True)
class ConstantLatency:
    """Every step takes the same time, whatever it carries."""

    seconds: float

    @overload
    def predict(self, rows: int, context_tokens: int, prefill_tokens: int) -> float: ...
    @overload
    def predict(self, rows: Ints, context_tokens: Ints, prefill_tokens: Ints) -> Floats: ...

    def predict(self, rows: Any, context_tokens: Any, prefill_tokens: Any) -> Any:
        return np.full(len(rows), self.seconds) if isinstance(rows, np.ndarray) else self.seconds

    def prefill_tokens_within(self, seconds: float) -> float:
        return math.inf


@dataclass(slots=True)
class ConstantPredictor:
    """Without a predictor: a step is taken to last as long as the steps so far did on average."""

    name: str = "taper:constant-predictor"
    is_stock: bool = False
    taper: Taper = field(default_factory=Taper)
    _steps: int = 0
    _mean_s: float = 0.0

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        plan = self.taper(view, ConstantLatency(self._mean_s), knobs, guidance)
        load = plan.load
        # What the law says of the chosen step stands for its measurement, which a policy does not see.
        lasted_s = predict.predict(load.rows, load.context_tokens, load.prefill_tokens)
        self._steps += 1
        self._mean_s += (lasted_s - self._mean_s) / self._steps
        return plan


ABLATIONS: Mapping[str, PolicyFactory] = {
    "taper:no-budget": NoBudget,
    "taper:no-replan": NoReplan,
    "taper:constant-predictor": ConstantPredictor,
}

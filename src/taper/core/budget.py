"""One step's branches in the order in which they become rows, priced by the latency model.

Policies think in *widths*: rows per request, shape (G,). Every width vector selects the first `width[g]`
branches of each request, so a prefix sum over the ordered branches prices any of them in O(G), and
admitting extras under a budget is one sort and one cumulative sum instead of a scan per branch.
"""

from __future__ import annotations

import numpy as np

from taper.core.latency import LatencyModel
from taper.core.types import Bools, Ints, Plan, StepLoad, StepView

PINNED_FIRST = -4
REQUEST_SHIFT = 41  # sort keys of one request, four per quantum, stay below the next request's


class StepBudget:
    """The inner loop that all policies share; lives for one decision."""

    def __init__(self, view: StepView, predict: LatencyModel, *, quantum_tokens: float) -> None:
        self.view = view
        self.prefill_limit_tokens = view.max_prefill_tokens
        self._predict = predict
        requests = len(view.tokens)
        self.live = np.bincount(view.request, minlength=requests)
        self._first = self.live.cumsum() - self.live
        self._order = order_branches(view, quantum_tokens)
        self._request = view.request[self._order]  # unchanged by the order: it sorts by request first
        self._rank = np.arange(len(self._order)) - self._first[self._request]
        decoding = view.prefill_tokens == 0
        columns = np.empty((3, len(self._order)), dtype=np.int64)
        columns[0], columns[1], columns[2] = decoding, view.context_tokens * decoding, view.prefill_tokens
        self._columns = columns.take(self._order, axis=1)  # (3, B): row, context and prompt tokens each branch adds
        self._sums = np.zeros((3, len(self._order) + 1), dtype=np.int64)
        self._columns.cumsum(axis=1, out=self._sums[:, 1:])
        self._begins = self._sums.take(self._first, axis=1).sum(axis=1)
        self.protected = np.ones(requests, dtype=np.int64)
        if view.pinned.any():
            np.maximum(np.bincount(view.request[view.pinned], minlength=requests), 1, out=self.protected)
        self._protected_sums = self._carried(self.protected)

    def _carried(self, width: Ints) -> tuple[int, int, int]:
        """Rows, context and prompt tokens of a step with these widths, prompt tokens not yet limited."""
        ends = self._sums.take(self._first + width, axis=1).sum(axis=1)
        rows, context, prefill = (ends - self._begins).tolist()
        return rows, context, prefill

    def load(self, width: Ints) -> StepLoad:
        """What a step with these widths carries; prompt tokens up to the limit."""
        rows, context, prefill = self._protected_sums if width is self.protected else self._carried(width)
        return StepLoad(rows=rows, context_tokens=context, prefill_tokens=min(prefill, self.prefill_limit_tokens))

    def seconds(self, width: Ints) -> float:
        """Predicted T of a step with these widths."""
        load = self.load(width)
        return self._predict.predict(load.rows, load.context_tokens, load.prefill_tokens)

    def admit(self, width: Ints, request_order: Ints, limit_s: float) -> Ints:
        """Widen `width` by as many extras as keep T(S) <= limit_s, request by request in the given order.

        Stops at the first extra that does not fit or for which there is no KV room.
        """
        # The branches of each request from its width on, which lie side by side in `_order`: no sort.
        extras = (self.live - width)[request_order]
        ends = extras.cumsum()
        if not ends[-1]:
            return width
        begins = (self._first + width)[request_order]
        candidates = np.arange(ends[-1]) + (begins - ends + extras).repeat(extras)
        rows, context, prefill = self._columns.take(candidates, axis=1).cumsum(axis=1)
        base = self.load(width)
        seconds = self._predict.predict(base.rows + rows, base.context_tokens + context, base.prefill_tokens + prefill)
        fits = seconds <= limit_s
        if not self.view.resident.all():
            starting = ~self.view.resident[self._order[candidates]]
            new_kv = np.cumsum(np.where(starting, self._columns[2, candidates], 0))
            fits &= new_kv <= max(self.view.kv_free_tokens, 0)
        count = len(fits) if fits.all() else int(np.argmin(fits))
        return width + np.bincount(self._request[candidates[:count]], minlength=len(width))

    def plan(
        self, width: Ints, *, budget_s: float = np.inf, slack_min_s: float = np.inf, limit_prefill: bool = False
    ) -> Plan:
        """Floor and clamp once, last: at least the protected rows, at most every live branch."""
        width = np.minimum(np.maximum(width, self.protected), self.live)
        rows, context, prefill = self._carried(width)
        load = StepLoad(rows=rows, context_tokens=context, prefill_tokens=min(prefill, self.prefill_limit_tokens))
        extra_prefill = prefill - self._protected_sums[2]
        return Plan(
            run=self._rows(width),
            protected=self._rows(self.protected),
            load=load,
            baseline_s=self.seconds(self.protected),
            predicted_s=self._predict.predict(rows, context, load.prefill_tokens),
            budget_s=budget_s,
            slack_min_s=slack_min_s,
            prefill_limit_tokens=self.prefill_limit_tokens + extra_prefill if limit_prefill else None,
        )

    def _rows(self, width: Ints) -> Bools:
        run = np.empty(len(self._order), dtype=np.bool_)
        run[self._order] = self._rank < width[self._request]
        return run


def order_branches(view: StepView, quantum_tokens: float) -> Ints:
    """Branches by request and, within one: pinned, then least advanced in quanta, started, in mid-quantum.

    Progress counts in quanta because a row that leaves and re-enters costs the engine a copy: a branch that
    is running keeps its place to the end of its quantum, and then is behind its siblings. So every branch
    of a request advances at least once in every (live branches) quanta, even at width 1.
    """
    quanta, within = np.divmod(view.progress_tokens, int(quantum_tokens))
    keeps_place = view.ran_last & (within != 0)
    key = np.where(view.pinned, PINNED_FIRST, (quanta << 2) - 2 * view.resident - keeps_place)
    return np.argsort((view.request << REQUEST_SHIFT) + key, kind="stable")

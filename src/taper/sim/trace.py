"""What a run leaves behind: a number per step in compact arrays, and a record per finished request."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from taper.core.types import Bools, Floats, Ints
from taper.goodput import Window
from taper.records import RequestRecord


def _floats() -> array[float]:
    return array("d")


def _counts() -> array[int]:
    return array("q")


@dataclass(slots=True, kw_only=True)
class Trace:
    """One entry per step in each of the arrays."""

    records: list[RequestRecord] = field(default_factory=list)  # in order of completion
    end_s: array[float] = field(default_factory=_floats)  # when the step ended
    step_s: array[float] = field(default_factory=_floats)
    predicted_s: array[float] = field(default_factory=_floats)  # of the load as executed
    rows: array[int] = field(default_factory=_counts)
    prefill_tokens: array[int] = field(default_factory=_counts)
    emitted: array[int] = field(default_factory=_counts)
    requests: array[int] = field(default_factory=_counts)  # in service
    deferred: array[int] = field(default_factory=_counts)  # branches that hold KV and sat the step out
    # Gaps between two tokens of a branch. Where both came in consecutive steps the gap is the step: only how many
    # such there were is kept. The others, of deferred and preempted branches, are kept one by one.
    followed: array[int] = field(default_factory=_counts)
    gap_step: array[int] = field(default_factory=_counts)  # the step that ended the gap
    gap_s: array[float] = field(default_factory=_floats)
    decisions: int = 0  # steps for which the controller was asked
    preemptions: int = 0
    recomputed_tokens: int = 0
    unserved: int = 0  # requests still waiting when the load stopped

    def inside(self, window: Window) -> Bools:
        """The steps that ended in the window."""
        ends = np.array(self.end_s)
        return np.asarray((ends >= window.start_s) & (ends < window.end_s))


def gap_percentile_s(traces: Iterable[Trace], rank: float, window: Window) -> float | None:
    """Percentile of the inter-token gaps whose second token came inside the window; None without any."""
    gaps, counts = [], []
    for trace in traces:
        inside = trace.inside(window)
        late = inside[np.array(trace.gap_step)]
        gaps += [np.array(trace.step_s)[inside], np.array(trace.gap_s)[late]]
        counts += [np.array(trace.followed)[inside], np.ones(int(late.sum()), dtype=np.int64)]
    return weighted_percentile(np.concatenate(gaps), np.concatenate(counts), rank)


def weighted_percentile(values: Floats, counts: Ints, rank: float) -> float | None:
    """The least value that at least `rank` percent of all counts do not exceed."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    if not len(below) or not below[-1]:
        return None
    return float(values[order][np.searchsorted(below, rank / 100 * below[-1])])

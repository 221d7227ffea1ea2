"""The slow outer loop: the step time below which throttling only loses.

Where the SLO cannot be kept at width 1, because the baseline alone breaks it (overload, an SLO below T0) or because
serial stages run up a debt that only wide parallel stages repay (every request branches), throttling extras
lengthens residence, which raises concurrency, which lengthens T0 again. So every few completions, recent
requests are replayed in steady state at a dozen widths w:

    path_r(w) = serial_r + max(longest_r, parallel_r / w)         tokens of request r one after the other at width w
    rows(w)   = N * sum(tokens_r) / sum(path_r(w))                N concurrent requests
    t(w)      = T(rows(w), rows(w) * mean context, mean prefill) / tokens per row
    met_r(w)  = path_r(w) * t(w) <= SLO_r * (tokens_r - 1)

with longest_r = critical path - serial. A row brings one token in a step, with drafts more. The best width is the one
with the most goodput among those that attain the target, or among all if none does. Its step time becomes the floor
where the SLO-derived budget cannot lead there:

- that step is longer per token of a row than any request's SLO, so that only several rows per step keep it (a serial
  stage in debt would veto what its next fork repays);
- no width attains the target, width 1 loses most of the requests and not by a hair (a slow minute passes, a request
  given up does not come back), and the best of them promises more goodput than was got lately. One width for everybody
  is a crude policy: where promises differ, widths of their own may keep what no common one does. Once in force, such a
  floor stays until a width attains the target: the requests that finish under it cannot tell what would be without it.
- so lost, and width 1 takes longer per token than any request's SLO: there is nobody left to protect, and the floor is
  infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taper.core.latency import LatencyModel
from taper.core.types import FinishedRequest

WIDTHS = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64], dtype=np.float64)
TARGET = 0.98  # above what operators ask for: the replay knows neither spikes nor queues
BEYOND_SLO = 1.1  # how much longer than an SLO a step must be to count as kept by width alone, or as lost at width 1
LEAST_GAIN = 1.15  # goodput of the best width over what was got, for a floor to come into force
LEAST_KEPT = 0.5  # share of the requests within that at width 1, from which on none is given up for the others
FEWEST_REQUESTS = 16  # below this a share says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """What the batch looked like lately, smoothed."""

    requests: float
    context_tokens_per_row: float
    prefill_tokens: float
    tokens_per_row: float


def throughput_floor_s(
    finished: Sequence[FinishedRequest], occupancy: Occupancy, predict: LatencyModel, *, in_force: bool
) -> float:
    """Seconds; 0 where no floor is needed, inf where nobody is left to protect. `in_force`: one was until now.

    O(widths * len(finished)), a few tens of microseconds.
    """
    if len(finished) < FEWEST_REQUESTS:
        return 0.0
    tokens = np.array([r.tokens for r in finished], dtype=np.float64)
    serial = np.array([r.serial_tokens for r in finished], dtype=np.float64)
    longest = np.array([r.critical_path_tokens for r in finished], dtype=np.float64) - serial
    tpot_slo_s = np.array([r.tpot_slo_s for r in finished])

    path = serial + np.maximum(longest, (tokens - serial) / WIDTHS[:, None])  # (W, R)
    rows = occupancy.requests * tokens.sum() / path.sum(axis=1)
    step_s = np.array(
        [
            predict.predict(round(r), round(r * occupancy.context_tokens_per_row), round(occupancy.prefill_tokens))
            for r in rows
        ]
    )
    token_s = step_s / occupancy.tokens_per_row  # time per token of one row
    met = path * token_s[:, None] <= tpot_slo_s * (tokens - 1)
    goodput = (met * tokens).sum(axis=1) / (path.sum(axis=1) * token_s)
    reaching = met.mean(axis=1) >= TARGET
    best = int(np.argmax(np.where(reaching | ~reaching.any(), goodput, -1.0)))
    best_s = float(step_s[best])
    if reaching.any():
        return best_s if token_s[best] > BEYOND_SLO * tpot_slo_s.max() else 0.0
    kept = path[0] * token_s[0] <= BEYOND_SLO * tpot_slo_s * (tokens - 1)
    if kept.mean() >= LEAST_KEPT:
        return 0.0
    if token_s[0] > tpot_slo_s.max():
        return np.inf
    # Tokens in time per second of residence: the same measure, of what the requests went through.
    got_tokens, got_s = sum(r.tokens for r in finished if r.met), sum(r.residence_s for r in finished)
    promises_more = goodput.max() * got_s > LEAST_GAIN * got_tokens
    return best_s if in_force or promises_more else 0.0

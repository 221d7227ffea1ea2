"""SLO and token history -> seconds this step may take. Pure; all columns have shape (G,).

The clock is logical: a request earns one SLO per token, over all its branches, and pays wall time. So the
deadline moves with the request and never with a single row: deferring a branch cannot age it, and one long
stall costs each request that stall once (DESIGN rule: no absorbing width-1 state).
"""

from __future__ import annotations

import numpy as np

from taper.core.types import Bools, Floats, Ints, Knobs, StepView


def credit_s(view: StepView) -> Floats:
    """Seconds a request is ahead of its SLO: SLO * (tokens - 1) - (now - t_first); 0 before its first token."""
    credit = view.tpot_slo_s * (view.tokens - 1) - (view.now_s - view.first_token_s)
    return np.where(np.isnan(credit), 0.0, credit)


def published_slack_s(view: StepView) -> Floats:
    """Slack as published (arXiv 2605.06914): deadline of the next token minus now.

    Decoding: t_first + SLO * tokens - now. Before the first token: arrival + TTFT SLO - now.
    """
    decoding = view.first_token_s + view.tpot_slo_s * view.tokens - view.now_s
    waiting = view.arrival_s + view.ttft_slo_s - view.now_s
    return np.where(np.isnan(decoding), waiting, decoding)


def allowed_s(view: StepView, credit: Floats, width: Ints, *, knobs: Knobs, margin: float) -> Floats:
    """Longest step each request can take with `width` rows.

        SLO * (1 - margin) * tokens it gets + min(spendable, bank * SLO) / H

    Credit beyond the reserve is spendable, debt counts in full, and in between a request neither gives nor takes: a
    new one would otherwise pin the batch below its SLO. Spreading over H steps paces both, so a spike finds a
    reserve; the bank keeps a request that ran fast for long from being stalled for long.
    """
    slo = view.tpot_slo_s
    reserve_s = knobs.reserve_slos * slo
    spendable = np.where(credit >= reserve_s, credit - reserve_s, np.minimum(credit, 0.0))
    paced: Floats = np.minimum(spendable, knobs.bank_slos * slo) / knobs.horizon_steps
    return slo * ((1.0 - margin) * view.tokens_per_row * width) + paced


def hopeless(credit: Floats, tpot_slo_s: Floats, live: Ints, remaining_tokens: Floats, baseline_s: float) -> Bools:
    """Requests that miss even if everything else ran at width 1 from here on.

    Each of the `remaining_tokens` earns SLO - T0 / live at best, with every live branch of the request running.
    """
    return credit + remaining_tokens * (tpot_slo_s - baseline_s / live) < 0.0

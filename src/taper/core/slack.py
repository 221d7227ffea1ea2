"""SLO and token history -> seconds this step may take. Pure; all columns have shape (G,).

The clock is logical: a request earns one SLO per token, over all its branches, and pays wall time. So the
deadline moves with the request and never with a single row: deferring a branch cannot age it, and one long
stall costs each request that stall once: no state holds a request at width 1 for good.
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


def first_token_due(view: StepView, *, within_s: float) -> Bools:
    """Requests whose first token is promised within that time; a promise already broken presses nobody."""
    left_s = view.arrival_s + view.ttft_slo_s - view.now_s
    return np.isnan(view.first_token_s) & (left_s >= 0.0) & (left_s <= within_s)


def remaining_tokens(view: StepView, live: Ints, *, knobs: Knobs, mean_output_tokens: float) -> Floats:
    """Tokens a request is taken to have ahead of it: up to twice the usual length, at least the knob per live branch.

    The usual length is that of all requests; one with many branches may be far beyond it and only half-way.
    """
    remaining: Floats = np.maximum(knobs.lookahead_tokens * live, 2.0 * mean_output_tokens - view.tokens)
    return remaining


def allowed_s(
    view: StepView, credit: Floats, live: Ints, *, knobs: Knobs, margin: float, mean_path_tokens: float
) -> Floats:
    """Longest step each request can take with all its `live` branches running.

        SLO * (1 - margin) * tokens it gets + paced
        paced = credit / H                                credit is spent over H steps
        paced = credit / max(H, mean path)                debt is repaid over the steps a request usually lives

    With drafts a row brings `tokens_per_row` tokens in a step, and a path takes as many fewer steps.

    Pacing credit leaves something for the next spike. Debt repaid any faster would throttle the rows that repay it.
    """
    slo, horizon = view.tpot_slo_s, knobs.horizon_steps
    paced = credit / np.where(credit > 0.0, horizon, max(horizon, mean_path_tokens / view.tokens_per_row))
    allowed: Floats = slo * ((1.0 - margin) * view.tokens_per_row) * live + paced
    return allowed


def hopeless(credit: Floats, tpot_slo_s: Floats, at_best: Floats, remaining: Floats, baseline_s: float) -> Bools:
    """Requests that miss even if everything else ran at width 1 from here on.

    `at_best`: tokens of a step with every live branch of the request running. Each of the `remaining` tokens earns
    SLO - T0 / at_best then.
    """
    return credit + remaining * (tpot_slo_s - baseline_s / at_best) < 0.0

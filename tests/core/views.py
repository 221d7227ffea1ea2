"""Small step views for the core tests: one request per keyword, columns filled in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from taper.core.types import StepView


@dataclass(kw_only=True)
class Req:
    """One request of a test view; `branches` lists (context_tokens, progress_tokens)."""

    branches: list[tuple[int, int]]
    tokens: int = 10
    first_token_s: float = 0.0
    arrival_s: float = 0.0
    tpot_slo_s: float = 0.05
    ttft_slo_s: float = 5.0
    priority: float = 0.0
    prefill: dict[int, int] = field(default_factory=dict)  # branch -> prompt tokens to compute
    held: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)


def serial(**kwargs: object) -> Req:
    return Req(branches=[(100, 10)], **kwargs)


def branching(count: int, context: int = 100, **kwargs: object) -> Req:
    return Req(branches=[(context, 10)] * count, **kwargs)


def make_view(
    *requests: Req,
    now_s: float = 0.0,
    kv_free_tokens: int = 10**6,
    max_prefill_tokens: int = 256,
    tokens_per_row: float = 1.0,
) -> StepView:
    flat = [(g, i, b) for g, r in enumerate(requests) for i, b in enumerate(r.branches)]

    def column(name: str) -> np.ndarray:
        return np.array([float(getattr(r, name)) for r in requests])

    return StepView(
        now_s=now_s,
        arrival_s=column("arrival_s"),
        first_token_s=column("first_token_s"),
        tokens=np.array([r.tokens for r in requests], dtype=np.int64),
        tpot_slo_s=column("tpot_slo_s"),
        ttft_slo_s=column("ttft_slo_s"),
        priority=column("priority"),
        request=np.array([g for g, _, _ in flat], dtype=np.int64),
        context_tokens=np.array([b[0] for _, _, b in flat], dtype=np.int64),
        progress_tokens=np.array([b[1] for _, _, b in flat], dtype=np.int64),
        prefill_tokens=np.array([requests[g].prefill.get(i, 0) for g, i, _ in flat], dtype=np.int64),
        resident=np.array([i not in requests[g].held for g, i, _ in flat]),
        ran_last=np.array([i in requests[g].ran for g, i, _ in flat]),
        pinned=np.array([i in requests[g].pinned for g, i, _ in flat]),
        kv_free_tokens=kv_free_tokens,
        max_prefill_tokens=max_prefill_tokens,
        tokens_per_row=tokens_per_row,
    )


def random_view(rng: np.random.Generator, *, rows: int, requests: int, now_s: float = 100.0) -> StepView:
    """A decoding batch of `rows` branches over `requests` requests, some in credit and some in debt."""
    request = np.sort(np.concatenate([np.arange(requests), rng.integers(0, requests, rows - requests)]))
    tokens = rng.integers(20, 500, requests)
    return StepView(
        now_s=now_s,
        arrival_s=now_s - rng.uniform(1, 20, requests),
        first_token_s=now_s - tokens * 0.04 * rng.uniform(0.5, 1.1, requests),
        tokens=tokens,
        tpot_slo_s=np.full(requests, 0.05),
        ttft_slo_s=np.full(requests, 5.0),
        priority=np.zeros(requests),
        request=request,
        context_tokens=rng.integers(50, 2000, rows),
        progress_tokens=rng.integers(0, 300, rows),
        prefill_tokens=np.zeros(rows, dtype=np.int64),
        resident=np.ones(rows, dtype=np.bool_),
        ran_last=rng.random(rows) < 0.5,
        pinned=np.zeros(rows, dtype=np.bool_),
        kv_free_tokens=100_000,
        max_prefill_tokens=256,
    )

"""Synthetic sources and replays: reproducible, at the rate asked for, with honest means."""

from __future__ import annotations

import pytest

from taper.core.types import ConfigError
from taper.workload import Arrivals, Branching, Lengths, Mix, Replay, Synthetic, TraceRow, profile

ROWS = tuple(TraceRow(at_s=at_s, prompt_tokens=100, output_tokens=20) for at_s in (0.0, 1.0, 3.0))
FOUR_TIMES_TEN = Branching(at_arrival=True, equal=True, fanout=Lengths(low=4, high=4), branch=Lengths(low=10, high=10))


def test_a_synthetic_source_puts_request_i_at_arrival_i() -> None:
    source = Synthetic(arrivals=Arrivals(cv=0.0))
    requests = list(source.requests(seed=3, rate_rps=2.0, horizon_s=2.4))
    assert [one.arrival_s for one in requests] == [0.5, 1.0, 1.5, 2.0]
    assert requests[2] == source.mix.request(seed=3, index=2, arrival_s=1.5)


def test_means_of_a_mix_by_hand() -> None:
    mix = Mix(
        branching_share=0.25, prompt=Lengths(low=8, high=8), serial=Lengths(low=30, high=30), branching=FOUR_TIMES_TEN
    )
    demand = Synthetic(mix=mix).demand()
    assert demand.tokens == pytest.approx(0.25 * 40 + 0.75 * 30)
    assert demand.eager_steps == pytest.approx(0.25 * 10 + 0.75 * 30)
    assert demand.siblings == pytest.approx(0.25 * 3)
    assert demand.prompt_tokens == pytest.approx(8)
    # a branch's tokens see 8 + 5 tokens on average, a serial request's 8 + 15
    assert demand.context_tokens == pytest.approx((0.25 * 40 * 13 + 0.75 * 30 * 23) / demand.tokens)
    assert Synthetic(mix=mix).shared(0.0).demand().has_branches is False


def test_a_replay_stretches_time_and_starts_over() -> None:
    replay = Replay(rows=ROWS)
    assert replay.lap_s == 4.5  # 3 s and a mean gap of 1.5 s
    assert replay.rate_rps == pytest.approx(2 / 3)
    requests = list(replay.requests(seed=0, rate_rps=4 / 3, horizon_s=5.0))
    assert [one.arrival_s for one in requests] == pytest.approx([0.0, 0.5, 1.5, 2.25, 2.75, 3.75, 4.5])
    assert [one.index for one in requests] == list(range(7))
    assert {one.stages for one in requests} == {((20,),)}


def test_a_profile_is_laid_over_a_share_of_the_rows() -> None:
    replay = Replay(rows=ROWS, branching=profile("best-of-n"), branching_share=0.3, output_scale=0.5, prompt_scale=0.1)
    requests = list(replay.requests(seed=1, rate_rps=10.0, horizon_s=200.0))
    assert sum(one.branching for one in requests) / len(requests) == pytest.approx(0.3, abs=0.03)
    assert {length for one in requests for length in one.stages[0]} == {10}
    assert {one.prompt_tokens for one in requests} == {10}
    again = list(replay.requests(seed=1, rate_rps=10.0, horizon_s=200.0))
    assert requests == again
    assert list(replay.shared(0.0).requests(seed=1, rate_rps=10.0, horizon_s=9.0))[5].branching is False


def test_a_context_bounds_every_request() -> None:
    replay = Replay(rows=ROWS, context_tokens=60)
    assert {one.peak_context_tokens <= 60 for one in replay.requests(seed=0, rate_rps=1.0, horizon_s=9.0)} == {True}
    mix = Mix(prompt=Lengths(low=500, high=500))
    bounded = Synthetic(mix=mix, context_tokens=64)
    assert max(one.peak_context_tokens for one in bounded.requests(seed=0, rate_rps=5.0, horizon_s=20.0)) <= 64


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least two requests"):
        Replay(rows=ROWS[:1])
    with pytest.raises(ConfigError, match="needs a branch profile"):
        Replay(rows=ROWS, branching_share=0.5)
    with pytest.raises(ConfigError, match="rate_rps"):
        next(Replay(rows=ROWS).requests(seed=0, rate_rps=0.0, horizon_s=1.0))

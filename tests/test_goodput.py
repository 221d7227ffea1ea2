"""Goodput to the digit, on records small enough to check by hand."""

from __future__ import annotations

import itertools

import pytest

from taper.goodput import (
    Spread,
    Window,
    miss_cause,
    paired_ratios,
    spread,
    summarize,
    tokens_between,
    victims_of,
)
from taper.records import ChoiceRecord, RequestRecord


def choice(first_s: float, last_s: float, tokens: int, index: int = 0) -> ChoiceRecord:
    gap_ms = (last_s - first_s) * 1e3 / max(1, tokens - 1)
    return ChoiceRecord(
        index=index,
        tokens=tokens,
        first_token_s=first_s,
        last_token_s=last_s,
        gaps_ms=(gap_ms,) * (tokens - 1),
        finish_reason="length",
    )


def request(
    *choices: ChoiceRecord,
    scheduled_s: float = 0.0,
    sent_s: float | None = None,
    ended_s: float | None = None,
    error: str | None = None,
    ttft_slo_s: float | None = None,
    kind: str | None = None,
) -> RequestRecord:
    last_s = max((one.last_token_s for one in choices), default=scheduled_s)
    branching = len(choices) > 1 if kind is None else kind == "branching"
    return RequestRecord(
        id="r",
        policy="taper",
        round=0,
        seed=0,
        index=0,
        kind="branching" if branching else "serial",
        branches=max(1, len(choices)),
        prompt_tokens=20,
        scheduled_s=scheduled_s,
        sent_s=scheduled_s if sent_s is None else sent_s,
        ended_s=last_s if ended_s is None else ended_s,
        tpot_slo_s=0.1,
        ttft_slo_s=ttft_slo_s,
        choices=choices,
        error=error,
    )


def test_goodput_counts_tokens_of_requests_that_met_per_second_of_wall_time() -> None:
    met = request(choice(1.0, 2.0, 11))  # 100 ms per token: exactly the SLO
    missed = request(choice(1.0, 4.0, 21), scheduled_s=0.5)  # 150 ms
    branching = request(choice(1.0, 5.0, 30), choice(2.0, 5.0, 20, index=1))  # 4 s / 49 tokens
    summary = summarize([met, missed, branching])
    assert summary.window_s == 5.0  # first planned arrival 0.0 to last completion 5.0
    assert summary.goodput_tok_s == pytest.approx(61 / 5)
    assert summary.raw_tok_s == pytest.approx(82 / 5)
    assert summary.attainment == pytest.approx(2 / 3)
    assert summary.attainment_serial == 0.5
    assert summary.attainment_branching == 1.0
    assert (summary.misses_error, summary.misses_ttft, summary.misses_tpot) == (0, 0, 1)
    assert (summary.requests, summary.judged, summary.met) == (3, 3, 2)


def test_errors_stay_in_the_denominator_and_out_of_goodput() -> None:
    failed = request(choice(1.0, 1.5, 10), error="time-out: 30 s", ended_s=4.0)
    rejected = request(error="http 503: full", ended_s=0.5)
    met = request(choice(1.0, 2.0, 11))
    summary = summarize([failed, rejected, met])
    assert summary.attainment == pytest.approx(1 / 3)
    assert summary.goodput_tok_s == pytest.approx(11 / 4)
    assert summary.raw_tok_s == pytest.approx(21 / 4)
    assert summary.misses_error == 2


def test_single_token_requests_are_not_judged_but_their_token_counts() -> None:
    single = request(choice(1.0, 1.0, 1), ended_s=2.0)
    summary = summarize([single])
    assert summary.attainment is None
    assert summary.judged == 0
    assert summary.tpot_p50_s is None
    assert summary.goodput_tok_s == 0.5


def test_ttft_is_judged_only_where_the_record_sets_an_slo() -> None:
    slow = choice(3.0, 3.5, 11)
    assert miss_cause(request(slow)) is None
    assert miss_cause(request(slow, ttft_slo_s=3.0)) is None
    assert miss_cause(request(slow, ttft_slo_s=2.9)) == "ttft"
    assert miss_cause(request(choice(3.0, 9.0, 11), ttft_slo_s=2.9)) == "ttft"  # counted once
    assert miss_cause(request(slow, ttft_slo_s=2.9, error="http 500")) == "error"


def test_ttft_runs_from_the_planned_arrival() -> None:
    waited = request(choice(3.0, 3.5, 11), scheduled_s=1.0, sent_s=2.5)
    summary = summarize([waited])
    assert (summary.ttft_p50_s, summary.ttft_sent_p50_s) == (2.0, 0.5)


def test_effective_tpot_spans_deferral_between_branches() -> None:
    one_after_the_other = request(choice(0.0, 1.0, 11), choice(1.1, 2.1, 11, index=1))
    assert summarize([one_after_the_other]).tpot_p50_s == pytest.approx(2.1 / 21)


@pytest.mark.parametrize(
    ("window", "tokens"),
    [
        (Window(start_s=0.0, end_s=9.0), 11),
        (Window(start_s=0.0, end_s=1.0), 0),  # the first token falls on the end, which is outside
        (Window(start_s=1.0, end_s=1.05), 1),
        (Window(start_s=1.0, end_s=2.0), 10),  # the last token falls on the end
        (Window(start_s=1.05, end_s=1.95), 9),
        (Window(start_s=2.0, end_s=3.0), 1),
        (Window(start_s=2.01, end_s=3.0), 0),
    ],
)
def test_tokens_inside_a_window(window: Window, tokens: int) -> None:
    evenly = ChoiceRecord(index=0, tokens=11, first_token_s=1.0, last_token_s=2.0)
    assert tokens_between(evenly, window) == tokens


def test_adjacent_windows_share_no_token() -> None:
    evenly = ChoiceRecord(index=0, tokens=37, first_token_s=0.3, last_token_s=7.9)
    cuts = [0.0, 0.3, 1.7, 2.0, 7.9, 8.0]
    parts = [tokens_between(evenly, Window(start_s=a, end_s=b)) for a, b in itertools.pairwise(cuts)]
    assert sum(parts) == 37


def test_one_burst_of_tokens_is_not_divided_by_zero() -> None:
    burst = ChoiceRecord(index=0, tokens=5, first_token_s=1.0, last_token_s=1.0)
    assert tokens_between(burst, Window(start_s=0.0, end_s=1.0)) == 0
    assert tokens_between(burst, Window(start_s=1.0, end_s=1.5)) == 5


def test_a_window_judges_whole_lives_but_counts_only_its_own_tokens() -> None:
    window = Window(start_s=10.0, end_s=20.0)
    before = request(choice(1.0, 2.0, 11), ended_s=9.9)
    across = request(choice(9.0, 11.0, 21), scheduled_s=8.0)  # meets; 10 tokens from 10.0 on
    late_miss = request(choice(19.0, 29.0, 51), scheduled_s=18.0)  # 200 ms; 5 tokens before 20.0
    after = request(choice(21.0, 22.0, 11), scheduled_s=20.0)
    summary = summarize([before, across, late_miss, after], window)
    assert summary.requests == 2
    assert summary.attainment == 0.5
    assert summary.goodput_tok_s == pytest.approx(11 / 10)
    assert summary.raw_tok_s == pytest.approx(16 / 10)


def test_victims_are_serial_requests_that_met_a_branching_one() -> None:
    branching = request(choice(1.0, 2.0, 11), choice(1.0, 2.0, 11, index=1))
    beside = request(choice(1.5, 2.5, 11), scheduled_s=1.5)
    later = request(choice(3.0, 3.5, 11), scheduled_s=2.0)  # sent when the other had just ended
    assert victims_of([branching, beside, later]) == [beside]
    summary = summarize([branching, beside, later])
    assert summary.victims == 1
    assert summary.victim_tpot_p50_s == pytest.approx(0.1)


def test_gap_percentile_is_over_all_gaps() -> None:
    steady = request(choice(0.0, 1.0, 101))  # 100 gaps of 10 ms
    stall = request(ChoiceRecord(index=0, tokens=2, first_token_s=0.0, last_token_s=0.5, gaps_ms=(500.0,)))
    assert summarize([steady]).itl_p99_s == pytest.approx(0.01)
    assert summarize([steady, stall]).itl_p99_s == pytest.approx(0.01)
    assert summarize([stall]).itl_p99_s == pytest.approx(0.5)


def test_nothing_to_summarize() -> None:
    with pytest.raises(ValueError, match="no records"):
        summarize([])
    with pytest.raises(ValueError, match="above zero"):
        summarize([], Window(start_s=1.0, end_s=1.0))
    empty = summarize([], Window(start_s=0.0, end_s=2.0))
    assert (empty.goodput_tok_s, empty.attainment, empty.ttft_p50_s) == (0.0, None, None)


def test_spread_over_rounds() -> None:
    assert spread([3.0, None, 1.0, 2.0, 10.0]) == Spread(median=2.5, low=1.0, high=10.0, q1=1.75, q3=4.75, n=4)
    assert spread([None]) is None


def test_ratios_pair_rounds() -> None:
    above = {0: 3.0, 1: 4.0, 2: None, 3: 1.0, 4: 0.0}
    below = {0: 2.0, 1: 0.0, 2: 1.0, 4: 5.0}
    assert paired_ratios(above, below) == {0: 1.5, 4: 0.0}

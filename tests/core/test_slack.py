import numpy as np
import pytest

from taper.core import slack
from taper.core.types import Knobs
from tests.core.views import branching, make_view, serial

KNOBS = Knobs(horizon_steps=16, margin=0.0, lookahead_tokens=32)


def allowed(view, live, *, margin=0.0, path=100.0):
    return slack.allowed_s(
        view, slack.credit_s(view), np.array(live), knobs=KNOBS, margin=margin, mean_path_tokens=path
    )


def test_credit_is_slo_per_token_minus_wall_time():
    view = make_view(serial(tokens=11, first_token_s=1.0, tpot_slo_s=0.05), now_s=1.4)
    assert slack.credit_s(view) == pytest.approx([0.05 * 10 - 0.4])


def test_credit_before_the_first_token_is_zero():
    view = make_view(serial(tokens=0, first_token_s=float("nan"), prefill={0: 30}), now_s=9.0)
    assert slack.credit_s(view).tolist() == [0.0]


def test_credit_counts_tokens_of_every_branch():
    view = make_view(branching(8, tokens=81), now_s=1.0)
    assert slack.credit_s(view) == pytest.approx([0.05 * 80 - 1.0])


def test_allowed_step_at_zero_credit_is_the_slo_times_width():
    view = make_view(serial(tokens=1), branching(4, tokens=1))
    assert allowed(view, [1, 4]) == pytest.approx([0.05, 4 * 0.05])


def test_credit_is_spent_over_the_horizon():
    view = make_view(serial(tokens=4), now_s=0.01)
    assert allowed(view, [1]) == pytest.approx([0.05 + 0.14 / 16])


def test_debt_is_repaid_over_the_steps_a_request_usually_lives_but_not_within_the_horizon():
    view = make_view(*[branching(4, tokens=1, first_token_s=-1.0)] * 3)
    assert allowed(view, [4, 4, 4], path=50.0) == pytest.approx([4 * 0.05 - 1.0 / 50] * 3)
    assert allowed(view, [4, 4, 4], path=8.0) == pytest.approx([4 * 0.05 - 1.0 / 16] * 3)


def test_remaining_is_up_to_twice_the_usual_length_but_never_less_than_the_lookahead_of_each_branch():
    view = make_view(serial(tokens=50), serial(tokens=190), branching(8, tokens=190), branching(2, tokens=20))
    remaining = slack.remaining_tokens(view, np.array([1, 1, 8, 2]), knobs=KNOBS, mean_output_tokens=100.0)
    assert remaining.tolist() == [150.0, 32.0, 8 * 32.0, 180.0]


def test_margin_shortens_what_the_slo_allows_and_not_the_credit():
    view = make_view(serial(tokens=41), now_s=1.0)  # 1 s in credit
    assert allowed(view, [1], margin=0.1) == pytest.approx([0.05 * 0.9 + 1.0 / 16])


def test_speculative_tokens_lengthen_the_step_a_row_allows():
    view = make_view(serial(tokens=1), tokens_per_row=2.5)
    assert allowed(view, [1]) == pytest.approx([0.05 * 2.5])
    indebted = make_view(serial(tokens=1, first_token_s=-1.0), tokens_per_row=2.5)  # by 1 s, over a path of 250 tokens
    assert allowed(indebted, [1], path=250.0) == pytest.approx([0.05 * 2.5 - 1.0 / 100])


def test_hopeless_needs_debt_that_no_remaining_token_repays():
    credit = np.array([-1.0, -1.0, -1.0])
    slo = np.array([0.05, 0.05, 0.05])
    live = np.array([1, 1, 8])
    remaining = np.array([100.0, 20.0, 21.0])
    # At T0 = 40 ms a serial token repays 10 ms; a token of eight live branches repays 45 ms.
    lost = slack.hopeless(credit, slo, live, remaining, 0.04)
    assert lost.tolist() == [False, True, True]
    assert not slack.hopeless(credit[2:], slo[2:], live[2:], np.array([23.0]), 0.04)[0]


def test_published_slack_switches_from_ttft_to_the_next_token():
    view = make_view(
        serial(tokens=3, first_token_s=1.0), serial(tokens=0, first_token_s=float("nan"), arrival_s=0.5), now_s=1.1
    )
    assert slack.published_slack_s(view) == pytest.approx([1.0 + 0.15 - 1.1, 0.5 + 5.0 - 1.1])

from dataclasses import replace

import numpy as np
import pytest

from taper.core.latency import LinearLatency
from taper.core.policies import Guidance, resolve
from taper.core.types import ConfigError, Knobs
from tests.core.views import Req, branching, make_view, serial

# 10 ms + 1 ms per row: every predicted time below can be checked in the head.
LAW = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0005)
NEUTRAL = Knobs(margin=0.0, prefill_floor_tokens=8, throughput_floor=0)
LEARNED = Guidance(margin=0.0, mean_output_tokens=100.0, mean_path_tokens=190.0)


def plan_of(policy, view, knobs=NEUTRAL, guidance=LEARNED):
    return resolve(policy)(view, LAW, knobs, guidance)


def widths(view, plan):
    return np.bincount(view.request[plan.run], minlength=len(view.tokens)).tolist()


def test_off_runs_one_row_per_request():
    view = make_view(serial(), branching(6), branching(3))
    plan = plan_of("off", view)
    assert widths(view, plan) == [1, 1, 1]
    assert plan.predicted_s == plan.baseline_s == pytest.approx(0.013)
    assert plan.externality_s == 0.0


def test_cap_runs_at_most_n_rows_per_request():
    view = make_view(serial(), branching(6), branching(3))
    assert widths(view, plan_of("cap:4", view)) == [1, 4, 3]
    assert plan_of("cap:1", view).run.tolist() == plan_of("off", view).run.tolist()


def test_eager_runs_everything_and_knows_what_it_costs():
    view = make_view(serial(), branching(6))
    plan = plan_of("eager", view)
    assert plan.run.all()
    assert plan.externality_s == pytest.approx(0.005)
    assert resolve("eager").is_stock
    assert not resolve("off").is_stock


def test_paper_budget_is_t0_plus_rho_of_the_least_slack():
    # T0 = 12 ms; the serial request's next token is due in 17 ms, so the budget is 12 + 0.8 * 5 = 16 ms: 4 extras.
    view = make_view(serial(tokens=10), branching(20, tokens=10), now_s=10 * 0.05 - 0.017)
    plan = plan_of("taper-paper", view)
    assert plan.slack_min_s == pytest.approx(0.017)
    assert plan.budget_s == pytest.approx(0.016)
    assert widths(view, plan) == [1, 5]


def test_paper_admits_short_contexts_first():
    view = make_view(branching(9, context=900), branching(9, context=100), now_s=0.5 - 0.017)
    assert widths(view, plan_of("taper-paper", view)) == [1, 5]


def test_taper_admits_while_the_step_fits_the_least_allowance():
    # Serial at zero credit allows its SLO: 50 ms, so 40 rows in all.
    view = make_view(serial(tokens=1), branching(60, tokens=1))
    plan = plan_of("taper", view)
    assert plan.budget_s == pytest.approx(0.050)
    assert widths(view, plan) == [1, 39]
    assert plan.predicted_s == pytest.approx(0.050)


def test_taper_counts_a_branching_request_at_the_width_it_can_get():
    view = make_view(branching(30, tokens=1))
    plan = plan_of("taper", view)
    assert plan.budget_s == pytest.approx(30 * 0.05)
    assert plan.run.all()


def test_taper_spends_credit_over_the_horizon():
    # One second of credit over 16 steps: 62.5 ms more than the SLO.
    view = make_view(serial(tokens=41), branching(200, tokens=41), now_s=1.0)
    assert plan_of("taper", view).budget_s == pytest.approx(0.05 + 1.0 / 16)


def test_taper_leaves_out_a_hopeless_request_and_serves_its_extras_last():
    hopeless = branching(10, tokens=10, first_token_s=-100.0)
    view = make_view(hopeless, serial(tokens=1), branching(60, tokens=1))
    plan = plan_of("taper", view)
    assert plan.budget_s == pytest.approx(0.050)
    assert widths(view, plan) == [1, 1, 38]


def test_with_drafts_a_request_may_be_promised_less_than_a_step_per_token():
    # A step of 12 ms and more brings three tokens per row: at 6 ms per token it may take 18 ms.
    requests = (serial(tokens=1, tpot_slo_s=0.006), branching(60, tokens=1, tpot_slo_s=0.006))
    view = make_view(*requests)
    assert plan_of("taper", view).budget_s == pytest.approx(60 * 0.006)  # one token per row: the serial one is lost
    view = make_view(*requests, tokens_per_row=3.0)
    plan = plan_of("taper", view)
    assert plan.budget_s == pytest.approx(0.018)
    assert widths(view, plan) == [1, 7]


def test_taper_runs_everything_when_every_request_is_lost():
    view = make_view(*[branching(10, tokens=10, first_token_s=-100.0) for _ in range(4)])
    plan = plan_of("taper", view)
    assert plan.run.all()
    assert plan.budget_s == np.inf


def test_taper_serves_the_least_credit_first_then_age_and_priority_before_both():
    old = branching(40, tokens=1, arrival_s=-9.0)
    indebted = branching(40, tokens=1, first_token_s=-0.1, arrival_s=-1.0)
    view = make_view(old, indebted, serial(tokens=1))
    assert widths(view, plan_of("taper", view)) == [1, 38, 1]
    view = make_view(branching(40, tokens=1), old, serial(tokens=1))
    assert widths(view, plan_of("taper", view)) == [1, 38, 1]
    urgent = branching(40, tokens=1, priority=1.0)
    view = make_view(old, indebted, urgent, serial(tokens=1))
    assert widths(view, plan_of("taper", view)) == [1, 1, 37, 1]


def test_credit_counts_in_horizons_of_slos_and_within_one_the_oldest_is_first():
    loose = branching(40, tokens=21, tpot_slo_s=0.1, arrival_s=-9.0)  # 2 s ahead: 20 tokens, the second horizon
    ahead = branching(40, tokens=41, tpot_slo_s=0.02, arrival_s=-9.0)  # 0.8 s ahead, but 40 tokens: the third
    tight = branching(40, tokens=11, tpot_slo_s=0.05)  # 10 tokens ahead: the first
    view = make_view(loose, ahead, tight, serial(tokens=1))
    assert widths(view, plan_of("taper", view)) == [1, 1, 37, 1]
    older = branching(40, tokens=13, tpot_slo_s=0.05, arrival_s=-1.0)
    view = make_view(loose, tight, older, serial(tokens=1))
    assert widths(view, plan_of("taper", view)) == [1, 1, 37, 1]


@pytest.mark.parametrize(("promise_s", "slack_min_s"), [(np.inf, 0.075), (0.05, 0.2), (0.075, 0.075)])
def test_a_loosened_slo_binds_nobody_where_the_servers_own_is_lost(promise_s, slack_min_s):
    """T0 is 71 ms: one row per step keeps 75 ms per token and not 50, four rows keep either."""
    view = make_view(*[branching(4, tokens=1)] * 60, serial(tokens=1, tpot_slo_s=0.075))
    guidance = Guidance(margin=0.0, mean_output_tokens=100.0, promise_s=promise_s)
    assert plan_of("taper", view, guidance=guidance).slack_min_s == pytest.approx(slack_min_s)


def test_the_floor_raises_the_budget():
    view = make_view(serial(tokens=1), branching(90, tokens=1))
    plan = plan_of("taper", view, guidance=Guidance(margin=0.0, mean_output_tokens=100.0, floor_s=0.08))
    assert plan.budget_s == 0.08
    assert plan.slack_min_s == pytest.approx(0.05)
    assert widths(view, plan) == [1, 69]


def test_prefill_takes_what_decode_slack_leaves_but_never_less_than_its_floor():
    waiting = Req(branches=[(0, 0)], tokens=0, first_token_s=float("nan"), prefill={0: 200}, held={0})
    fork = branching(2, tokens=41)  # well in credit
    view = make_view(serial(tokens=1), fork, waiting)
    # 50 ms allowed, 12 ms for the protected rows: 38 ms at 0.5 ms a token, and nothing left for the extra.
    plan = plan_of("taper", view)
    assert plan.prefill_limit_tokens == 76
    assert plan.load.prefill_tokens == 76
    assert widths(view, plan) == [1, 1, 1]
    # 7 s in debt, repaid over the 190 tokens taken to be left: 50 - 38 = 12 ms, and nothing to spare.
    late = make_view(serial(tokens=10, first_token_s=-7.6), fork, waiting)
    assert plan_of("taper", late).prefill_limit_tokens == 200 // 16
    assert plan_of("taper", make_view(serial(tokens=1), waiting)).prefill_limit_tokens is None


@pytest.mark.parametrize(("ttft_slo_s", "tokens"), [(0.1, 200), (0.3, 200 // 16), (5.0, 200 // 16)])
def test_a_prompt_about_to_miss_its_first_token_is_not_held_back(ttft_slo_s, tokens):
    """16 baseline steps of 12 ms: within 192 ms it is due. One whose promise is broken already presses nobody."""
    waiting = Req(branches=[(0, 0)], tokens=0, first_token_s=float("nan"), prefill={0: 200}, held={0})
    behind = serial(tokens=10, first_token_s=-7.6)
    due = make_view(behind, branching(2, tokens=41), replace(waiting, ttft_slo_s=ttft_slo_s))
    assert plan_of("taper", due).prefill_limit_tokens == tokens
    broken = make_view(behind, branching(2, tokens=41), replace(waiting, arrival_s=-1.0, ttft_slo_s=0.5))
    assert plan_of("taper", broken).prefill_limit_tokens == 200 // 16


def test_stock_policies_leave_prefill_to_the_engine():
    view = make_view(serial(), Req(branches=[(0, 0)], prefill={0: 500}, held={0}))
    for name in ("off", "cap:2", "eager", "taper-paper"):
        assert plan_of(name, view).prefill_limit_tokens is None


def test_held_branches_wait_for_kv_room():
    held = branching(6, tokens=1, held={2, 3, 4, 5}, prefill=dict.fromkeys(range(2, 6), 10))
    view = make_view(held, kv_free_tokens=25)
    plan = plan_of("taper", view)
    assert plan.run.tolist() == [True, True, True, True, False, False]


def test_least_advanced_branch_first_and_a_running_one_keeps_its_quantum():
    knobs = Knobs(quantum_tokens=16)
    behind = Req(branches=[(50, 20), (50, 3), (50, 20)])
    assert plan_of("off", make_view(behind), knobs=knobs).run.tolist() == [False, True, False]
    together = Req(branches=[(50, 5), (50, 3), (50, 4)], ran={0})
    assert plan_of("off", make_view(together), knobs=knobs).run.tolist() == [True, False, False]


def test_pinned_branches_run_whatever_the_policy():
    view = make_view(Req(branches=[(50, 0), (50, 90), (50, 99)], pinned={1, 2}), serial())
    plan = plan_of("off", view)
    assert plan.run.tolist() == [False, True, True, True]
    assert plan.protected.tolist() == plan.run.tolist()


def test_own_policies_can_be_plugged_in_but_not_shadow_a_built_in():
    class Mine:
        name = "mine"
        is_stock = False

    assert resolve("mine", {"mine": Mine}).name == "mine"
    assert resolve("off", {"off": Mine}).name == "off"


@pytest.mark.parametrize(
    "name", ["", "cap", "cap:", "cap:0", "cap:-1", "cap:x", "cap:1.5", "cap:²", "cap:1000000", "Taper"]
)
def test_unknown_policies_are_refused_with_what_exists(name):
    with pytest.raises(ConfigError, match=r"known: cap:N .*eager, off, taper, taper-paper"):
        resolve(name)

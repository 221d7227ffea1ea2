"""What docs/controller.md says of any batch: P1 liveness, P2 safety, P5 monotonicity, P8 neutrality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.core.latency import LinearLatency
from taper.core.policies import Guidance, resolve
from taper.core.types import Knobs
from tests.core.views import Req, make_view

POLICIES = ("off", "cap:2", "eager", "taper-paper", "taper")
laws = st.builds(
    LinearLatency,
    base_s=st.floats(1e-3, 0.05),
    row_s=st.floats(0, 2e-3),
    context_s=st.floats(0, 1e-6),
    prefill_s=st.floats(0, 1e-3),
    capture_sizes=st.sampled_from([(), (1, 2, 4, 8, 16, 24, 32)]),
)
requests = st.builds(
    Req,
    branches=st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 400)), min_size=1, max_size=12),
    tokens=st.integers(0, 2000),
    first_token_s=st.one_of(st.just(float("nan")), st.floats(0, 100)),
    arrival_s=st.floats(0, 100),
    tpot_slo_s=st.floats(0.005, 0.5),
    priority=st.sampled_from([0.0, 1.0]),
    held=st.sets(st.integers(1, 11)),
    ran=st.sets(st.integers(0, 11)),
    pinned=st.sets(st.integers(0, 11), max_size=2),
)
batches = st.lists(requests, min_size=1, max_size=12)
guidances = st.builds(
    Guidance,
    margin=st.floats(0, 0.3),
    mean_output_tokens=st.floats(0, 1000),
    floor_s=st.sampled_from([0.0, 0.03]),
)


def held_pay_prefill(batch: list[Req]) -> list[Req]:
    return [replace(r, prefill=dict.fromkeys(r.held, 7)) for r in batch]


@given(batches, laws, guidances, st.sampled_from(POLICIES), st.integers(0, 50))
def test_p1_every_request_always_has_a_row_and_pinned_branches_run(batch, law, guidance, policy, kv_free_tokens):
    view = make_view(*held_pay_prefill(batch), now_s=100.0, kv_free_tokens=kv_free_tokens)
    plan = resolve(policy)(view, law, Knobs(), guidance)
    widths = np.bincount(view.request[plan.run], minlength=len(batch))
    assert (widths >= 1).all()
    assert plan.run[view.pinned].all()
    assert plan.run[plan.protected].all()


@given(batches, laws, guidances)
def test_p2_the_step_fits_its_budget_or_is_the_baseline(batch, law, guidance):
    view = make_view(*held_pay_prefill(batch), now_s=100.0)
    for policy in ("taper", "taper-paper"):
        plan = resolve(policy)(view, law, Knobs(), guidance)
        assert plan.predicted_s <= plan.budget_s + 1e-12 or np.array_equal(plan.run, plan.protected)


@given(batches, laws, st.floats(0, 5))
def test_p5_more_slack_never_admits_fewer_rows(batch, law, bonus_s):
    """Slack grows for everybody by starting every clock `bonus_s` later; nobody is hopeless in either view."""
    batch = [replace(r, first_token_s=98.0 - i / 50) for i, r in enumerate(batch)]
    later = [replace(r, first_token_s=r.first_token_s + bonus_s) for r in batch]
    knobs = Knobs(lookahead_tokens=65536)
    guidance = Guidance(margin=0.02, mean_output_tokens=1e9)
    law = replace(law, base_s=1e-3, row_s=law.row_s / 100, context_s=law.context_s / 1000)
    rows = [
        int(resolve(p)(make_view(*b, now_s=100.0), law, knobs, guidance).run.sum())
        for p in ("taper", "taper-paper")
        for b in (batch, later)
    ]
    assert rows[0] <= rows[1]
    assert rows[2] <= rows[3]


@given(batches, laws, guidances)
def test_p5_priority_only_moves_rows_between_requests(batch, law, guidance):
    """With rows that cost the same, raising one priority changes who gets the extras and not how many there are."""
    law = replace(law, context_s=0.0)
    plain = [replace(r, priority=0.0, held=set()) for r in batch]
    raised = [replace(plain[0], priority=5.0), *plain[1:]]
    totals = []
    for b in (plain, raised):
        view = make_view(*b, now_s=100.0)
        plan = resolve("taper")(view, law, Knobs(), guidance)
        totals.append((int(plan.run.sum()), np.bincount(view.request[plan.run])[0]))
    assert totals[0][0] == totals[1][0]
    assert totals[0][1] <= totals[1][1]


@given(batches, laws, guidances, st.sampled_from(POLICIES))
def test_p8_without_branches_every_policy_runs_everything(batch, law, guidance, policy):
    view = make_view(*[replace(r, branches=r.branches[:1], held=set()) for r in batch], now_s=100.0)
    plan = resolve(policy)(view, law, Knobs(), guidance)
    assert plan.run.all()
    assert plan.externality_s == 0.0


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 4, 16]), st.sampled_from(["off", "taper"]))
def test_p1_every_branch_advances_within_live_quanta(branches, others, quantum, policy):
    """Even when slack never allows an extra: least advanced first, in quanta, gives each branch its turn."""
    law = LinearLatency(base_s=1.0, row_s=1e-3, context_s=0.0, prefill_s=0.0)
    progress = np.zeros(branches, dtype=int)
    idle = np.zeros(branches, dtype=int)
    ran: set[int] = set()
    for _ in range(4 * branches * quantum):
        crowd = [Req(branches=[(10, 0)], tokens=1, first_token_s=0.0) for _ in range(others)]
        mine = Req(branches=[(10, int(p)) for p in progress], tokens=int(progress.sum()) + 1, ran=ran)
        knobs, learned = Knobs(quantum_tokens=quantum), Guidance(margin=0, mean_output_tokens=1e6)
        plan = resolve(policy)(make_view(*crowd, mine), law, knobs, learned)
        run = plan.run[others:]
        progress += run
        idle = np.where(run, 0, idle + 1)
        ran = set(np.flatnonzero(run).tolist())
        assert idle.max() <= branches * quantum

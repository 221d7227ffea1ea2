"""The ablations by hand: one serial request and one with four branches, a = 10, b = 1, SLO 14 s per token."""

import numpy as np
import pytest

from taper.core.latency import LinearLatency
from taper.core.policies import Guidance, Policy, resolve
from taper.core.types import ConfigError, Knobs, StepView
from taper.sim.ablations import ABLATIONS, ConstantLatency
from taper.sim.run import policy_named

LAW = LinearLatency(base_s=10.0, row_s=1.0, context_s=0.0, prefill_s=1.0)
KNOBS = Knobs(margin=0.0)


def view(*, slo_s: float = 14.0, branches: int = 4, now_s: float = 0.0) -> StepView:
    """Both have one token, of this moment, so nobody has credit."""
    rows = 1 + branches
    return StepView(
        now_s=now_s,
        arrival_s=np.array([-2.0, -1.0]),
        first_token_s=np.array([now_s, now_s]),
        tokens=np.array([1, 1]),
        tpot_slo_s=np.array([slo_s, slo_s]),
        ttft_slo_s=np.array([99.0, 99.0]),
        priority=np.zeros(2),
        request=np.array([0] + [1] * branches),
        context_tokens=np.full(rows, 5),
        progress_tokens=np.ones(rows, dtype=np.int64),
        prefill_tokens=np.zeros(rows, dtype=np.int64),
        resident=np.ones(rows, dtype=np.bool_),
        ran_last=np.ones(rows, dtype=np.bool_),
        pinned=np.zeros(rows, dtype=np.bool_),
        kv_free_tokens=1000,
        max_prefill_tokens=100,
    )


def rows(policy: Policy, seen: StepView) -> int:
    guidance = Guidance(margin=0.0, mean_output_tokens=100.0)
    return int(policy(seen, LAW, KNOBS, guidance).run.sum())


def test_no_budget_runs_every_branch() -> None:
    assert rows(resolve("taper"), view(slo_s=12.5)) < 5
    assert rows(policy_named("taper:no-budget"), view(slo_s=12.5)) == 5


def test_no_replan_keeps_the_width_of_the_fork_until_the_join() -> None:
    policy = policy_named("taper:no-replan")
    narrow = rows(resolve("taper"), view(slo_s=13.0))
    assert narrow < rows(resolve("taper"), view(slo_s=20.0)) == 5
    assert rows(policy, view(slo_s=13.0)) == narrow
    assert rows(policy, view(slo_s=20.0)) == narrow  # there is room for all by now
    assert rows(policy, view(slo_s=20.0, branches=1)) == 2  # joined
    assert rows(policy, view(slo_s=20.0)) == 5  # forked again
    assert rows(policy, view(slo_s=13.0)) == 5
    assert rows(policy, view(slo_s=13.0, branches=3)) == 4  # one ended


def test_constant_predictor_runs_everything_or_nothing_more() -> None:
    policy = policy_named("taper:constant-predictor")
    assert rows(policy, view()) == 5  # nothing learned: a step is free
    assert {rows(policy, view(slo_s=slo_s)) for slo_s in np.linspace(9.0, 20.0, 23)} <= {2, 5}
    assert {rows(resolve("taper"), view(slo_s=slo_s)) for slo_s in np.linspace(9.0, 20.0, 23)} > {2, 5}


def test_constant_latency_prices_columns_and_numbers_alike() -> None:
    law = ConstantLatency(3.0)
    assert law.predict(1, 2, 3) == 3.0
    assert law.predict(np.array([1, 2]), np.array([0, 0]), np.array([0, 0])).tolist() == [3.0, 3.0]
    assert law.prefill_tokens_within(0.0) == np.inf


def test_names() -> None:
    assert sorted(ABLATIONS) == ["taper:constant-predictor", "taper:no-budget", "taper:no-replan"]
    for name in ("off", "cap:3", *ABLATIONS):
        assert policy_named(name).name == name
    with pytest.raises(ConfigError, match="unknown policy 'taper:no-brakes'"):
        policy_named("taper:no-brakes")

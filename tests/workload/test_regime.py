"""The operating points follow the law, and the chosen regime lies between off and eager."""

from __future__ import annotations

import pytest

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.workload.mix import Mix
from taper.workload.regime import Footprint, contended, operating_point

CPU = LinearLatency(base_s=0.014, row_s=0.0005, context_s=1.7e-6, prefill_s=0.00036)
GPU = LinearLatency(base_s=0.0112, row_s=0.0001, context_s=33e-9, prefill_s=55e-6)
NO_COST = Footprint(prompt_tokens=0.0, cached_tokens=0.0, branch_prefill_tokens=0.0)


def test_operating_points_by_hand() -> None:
    law = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0)
    mix = Mix(branching_share=0.5, fan_out=(4, 4), serial_tokens=(30, 30), branch_tokens=(10, 10))
    off = operating_point(law, mix, concurrency=7, width=1, footprint=NO_COST)
    assert (off.rows, off.step_s) == pytest.approx((7, 0.017))
    # eager: a branching request is in service for 10 steps against 30, so a quarter of the 7 branch four ways
    eager = operating_point(law, mix, concurrency=7, width=float("inf"), footprint=NO_COST)
    assert eager.rows == pytest.approx(7 * (0.75 + 4 * 0.25))
    assert eager.step_s == pytest.approx(0.010 + 0.001 * eager.rows)
    assert eager.tok_s == pytest.approx(eager.rows / eager.step_s)
    # prefill: one request of 20 tokens starts per 35 tokens out
    priced = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0005)
    footprint = Footprint(prompt_tokens=20.0, cached_tokens=0.0, branch_prefill_tokens=0.0)
    step_s = operating_point(priced, mix, concurrency=7, width=1, footprint=footprint).step_s
    assert step_s == pytest.approx(0.017 + 0.0005 * 20 * 7 / 35)


@pytest.mark.parametrize("law", [CPU, GPU])
@pytest.mark.parametrize("slo_between", [0.2, 0.5, 0.8])
def test_the_slo_lies_between_off_and_eager(law: LinearLatency, slo_between: float) -> None:
    regime = contended(law, slo_between=slo_between)
    off = operating_point(law, regime.mix, concurrency=regime.max_concurrency, width=1)
    eager = operating_point(law, regime.mix, concurrency=regime.max_concurrency, width=float("inf"))
    at = (regime.slo.tpot_s - off.step_s) / (eager.step_s - off.step_s)
    assert at == pytest.approx(slo_between, abs=0.02)


def test_offered_load_is_above_what_off_can_serve() -> None:
    regime = contended(CPU, load=1.0)
    off = operating_point(CPU, regime.mix, concurrency=regime.max_concurrency, width=1)
    assert regime.rate_rps * regime.mix.mean_tokens > 1.2 * off.tok_s
    assert contended(CPU, load=2.0).rate_rps == pytest.approx(2 * regime.rate_rps, rel=1e-3)


def test_a_slower_machine_gets_a_looser_slo_and_less_load() -> None:
    slow = CPU.corrected(scale=2.0, prefill_scale=1.0)
    fast, loose = (contended(law, longest_s=1e3) for law in (CPU, slow))
    assert loose.slo.tpot_s == pytest.approx(2 * fast.slo.tpot_s, rel=0.01)
    assert loose.rate_rps == pytest.approx(fast.rate_rps / 2, rel=0.01)


def test_lengths_shrink_where_a_branching_request_would_outlast_the_window() -> None:
    mix = Mix(serial_tokens=(80, 120), fan_out=(4, 16), branch_tokens=(48, 72))
    slow = CPU.corrected(scale=4.0, prefill_scale=1.0)
    regime = contended(slow, mix=mix, longest_s=15.0)
    off = operating_point(slow, regime.mix, concurrency=regime.max_concurrency, width=1)
    assert regime.mix.mean_fan_out * regime.mix.mean_branch_tokens * off.step_s == pytest.approx(15.0, rel=0.2)
    ratio = regime.mix.mean_serial_tokens / regime.mix.mean_branch_tokens
    assert ratio == pytest.approx(100 / 60, rel=0.05)
    assert contended(CPU, mix=mix, longest_s=1e3).mix == mix


def test_free_rows_leave_nothing_to_regulate() -> None:
    free = LinearLatency(base_s=0.01, row_s=0.0, context_s=0.0, prefill_s=0.0)
    with pytest.raises(ConfigError, match="prices rows at zero"):
        contended(free)
    with pytest.raises(ConfigError, match="no branches worth regulating"):
        contended(CPU, mix=Mix(branching_share=0.0))

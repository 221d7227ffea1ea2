"""The operating points follow the law, and the chosen regime lies between off and eager."""

from __future__ import annotations

import pytest

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.workload import Branching, Lengths, Mix, Synthetic, contended
from taper.workload.regime import Footprint, Regime, operating_point, output_factor, tok_s_at

CPU = LinearLatency(base_s=0.014, row_s=0.0005, context_s=1.7e-6, prefill_s=0.00036)
GPU = LinearLatency(base_s=0.0112, row_s=0.0001, context_s=33e-9, prefill_s=55e-6)
NO_COST = Footprint(template_tokens=0.0, branch_prefill_tokens=0.0)
SOURCE = Synthetic(
    mix=Mix(
        branching_share=0.5,
        prompt=Lengths(low=20, high=20),
        serial=Lengths(low=30, high=30),
        branching=Branching(
            at_arrival=True, equal=True, fanout=Lengths(low=4, high=4), branch=Lengths(low=10, high=10)
        ),
    )
)


def test_operating_points_by_hand() -> None:
    law = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0)
    demand = SOURCE.demand()
    off = operating_point(law, demand, concurrency=7, eager=False, footprint=NO_COST)
    assert (off.rows, off.step_s) == pytest.approx((7, 0.017))
    # eager: a branching request is in service for 10 steps against 30, so a quarter of the 7 branch four ways
    eager = operating_point(law, demand, concurrency=7, eager=True, footprint=NO_COST)
    assert eager.rows == pytest.approx(7 * (0.75 + 4 * 0.25))
    assert eager.step_s == pytest.approx(0.010 + 0.001 * eager.rows)
    assert eager.tok_s == pytest.approx(eager.rows / eager.step_s)
    # prefill: one request of 20 prompt tokens starts per 35 tokens out
    priced = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0005)
    step_s = operating_point(priced, demand, concurrency=7, eager=False, footprint=NO_COST).step_s
    assert step_s == pytest.approx(0.017 + 0.0005 * 20 * 7 / 35)


def test_throughput_at_an_slo_stays_between_off_and_eager() -> None:
    law = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0)
    off, eager = (
        operating_point(law, SOURCE.demand(), concurrency=7, eager=wide, footprint=NO_COST) for wide in (False, True)
    )
    assert tok_s_at(0.005, off, eager) == off.tok_s
    assert tok_s_at(0.020, off, eager) == pytest.approx(10 / 0.020)
    assert tok_s_at(0.5, off, eager) == pytest.approx(eager.tok_s)


def points(law: LinearLatency, regime: Regime) -> tuple[float, float]:
    demand = regime.source.demand()
    off, eager = (
        operating_point(law, demand, concurrency=regime.max_concurrency, eager=wide) for wide in (False, True)
    )
    return off.step_s, eager.step_s


@pytest.mark.parametrize("law", [CPU, GPU])
@pytest.mark.parametrize("slo_between", [0.2, 0.5, 0.8])
def test_the_slo_lies_between_off_and_eager(law: LinearLatency, slo_between: float) -> None:
    regime = contended(law, slo_between=slo_between)
    off_s, eager_s = points(law, regime)
    assert (regime.slo.tpot_s - off_s) / (eager_s - off_s) == pytest.approx(slo_between, abs=0.02)


def test_load_slo_and_concurrency_can_be_given() -> None:
    one = contended(CPU, load=1.0)
    assert contended(CPU, load=2.0).rate_rps == pytest.approx(2 * one.rate_rps, rel=1e-3)
    given = contended(CPU, rate_rps=3.5, tpot_slo_s=0.040, concurrency=11, ttft_slo_s=2.0)
    assert (given.rate_rps, given.slo.tpot_s, given.max_concurrency, given.slo.ttft_s) == (3.5, 0.040, 11, 2.0)


def test_offered_load_is_above_what_off_can_serve() -> None:
    regime = contended(CPU, load=1.0)
    demand = regime.source.demand()
    off = operating_point(CPU, demand, concurrency=regime.max_concurrency, eager=False)
    assert regime.rate_rps * demand.tokens > 1.2 * off.tok_s


def test_a_slower_machine_gets_a_looser_slo_and_less_load() -> None:
    slow = CPU.corrected(scale=2.0, prefill_scale=1.0)
    fast, loose = (contended(law, longest_s=None) for law in (CPU, slow))
    assert loose.slo.tpot_s == pytest.approx(2 * fast.slo.tpot_s, rel=0.01)
    assert loose.rate_rps == pytest.approx(fast.rate_rps / 2, rel=0.01)


def test_outputs_shrink_where_a_request_would_outlast_the_window() -> None:
    slow = CPU.corrected(scale=4.0, prefill_scale=1.0)
    regime = contended(slow, longest_s=8.0)
    off_s, _ = points(slow, regime)
    assert regime.source.demand().off_steps * off_s == pytest.approx(8.0, rel=0.15)
    assert contended(CPU, longest_s=1e3).source == Synthetic()


def test_free_rows_leave_nothing_to_regulate() -> None:
    free = LinearLatency(base_s=0.01, row_s=0.0, context_s=0.0, prefill_s=0.0)
    with pytest.raises(ConfigError, match="prices rows at zero"):
        contended(free)
    with pytest.raises(ConfigError, match="no branches worth regulating"):
        contended(CPU, source=Synthetic(mix=Mix(branching_share=0.0)))


def test_dear_prompts_do_not_shrink_outputs() -> None:
    dear = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.1)
    # 35 tokens in steps of 17 ms at 7 rows: 0.6 s, whatever the prompts cost
    assert output_factor(SOURCE, dear, concurrency=7, longest_s=0.6) == 1.0
    assert output_factor(SOURCE, dear, concurrency=7, longest_s=0.3) == pytest.approx(0.5, rel=0.1)

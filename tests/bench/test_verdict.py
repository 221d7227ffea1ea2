"""Targets and regime, judged on numbers chosen by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from taper.bench.result import over_rounds, ratio_over_rounds
from taper.bench.table import cell
from taper.bench.verdict import judge
from taper.core.types import Slo
from taper.goodput import Spread, Window, summarize
from taper.results import Conditions, EngineStats, Run

EMPTY = summarize([], Window(start_s=0.0, end_s=1.0))
SLO = Slo(tpot_s=0.03)


def run(policy: str, round_: int, goodput: float, attainment: float, step_s: float) -> Run:
    return Run(
        conditions=Conditions(policy=policy, round=round_),
        summary=replace(EMPTY, goodput_tok_s=goodput, attainment=attainment),
        engine=EngineStats(step_mean_s=step_s, fallbacks=0, foreign_cpu=0.01, client_cpu=0.05),
    )


GOOD = [
    run("off", 0, 100.0, 1.0, 0.02),
    run("off", 1, 200.0, 1.0, 0.02),
    run("eager", 0, 120.0, 0.5, 0.04),
    run("eager", 1, 250.0, 0.6, 0.04),
    run("taper", 0, 150.0, 0.97, 0.029),
    run("taper", 1, 260.0, 0.99, 0.029),
]


def test_ratios_are_taken_within_rounds() -> None:
    ratio = ratio_over_rounds(GOOD, "goodput_tok_s", "taper", "off")
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.3, 1.4, 1.5))
    goodput = over_rounds(GOOD, "off", "goodput_tok_s")
    assert goodput is not None
    assert goodput.median == 150.0


def test_everything_reached() -> None:
    verdict = judge(GOOD, SLO)
    assert verdict.contended
    assert verdict.reached
    assert [target.got for target in verdict.targets] == pytest.approx([0.98, 0.55, 1.4, 1.145])
    assert verdict.notes == ()


def test_a_missed_target_is_said() -> None:
    worse = [replace(one, summary=replace(one.summary, attainment=0.94)) for one in GOOD]
    verdict = judge(worse, SLO)
    assert not verdict.reached
    assert [target.reached for target in verdict.targets] == [False, False, True, True]


def test_an_slo_outside_the_two_steps_is_no_contention() -> None:
    for slo_s, word in ((0.05, "NOT contended"), (0.015, "OUT OF REACH")):
        verdict = judge(GOOD, Slo(tpot_s=slo_s))
        assert not verdict.contended
        assert not verdict.reached
        assert word in verdict.regime_line


def test_without_off_and_eager_the_regime_cannot_be_told() -> None:
    verdict = judge([one for one in GOOD if one.policy == "taper"], SLO)
    assert not verdict.contended
    assert [target.name for target in verdict.targets] == ["taper's attainment"]


def test_disturbances_are_noted() -> None:
    errors = replace(
        GOOD[0],
        summary=replace(GOOD[0].summary, misses_error=2),
        engine=replace(GOOD[0].engine, fallbacks=4, foreign_cpu=0.3),
    )
    notes = judge([errors, *GOOD[1:]], SLO).notes
    assert len(notes) == 3
    assert "2 requests failed" in notes[0]
    assert "4 steps" in notes[1]
    assert "off in round 1" in notes[2]


def test_cells() -> None:
    value = Spread(median=0.0312, low=0.03, high=0.04, q1=0.03, q3=0.04, n=3)
    assert cell(value, 1e3, 1) == "31.2 (30.0-40.0)"
    assert cell(replace(value, n=1), 1e3, 1) == "31.2"
    assert cell(None, 1, 0) == "-"

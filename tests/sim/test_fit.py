"""Records of the simulator's own making, with known numbers behind them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from taper.core.types import ConfigError, StepLoad
from taper.records import ChoiceRecord, RequestRecord, StepRecord
from taper.sim.cost import Disturbance, StepCost
from taper.sim.fit import fitted
from taper.sim.hardware import Hardware

TRUE = Hardware(
    name="m", base_s=20e-3, row_s=0.5e-3, context_s=2e-6, prefill_s=0.4e-3, planner_s=0.6e-3,
    turnaround_s=9e-3, noise=0.15, slow_share=0.6, slow_steps=10.0, kv_tokens=1234,
)  # fmt: skip
LIKE = Hardware(name="m", base_s=1.0, row_s=0.0, context_s=0.0, prefill_s=0.0, kv_tokens=1234)
OUT_S, IN_S = 4e-3, 5e-3


def steps(count: int, *, ending: str = "clean") -> list[StepRecord]:
    rng = np.random.default_rng(0)
    cost = StepCost(TRUE, Disturbance(), duration_s=1.0, seed=0)
    records, now_s = [], 100.0
    for number in range(count):
        rows = int(rng.integers(1, 40))
        load = StepLoad(
            rows=rows, context_tokens=rows * int(rng.integers(20, 400)), prefill_tokens=int(rng.integers(0, 2)) * 30
        )
        planner_s = 0.6e-3 * (number % 2)
        measured_s = cost.seconds(load, 0.0) + planner_s
        records.append(
            StepRecord(
                step=number, time_s=now_s, policy="taper", rows=load.rows, context_tokens=load.context_tokens,
                prefill_tokens=load.prefill_tokens, groups=1, protected=1, extra=0, deferred=0, held=0, baseline_s=None,
                predicted_s=None, budget_s=None, slack_min_s=None, measured_s=measured_s, ending=ending,
                planner_s=planner_s, window="w",
            )
        )  # fmt: skip
        now_s += measured_s
    return records


def request(records: list[StepRecord]) -> RequestRecord:
    """Sent to an idle engine, answered after the last step."""
    end_s = records[-1].time_s + (records[-1].measured_s or 0.0)
    choice = ChoiceRecord(index=0, tokens=9, first_token_s=101.0, last_token_s=end_s + OUT_S)
    return RequestRecord(
        id="r", policy="taper", round=0, seed=0, index=0, kind="serial", branches=1, prompt_tokens=5,
        scheduled_s=99.0, sent_s=records[0].time_s - IN_S, ended_s=end_s + OUT_S, tpot_slo_s=1.0, choices=(choice,),
        window="w",
    )  # fmt: skip


def test_a_machine_is_found_again() -> None:
    records = steps(20_000)
    found = fitted(records, [request(records)], LIKE)
    for name in ("base_s", "row_s", "context_s", "prefill_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.06), name
    for name in ("planner_s", "turnaround_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert found.noise == pytest.approx(TRUE.noise, rel=0.05)
    assert found.slow_share == pytest.approx(TRUE.slow_share, abs=0.1)
    assert found.slow_steps == pytest.approx(TRUE.slow_steps, rel=0.3)
    assert (found.name, found.kv_tokens) == (LIKE.name, 1234)
    assert fitted(records, [], LIKE).turnaround_s == 0.0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="999 clean steps, fewer than 1000: run taper bench with --steps"):
        fitted(steps(999), [], LIKE)
    with pytest.raises(ConfigError, match="0 clean steps"):
        fitted(steps(1500, ending="ignored"), [], LIKE)
    with pytest.raises(ConfigError, match="no window has more than 10 clean steps"):
        fitted([replace(one, window=str(one.step // 5)) for one in steps(1500)], [], LIKE)

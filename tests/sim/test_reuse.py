"""What the loop saves: decisions it need not ask for. The runs must come out the same without."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from taper.core.controller import Controller
from taper.core.types import Knobs
from taper.sim.cost import Disturbance, StepCost
from taper.sim.hardware import hardware
from taper.sim.loop import Engine, Simulation
from taper.sim.run import policy_named
from taper.sim.scenario import load, settle
from taper.sim.trace import Trace

MACHINE = replace(hardware("a100x8-qwen3-32b"), kv_tokens=40_000)
NAMES = ("records", "end_s", "rows", "deferred", "emitted", "followed", "gap_s", "gap_step", "preemptions")


def run(policy: str, *, requests: int = 24, **options: Any) -> Trace:
    spec = replace(load("saturated"), duration_steps=400, duration_s=None)
    setting = settle(spec, MACHINE)
    simulation = Simulation(
        controller=Controller(latency=MACHINE.predictor(), policy=policy_named(policy), knobs=Knobs()),
        machine=MACHINE,
        cost=StepCost(MACHINE, Disturbance(), duration_s=setting.duration_s, seed=0),
        engine=Engine(max_requests=requests),
        slo=setting.slo,
        requests=spec.source_on(MACHINE).requests(seed=0, rate_rps=setting.rate_per_s, horizon_s=setting.duration_s),
        duration_s=setting.duration_s,
        **options,
    )
    return simulation.run()


@pytest.mark.parametrize("policy", ["off", "cap:2", "cap:5", "eager", "taper-paper", "taper", "taper:no-replan"])
def test_kept_decisions_change_nothing(policy: str) -> None:
    kept, asked = run(policy), run(policy, reuse=False)
    assert kept.decisions < asked.decisions == len(asked.end_s)
    assert [getattr(kept, name) for name in NAMES] == [getattr(asked, name) for name in NAMES]


def test_a_held_decision_is_an_approximation_close_to_the_exact_run() -> None:
    exact, held = (run("taper", requests=64, hold_steps=steps) for steps in (1, 4))
    assert held.decisions < 0.7 * exact.decisions
    assert held.end_s != exact.end_s
    tokens = [sum(np.array(trace.emitted)[np.array(trace.end_s) < 9.0]) for trace in (exact, held)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.02)


def test_holding_is_nothing_to_policies_that_are_kept_anyway() -> None:
    assert run("cap:2", hold_steps=8).end_s == run("cap:2").end_s

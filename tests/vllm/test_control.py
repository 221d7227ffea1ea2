"""Reading and changing a running engine."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from taper.engines.vllm import control
from tests.vllm.harness import PROFILE, fork, make_stock, request, server_config


def engine(driver):
    """What the EngineCore methods see."""
    return SimpleNamespace(scheduler=driver.scheduler)


def test_snapshot_is_plain_json(make):
    driver = make(config=server_config(policy="cap:2"))
    assert control.snapshot(driver.taper)["step"] is None
    driver.add(*fork("p", 5), request("s"))
    for _ in range(6):
        driver.step()
    state = control.snapshot(driver.taper)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert state["schema"] == "taper.state/1"
    assert state["policy"] == "cap:2"
    assert state["seams"]["ok"] is True
    assert state["tables"] == {"groups": 2, "branches": 6, "pending_steps": len(driver.in_flight)}
    assert state["totals"] == {"steps": 6, "fallbacks": 0, "rejected_claims": 0}
    assert {key: state["step"][key] for key in ("rows", "protected", "extra", "held", "groups")} == {
        "rows": 3,
        "protected": 2,
        "extra": 1,
        "held": 3,
        "groups": 2,
    }
    assert 0 < state["kv_usage"] < 1


def test_configure_takes_effect_and_opens_a_window(make):
    driver = make()
    driver.add(request("claims", xargs={"taper_tpot_slo_ms": 80}), request("none"))
    driver.step()
    patch = {"policy": "off", "tpot_slo_s": 0.07, "ttft_slo_s": 2.0, "knobs": {"rho": 0.5}}
    state = control.configure(driver.taper, patch)
    assert (state["policy"], state["tpot_slo_s"], state["ttft_slo_s"]) == ("off", 0.07, 2.0)
    assert state["window"]["steps"] == 0
    assert driver.taper.controller.knobs.rho == 0.5
    assert driver.taper.table.columns.tpot_slo_s.tolist() == [0.08, 0.07]
    assert control.configure(driver.taper, {})["policy"] == "off"


def test_profiles_come_and_go(make):
    driver = make(config=server_config(profile=None))
    assert control.snapshot(driver.taper)["profile"] == "none"
    assert driver.taper.controller.learning
    assert "tiny" in control.configure(driver.taper, {"profile": PROFILE})["profile"]
    assert not driver.taper.controller.learning
    assert driver.taper.controller.latency.base_s == 0.01
    assert control.configure(driver.taper, {"profile": None})["profile"] == "none"
    assert driver.taper.controller.learning


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"policy": "nope"}, "unknown policy 'nope'"),
        ({"policy": 3}, "policy must be a string"),
        ({"policy": "off", "tpot_slo_s": 0}, "tpot_s must be between"),
        ({"tpot_slo_s": float("nan")}, "tpot_s must be between"),
        ({"ttft_slo_s": "1"}, "ttft_s must be a number"),
        ({"policy": "off", "knobs": {"bogus": 1}}, "unknown key 'bogus' in knobs"),
        ({"knobs": {"rho": 7}}, "rho must be between"),
        ({"knobs": 5}, "knobs must be a JSON object"),
        ({"policy": "off", "profile": {"schema": "x"}}, "profile"),
        ({"slo": 1}, "unknown key 'slo'"),
        ([], "patch must be a JSON object"),
    ],
)
def test_a_bad_patch_changes_nothing(make, patch, words):
    driver = make()
    driver.add(request("a"))
    driver.step()
    before = control.snapshot(driver.taper)
    window, controller = driver.taper.window, driver.taper.controller
    knobs, latency, policy = controller.knobs, controller.latency, controller.policy
    answer = control.configure(driver.taper, patch)
    assert set(answer) == {"error"}
    assert words in answer["error"]
    assert "\n" not in answer["error"]
    assert driver.taper.window is window
    assert (controller.knobs, controller.latency, controller.policy) == (knobs, latency, policy)
    assert control.snapshot(driver.taper) == before


def test_draining_empties_the_ring(make):
    driver = make(config=server_config(record_steps=8))
    driver.add(request("a", tokens=30))
    driver.run()
    records = control.drain_steps(driver.taper)
    assert [record["step"] for record in records] == list(range(23, 31))
    assert set(records[0]) == {
        "step",
        "time_s",
        "policy",
        "rows",
        "context_tokens",
        "prefill_tokens",
        "groups",
        "protected",
        "extra",
        "deferred",
        "held",
        "baseline_s",
        "predicted_s",
        "budget_s",
        "slack_min_s",
        "measured_s",
        "ending",
        "planner_s",
    }
    assert control.drain_steps(driver.taper) == []


def test_engine_core_methods(make, tmp_path, is_async):
    class EngineCore(SimpleNamespace):
        pass

    control.install(EngineCore)
    control.install(EngineCore)
    ours, stock = EngineCore(scheduler=make().scheduler), EngineCore(scheduler=make_stock(tmp_path, is_async=is_async))
    assert ours.taper_snapshot()["policy"] == "taper"
    assert ours.taper_configure({"policy": "eager"})["policy"] == "eager"
    assert ours.taper_drain_steps() == []
    assert "--scheduler-cls" in stock.taper_snapshot()["error"]
    assert "--scheduler-cls" in stock.taper_configure({})["error"]
    assert stock.taper_drain_steps() == []


def test_the_general_plugin_installs_on_vllms_own_class():
    from vllm.v1.engine.core import EngineCore

    from taper import vllm_plugin

    vllm_plugin.install()
    assert EngineCore.taper_snapshot is control.taper_snapshot
    assert vllm_plugin.endpoints().name == "taper"

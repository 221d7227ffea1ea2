"""Calibration over HTTP, against a machine whose law is known."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from taper.cli import cli
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.engines.vllm.calibrate import calibrate, engine_key
from taper.engines.vllm.launch import ServerError
from taper.engines.vllm.report import calibration_report
from taper.profile import ProfileKey, load_profile
from tests.serve.engine import FACTS, KEY, TOKEN, Machine, serving

LAW = LinearLatency(base_s=0.014, row_s=5e-4, context_s=1.7e-6, prefill_s=3.6e-4)
HEADERS = {"X-Taper-Control": TOKEN}
BUDGET_S = 2.0


def coefficients(law: LinearLatency) -> list[float]:
    return [law.base_s, law.row_s, law.context_s, law.prefill_s]


def test_the_law_of_the_machine_is_found_and_put_in_force() -> None:
    machine = Machine(LAW)
    said: list[str] = []
    with serving(machine) as url:
        done = calibrate(url, HEADERS, budget_s=4 * BUDGET_S, progress=said.append)
    assert coefficients(done.fit.latency) == pytest.approx(coefficients(LAW), rel=1e-6)
    assert done.fit.heldout_mape == pytest.approx(0.0, abs=1e-6)
    assert done.profile.key == ProfileKey(**KEY)
    assert done.profile.fit["heldout_mape"] == done.fit.heldout_mape
    assert coefficients(done.profile.latency()) == coefficients(done.fit.latency)
    assert machine.profile == done.profile.to_json()
    assert machine.policy == "taper"
    assert re.fullmatch(r"calibrating: rows 1-\d+, contexts up to \d+", said[0])


def test_no_client_is_served_eagerly_meanwhile() -> None:
    machine = Machine(LAW, policy="eager")
    with serving(machine) as url:
        calibrate(url, HEADERS, budget_s=0.5, apply=False)
    assert set(machine.policies_seen) == {"off"}
    assert machine.policy == "eager"
    assert machine.profile is None


def test_slow_machines_are_asked_for_fewer_rows() -> None:
    slow = LinearLatency(base_s=0.1, row_s=0.01, context_s=1e-6, prefill_s=3e-3)
    said: list[str] = []
    with serving(Machine(slow)) as url:
        calibrate(url, HEADERS, budget_s=BUDGET_S, progress=said.append)
    assert said[0].startswith("calibrating: rows 1-12,")


def test_the_policy_is_put_back_when_the_server_fails() -> None:
    machine = Machine(LAW, policy="cap:2", fail_completions=True)
    with serving(machine) as url, pytest.raises(ServerError, match="HTTP 500: out of luck"):
        calibrate(url, HEADERS, budget_s=BUDGET_S)
    assert machine.policy == "cap:2"


def test_without_the_right_to_control_nothing_happens() -> None:
    machine = Machine(LAW)
    with serving(machine) as url, pytest.raises(ServerError, match="HTTP 403: needs the control token"):
        calibrate(url, {}, budget_s=BUDGET_S)
    assert machine.policies_seen == []


def test_an_engine_without_room_is_refused_and_left_as_it_was() -> None:
    machine = Machine(LAW, facts={**FACTS, "kv_tokens": 100})
    with serving(machine) as url, pytest.raises(ConfigError, match="no room to calibrate"):
        calibrate(url, HEADERS, budget_s=BUDGET_S)
    assert machine.policy == "taper"


def test_a_server_that_does_not_say_what_it_is() -> None:
    with pytest.raises(ServerError, match="says nothing about the engine"):
        engine_key({"engines": [{}]})


def test_the_report_shows_coefficients_and_errors() -> None:
    with serving(Machine(LAW)) as url:
        done = calibrate(url, HEADERS, budget_s=BUDGET_S)
    text = io.StringIO()
    Console(file=text, width=140).print(calibration_report(done.fit, done.samples))
    for words in ("14.000", "0.5000", "1.7000", "held-out MAPE", "noise floor", "median residual"):
        assert words in text.getvalue()


def test_the_command_calibrates_a_running_server(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with serving(Machine(LAW)) as url:
        result = CliRunner().invoke(
            cli,
            [
                *("calibrate", "--taper-url", f"{url}/", "--taper-token", TOKEN),
                *("--taper-budget-s", "5", "--taper-output", str(path)),
            ],
        )
    assert result.exit_code == 0, result.output
    assert coefficients(load_profile(path).latency()) == pytest.approx(coefficients(LAW), rel=1e-6)
    assert f"profile: {path}" in result.stdout

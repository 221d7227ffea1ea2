"""How a starting server comes by its profile, and what becomes of signals."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from taper.config import ServerConfig
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError, Knobs
from taper.engines.vllm import command, report
from taper.engines.vllm.launch import Server
from taper.engines.vllm.supervise import (
    ServeOptions,
    _exit_status,
    _forwarded_signals,
    check_profile_file,
    obtain_profile,
)
from taper.profile import Profile, ProfileKey, load_profile, profile_path, save_profile
from tests.serve.engine import FACTS, KEY, TOKEN, Machine, serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(command.vllm_distribution() is None, reason="needs vLLM"),
]

LAW = LinearLatency(base_s=0.014, row_s=5e-4, context_s=1.7e-6, prefill_s=3.6e-4)
HERE = ProfileKey(**KEY)
ELSEWHERE = replace(HERE, device="H200")
COEFFICIENTS = {"base_s": 0.5, "row_s": 0.25, "context_s": 0.125, "prefill_s": 0.0625}
BUDGET_S = 2.0


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPER_CACHE_DIR", str(tmp_path / "cache"))


def attached(url: str) -> Server:
    """A server object whose child is the stand-in machine."""
    server = Server("m", config=ServerConfig(control_token=TOKEN))
    server.url = url
    return server


def test_the_first_start_calibrates_and_the_second_finds_the_profile() -> None:
    machine, said = Machine(LAW), []
    with serving(machine) as url:
        made, how = obtain_profile(attached(url), budget_s=BUDGET_S, progress=said.append)
        assert made is not None
        assert said[0] == f"no profile for {HERE}; calibrating for about 2 s"
        assert how.startswith("calibrated in ")
        assert str(profile_path(HERE)) in how
        assert load_profile(profile_path(HERE)) == made
        steps = len(machine.policies_seen)
        machine.profile = None
        machine.policies_seen.clear()
        found, how = obtain_profile(attached(url), budget_s=BUDGET_S)
    assert found == made
    assert how == f"cached, made {made.created}, {report.error_line(made.fit)}"
    assert machine.profile == made.to_json()
    assert 0 < len(machine.policies_seen) < 60 < steps  # a spot check, not a calibration


def test_a_broken_profile_in_the_cache_is_replaced() -> None:
    path = profile_path(HERE)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    said: list[str] = []
    with serving(Machine(LAW)) as url:
        made, _ = obtain_profile(attached(url), budget_s=BUDGET_S, progress=said.append)
    assert "truncated" in said[0]
    assert said[0].endswith("(it is replaced)")
    assert load_profile(path) == made


@pytest.mark.parametrize(("slower", "kept"), [(1.6, True), (0.6, True), (3.0, False), (0.2, False)])
def test_a_cached_profile_is_kept_only_while_the_machine_bears_it_out(slower: float, kept: bool) -> None:
    with serving(Machine(LAW)) as url:
        first, _ = obtain_profile(attached(url), budget_s=BUDGET_S)
    said: list[str] = []
    changed = Machine(LAW.corrected(scale=slower, prefill_scale=1.0), policy="cap:3")
    with serving(changed) as url:
        second, _ = obtain_profile(attached(url), budget_s=BUDGET_S, progress=said.append)
    assert (second == first) is kept
    assert changed.policy == "cap:3"
    if not kept:
        assert said[0].endswith(f"is off: steps take {slower:.2f} times what it says")


def test_an_engine_that_cannot_be_calibrated_learns_online() -> None:
    machine = Machine(LAW, facts={**FACTS, "kv_tokens": 100})
    with serving(machine) as url:
        profile, how = obtain_profile(attached(url), budget_s=BUDGET_S)
    assert profile is None
    assert how.startswith("none, learning online at width 2: no room to calibrate")
    assert machine.policy == "taper"


def test_a_profile_that_cannot_be_kept_is_in_force_all_the_same() -> None:
    profile_path(HERE).parent.parent.mkdir(parents=True, exist_ok=True)
    profile_path(HERE).parent.write_text("a file, where the folder of profiles should be")
    machine = Machine(LAW)
    with serving(machine) as url:
        profile, how = obtain_profile(attached(url), budget_s=BUDGET_S)
    assert profile is not None
    assert machine.profile == profile.to_json()
    assert "; not kept: " in how


def test_skip_measures_nothing() -> None:
    machine = Machine(LAW)
    with serving(machine) as url:
        profile, how = obtain_profile(attached(url), "skip")
    assert profile is None
    assert how.startswith("none: at most two branches per request")
    assert machine.profile is None
    assert machine.policies_seen == []


def test_a_file_the_user_names(tmp_path: Path) -> None:
    machine = Machine(LAW)
    path = save_profile(Profile(key=HERE, coefficients=COEFFICIENTS), tmp_path / "p.json")
    with serving(machine) as url:
        profile, how = obtain_profile(attached(url), str(path))
    assert profile is not None
    assert machine.profile == profile.to_json()
    assert how.startswith(f"from {path}")


def test_a_foreign_file_is_refused_and_the_engine_left_alone(tmp_path: Path) -> None:
    machine = Machine(LAW)
    path = save_profile(Profile(key=ELSEWHERE, coefficients=COEFFICIENTS), tmp_path / "p.json")
    with serving(machine) as url, pytest.raises(ConfigError, match=r"on H200.*on toy x1"):
        obtain_profile(attached(url), str(path))
    assert machine.profile is None


def test_what_is_plainly_foreign_is_refused_before_the_start(tmp_path: Path) -> None:
    path = str(save_profile(Profile(key=HERE, coefficients=COEFFICIENTS), tmp_path / "p.json"))
    with pytest.raises(ConfigError, match="this server's model is other"):
        check_profile_file(ServeOptions(model="other", embedded=False, profile=path))
    for free in ("auto", "skip"):
        check_profile_file(ServeOptions(model="other", embedded=False, profile=free))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_signals_go_to_the_server_and_handlers_come_back(tmp_path: Path, sent: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    server = Server("m", log=tmp_path / "log")
    server.argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    server.start()
    with _forwarded_signals(server) as came:
        os.kill(os.getpid(), sent)
        assert server.stop() == -signal.SIGTERM
    assert came == [sent]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("returncode", "status"), [(0, 0), (3, 3), (-15, 143), (-9, 137), (None, 1)])
def test_exit_status(returncode: int | None, status: int) -> None:
    assert _exit_status(returncode) == status


def test_the_line_for_a_plain_server_switches_everything_on() -> None:
    config = ServerConfig(policy="cap:2", knobs=Knobs(margin=0.05))
    settings = '{"policy": "cap:2", "slo": {"tpot_s": 0.05, "ttft_s": 5.0}, "knobs": {"margin": 0.05}}'
    with_cli = report.plain_line(["-m", "vllm.entrypoints.cli.main", "serve", "org/model", "--x"], config)
    assert with_cli == f"TAPER_CONFIG='{settings}' VLLM_PLUGINS=taper vllm serve org/model --x"
    without = report.plain_line(["-m", "vllm.some.server", "--model", "org/model"], config)
    assert without.endswith("VLLM_PLUGINS=taper python -m vllm.some.server --model org/model")

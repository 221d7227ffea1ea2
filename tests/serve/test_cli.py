"""The command line: every refusal is one line on stderr and exit status 2, before any engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from taper import __version__
from taper.cli import PASS_THROUGH, _config, _model_and_flags, cli
from taper.core.types import Knobs, Slo
from taper.profile import Profile, ProfileKey, save_profile

KEY = ProfileKey(model="another", dtype="bfloat16", device="cpu x2", parallel="tp1-pp1-dp1", vllm="0.32.0")
LAW = {"base_s": 0.014, "row_s": 5e-4, "context_s": 1.7e-6, "prefill_s": 3.6e-4}


def refusal(*args: str) -> str:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("taper: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--taper-policy", "nope"], "unknown policy 'nope'; known: cap:N (N from 1 to 999999), eager, off"),
        (["--taper-policy", "cap:0"], "unknown policy 'cap:0'"),
        (["--taper-tpot-slo-ms", "0"], "--taper-tpot-slo-ms must be between 0.1 and 60000 ms, not 0.0"),
        (["--taper-tpot-slo-ms", "-5"], "--taper-tpot-slo-ms must be between"),
        (["--taper-tpot-slo-ms", "nan"], "--taper-tpot-slo-ms must be between 0.1 and 60000 ms, not nan"),
        (["--taper-ttft-slo-ms", "inf"], "--taper-ttft-slo-ms must be between"),
        (["--taper-tpot-slo-ms", "fast"], "'fast' is not a valid float"),
        (["--taper-knob", "margin"], "write NAME=VALUE with a number"),
        (["--taper-knob", "margin=much"], "write NAME=VALUE with a number"),
        (["--taper-knob", "margin=7"], "margin must be between 0 and 0.5"),
        (["--taper-knob", "margin=nan"], "margin must be between 0 and 0.5"),
        (["--taper-knob", "colour=1"], "unknown key 'colour' in --taper-knob; known: margin"),
        (["--taper-polcy", "off"], "unknown option --taper-polcy"),
        (["--taper-calibration-s", "1"], "--taper-calibration-s must be between 5 and 3600 s"),
        (["--taper-profile", "/nowhere/p.json"], "profile /nowhere/p.json: No such file"),
    ],
)
def test_what_serve_refuses(args: list[str], words: str) -> None:
    assert words in refusal("serve", *args)


def test_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, words in (
        ('{"polcy": "off"}', "unknown key 'polcy' in config"),
        ('{"policy": "off", "slo": {"tpot_s": -1}}', "tpot_s must be between"),
        ("/nowhere.json", "names '/nowhere.json', which cannot be read"),
        ('{"profile": {}}', "give taper serve its file with --taper-profile"),
    ):
        monkeypatch.setenv("TAPER_CONFIG", value)
        assert words in refusal("serve", "m")


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"policy": "off", "slo": {"tpot_s": 0.2, "ttft_s": 9.0}, "knobs": {"margin": 0.1, "rho": 0.5}}
    monkeypatch.setenv("TAPER_CONFIG", json.dumps(settings))
    config = _config("cap:2", 30.0, None, ["margin=0.3"], allow_control=True)
    assert config.policy == "cap:2"
    assert config.slo == Slo(tpot_s=0.03, ttft_s=9.0)
    assert config.knobs == Knobs(margin=0.3, rho=0.5)
    assert config.allow_control
    assert _config(None, None, None, [], allow_control=False).policy == "off"


@pytest.mark.parametrize(
    ("args", "model", "rest"),
    [
        ([], None, []),
        (["m", "--port", "1"], "m", ["--port", "1"]),
        (["--port", "1"], None, ["--port", "1"]),
        (["--model", "m", "-tp", "2"], "m", ["-tp", "2"]),
        (["--model=m", "-O3"], "m", ["-O3"]),
    ],
)
def test_the_model_comes_first_or_with_its_flag(args: list[str], model: str | None, rest: list[str]) -> None:
    assert _model_and_flags(args) == (model, rest)


def test_a_model_may_stand_in_vllms_config_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: org/model\n")
    assert _model_and_flags(["--config", str(file)]) == ("org/model", ["--config", str(file)])
    assert _model_and_flags(["--config", str(file), "--model", "mine"])[0] == "mine"
    assert _model_and_flags(["mine", "--config", str(file)])[0] == "mine"


def test_vllm_flags_reach_vllm_as_they_are() -> None:
    """click must neither reorder nor interpret what is not ours."""
    seen: list[tuple[str, ...]] = []

    @click.command(context_settings=PASS_THROUGH)
    @click.option("--taper-policy")
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def probe(args: tuple[str, ...], taper_policy: str) -> None:
        seen.append(args)

    given = ["m", "-tp", "2", "-O3", "--seed=3", "-dp=4", "--limit", '{"image": 2}', "--no-x", "a", "b", "--hf.x", "y"]
    CliRunner().invoke(probe, [*given[:3], "--taper-policy", "off", *given[3:]])
    assert seen == [tuple(given)]


def test_a_truncated_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"schema": "taper.profile/1", "key": {"mod')
    assert "truncated" in refusal("serve", "m", "--taper-profile", str(path))


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_profile(Profile(key=KEY, coefficients=LAW), tmp_path / "p.json")
    line = refusal("serve", "m", "--taper-profile", str(path))
    assert "belongs to another bfloat16 on cpu x2" in line
    assert "this server's model is m" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["m", "--uds", "/tmp/x"], "--uds does not go with taper serve"),
        (["m", "--scheduler-cls", "x"], "TAPER is the scheduler"),
        (["m", "--port", "99999"], "--port must be between 1 and 65535, not '99999'"),
    ],
)
def test_vllm_flags_that_cannot_work(args: list[str], words: str) -> None:
    assert words in refusal("serve", *args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["calibrate", "--taper-budget-s", "0"], "--taper-budget-s must be between"),
        (["calibrate", "m", "--taper-url", "http://x"], "MODEL and vLLM flags do not go with it"),
        (["calibrate", "--taper-url", "http://127.0.0.1:9"], "GET /taper/state"),
        (["calibrate", "--taper-url", "localhost:8000"], "--taper-url must begin with http://"),
        (["demo", "--policies", "off,nope"], "unknown policy 'nope'"),
        (["demo", "--rounds", "0"], "rounds must be between 1 and 100"),
        (["demo", "--json"], "Option '--json' requires an argument"),
        (["doctor", "--port", "0"], "0 is not in the range"),
    ],
)
def test_what_the_other_commands_refuse(args: list[str], words: str) -> None:
    assert words in refusal(*args)


def test_version_and_help() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"taper, version {__version__}\n"
    for args in ([], ["--help"], *([name, "--help"] for name in ("serve", "calibrate", "model", "doctor", "demo"))):
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0
        assert "Usage: " in result.stdout
    assert "margin=0.02  0 to 0.5 of the SLO" in CliRunner().invoke(cli, ["serve", "--help"]).stdout


def test_help_imports_no_engine() -> None:
    program = (
        "import sys; from taper.cli import cli; cli.main(['serve', '--help'], standalone_mode=False);"
        "print([name for name in ('vllm', 'torch', 'transformers', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

"""`taper bench` and `taper report` from the command line: what they refuse, and a whole small bench over HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from taper.bench.driver import WindowPlan
from taper.benchmark import BenchOptions, without_secrets
from taper.cli import cli
from taper.core.types import ConfigError
from taper.records import request_file
from taper.results import read_runs
from taper.workload import Arrivals
from tests.bench.server import FakeEngine, serving

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:00:0{second}.0,{100 + second},{5 + second}\n" for second in range(10)
)
QUICK = ("--rounds", "1", "--ramp-s", "0.1", "--measure-s", "1", "--drain-s", "300", "--foreign-cpu", "1")


@contextmanager
def served(engine: FakeEngine) -> Iterator[str]:
    """The fake engine on a thread of its own: the command has an event loop of its own, too."""
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, object] = {}

    async def session() -> None:
        async with serving(engine) as url:
            found["url"], found["loop"] = url, asyncio.get_running_loop()
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(session()))
    thread.start()
    ready.wait()
    try:
        yield str(found["url"])
    finally:
        found["loop"].call_soon_threadsafe(stop.set)  # type: ignore[attr-defined]
        thread.join()


def refusal(*args: str) -> str:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 2
    assert result.stderr.startswith("taper: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policies", "nope"], "unknown policy 'nope'"),
        (["--loads", "much"], "'much' is not a list of numbers"),
        (["--time-scale", "0"], "'0' is neither auto nor a factor above 0"),
        (["--time-scale", "2"], "--time-scale needs a --trace"),
        (["--branches", "sprnt"], "branch profile must be one of none, best-of-n"),
        (["--trace", "/nowhere.csv", "--branches", "sot"], "trace /nowhere.csv: No such file"),
        (["--mix", "/nowhere.toml"], "--mix /nowhere.toml:"),
        (["--cv", "-1"], "cv must be between 0 and 100"),
        (["--url", "http://127.0.0.1:9"], "needs --token"),
        (["--url", "127.0.0.1:9", "--policies", "stock"], "--url must begin with http"),
        (["--url", "http://127.0.0.1:9", "--policies", "stock"], "/v1/models: ConnectError"),
    ],
)
def test_what_bench_refuses(args: list[str], words: str, tmp_path: Path) -> None:
    assert words in refusal("bench", "--out", str(tmp_path / "out"), *args)


def test_a_trace_and_a_mix_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not go together"):
        BenchOptions(out=tmp_path, trace_path=tmp_path, mix_path=tmp_path)


def test_secrets_are_no_settings(tmp_path: Path) -> None:
    options = BenchOptions(out=tmp_path, url="http://x", control_token="hidden", api_key="hidden")
    assert "hidden" not in json.dumps(options.settings())


def test_options_come_back_from_the_settings_that_were_kept(tmp_path: Path) -> None:
    options = BenchOptions(
        out=tmp_path,
        trace_path=tmp_path / "trace.csv",
        plan=WindowPlan(ramp_s=1.0, measure_s=2.0, drain_s=3.0),
        arrivals=Arrivals(cv=2.0),
        shares=[0.2, 0.4],
        policies=["off"],
        loads=[1.0],
        slos=[0.6],
        vllm_args=[],
    )
    kept = json.loads(json.dumps(options.settings()))
    assert BenchOptions.of_settings(kept, out=tmp_path) == options
    for changed in ({**kept, "later": 1}, {key: value for key, value in kept.items() if key != "plan"}):
        with pytest.raises(ConfigError, match="settings of another version"):
            BenchOptions.of_settings(changed, out=tmp_path)


def test_secrets_are_not_kept_with_the_command() -> None:
    given = ["bench", "--token", "hidden", "--api-key=hidden", "--loads", "1"]
    assert without_secrets(given) == ["bench", "--token", "...", "--api-key=...", "--loads", "1"]


def test_a_server_without_taper_is_benched_with_a_trace(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out"
    trace.write_text(TRACE, encoding="utf-8")
    engine = FakeEngine()
    with served(engine) as url:
        command = ["bench", "--out", str(out), "--url", url, "--policies", "stock", "--trace", str(trace),
                   "--branches", "sot", "--shares", "0.5", "--rates", "20", "--slos-ms", "500", "--concurrency", "9",
                   "--output-scale", "0.05", *QUICK]  # fmt: skip
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
        warmed = len(engine.requests)
        again = CliRunner().invoke(cli, command)
    assert again.exit_code == 0, again.output
    assert len(engine.requests) == warmed + 8  # warm-up only: the window is done
    (run,) = read_runs(out / "runs.json")
    assert (run.policy, run.conditions.rate_rps, run.conditions.slo_tpot_s, run.conditions.concurrency) == (
        "stock",
        20,
        0.5,
        9,
    )
    assert run.summary.misses_error == 0
    records = list(request_file().read(out / "requests.jsonl"))
    assert {choice.stage for record in records for choice in record.choices} == {0, 1}
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta["resolved"]["context_tokens"] == 512
    assert meta["resolved"]["prompt_scale"] == 1.0  # prompts of 109 tokens fit a quarter of 512
    assert "stock" in result.output


def test_a_taper_server_is_switched_between_windows(tmp_path: Path) -> None:
    engine = FakeEngine()
    with served(engine) as url:
        result = CliRunner().invoke(
            cli,
            ["bench", "--out", str(tmp_path), "--url", url, "--token", "t", "--policies", "off,eager", "--rates", "15",
             "--slos-ms", "500", "--concurrency", "9", "--output-scale", "0.05", "--dialogue", "chat", *QUICK],
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [patch["policy"] for patch in engine.patches] == ["off", "eager"]
    assert [run.engine.planner_p99_s for run in read_runs(tmp_path / "runs.json")] == [0.0001, 0.0001]
    assert not any("ignore_eos" in body for body in engine.requests)

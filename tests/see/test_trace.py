"""Traces: what is recorded decides again exactly as it did, survives rotation and torn lines, and exports."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from taper.cli import cli
from taper.config import ServerConfig, resolve_policy
from taper.core.types import ConfigError, Slo
from taper.trace import perfetto
from taper.trace.decision import TraceError, dump, parse
from taper.trace.file import TraceWriter, older, read_trace
from taper.trace.replay import replay, same
from tests.vllm import harness
from tests.vllm.harness import PROFILE, fork, request

pytestmark = pytest.mark.vllm


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def record(request, monkeypatch, tmp_path):
    """Run a mixed load through a real scheduler with a trace; returns its path."""

    def run(profile=PROFILE, **kwargs):
        path = tmp_path / "trace.jsonl"
        config = ServerConfig(profile=profile, trace=str(path), slo=Slo(tpot_s=0.02), **kwargs)
        driver = harness.make(monkeypatch, tmp_path / "model", is_async=request.param, config=config)
        for wave in range(4):
            driver.add(*fork(f"p{wave}", 3 + wave, tokens=60), *harness_serial(wave))
            driver.run(12)
            driver.step_s = 0.018 + 0.002 * wave
        driver.run()
        driver.taper.onlooker.trace.close()
        assert driver.taper.fallbacks == 0
        return path

    return run


def harness_serial(wave):
    return [request(f"s{wave}-{i}", tokens=80) for i in range(3)]


def test_the_same_policy_decides_the_same(record):
    decisions = list(read_trace(record()))
    found = replay(decisions, None, resolve_policy)
    assert found.decisions == len(decisions) > 100
    assert found.identical == found.decisions
    assert (found.extra, found.predicted_s) == (found.other_extra, found.other_predicted_s)
    assert found.differences == ()
    assert any(decision.plan.run.sum() < len(decision.plan.run) for decision in decisions)  # it did decide something


def test_a_cold_start_replays_too(record):
    decisions = list(read_trace(record(profile=None)))
    assert {decision.policy for decision in decisions} >= {"cap:2"}
    found = replay(decisions, None, resolve_policy)
    assert found.identical == found.decisions > 0


def test_another_policy_differs_and_says_why(record):
    decisions = list(read_trace(record()))
    eager = replay(decisions, resolve_policy("eager"), resolve_policy, shown=3)
    assert eager.other_extra > eager.extra
    assert len(eager.differences) == 3
    first = eager.differences[0]
    assert first.why.startswith("runs every branch")
    assert all(by > 0 for _, by in first.moved)
    off = replay(decisions, resolve_policy("off"), resolve_policy, shown=1)
    assert off.other_extra == 0
    assert off.differences[0].why.startswith("at most 1 per request, whatever the budget of ")
    paper = replay(decisions, resolve_policy("taper-paper"), resolve_policy)
    assert paper.differences[0].why.startswith("budget ")


def test_lines_hold_everything(record):
    decisions = list(read_trace(record()))
    again = [parse(dump(one), where="x") for one in decisions]
    for one, other in zip(decisions, again, strict=True):
        assert dump(one) == dump(other)
        assert same(one.plan, other.plan)
    assert {one.ending for one in decisions} >= {"clean"}
    assert all(math.isfinite(one.measured_s) for one in decisions)


def test_an_infinite_floor_survives(record):
    decision = next(read_trace(record()))
    without_bound = replace(decision, guidance=replace(decision.guidance, floor_s=math.inf))
    again = parse(dump(without_bound), where="x")
    assert again.guidance == without_bound.guidance


def test_it_is_bounded_and_rotates(record, tmp_path):
    decisions = list(read_trace(record()))
    path = tmp_path / "small.jsonl"
    length = len(dump(decisions[0])) + 1
    writer = TraceWriter(path, max_bytes=20 * length)
    for index in range(100):
        writer.put(replace(decisions[0], step=index))
    writer.close()
    assert writer.dropped == 0
    assert path.stat().st_size <= 20 * length + 20
    assert older(path).stat().st_size <= 20 * length + 20
    steps = [one.step for one in read_trace(path)]
    assert steps == list(range(100 - len(steps), 100))
    assert 20 < len(steps) <= 40
    with path.open("ab") as out:
        out.write(b'{"schema": "taper.deci')  # what a killed writer leaves
    assert [one.step for one in read_trace(path)] == steps
    again = TraceWriter(path, max_bytes=10**9)
    again.put(replace(decisions[0], step=100))
    again.close()
    assert [one.step for one in read_trace(path)] == [*steps, 100]


def test_a_full_disk_ends_the_trace_and_is_counted(record):
    decisions = list(read_trace(record()))
    writer = TraceWriter(Path("/dev/full"), max_bytes=1 << 20)
    writer.put(decisions[0])
    writer.close()
    writer.put(decisions[0])
    assert writer.dropped == 1


def test_what_does_not_fit_is_refused_by_line(record, tmp_path):
    path = record()
    good = path.read_bytes().splitlines(keepends=True)[0]
    bad = tmp_path / "bad.jsonl"
    data = json.loads(good)
    view = data["view"]
    for change, words in (
        (b"{}\n", "lacks 'schema'"),
        (b"nonsense\n", "not a decision"),
        (json.dumps(data | {"schema": "taper.decision/9"}).encode() + b"\n", "schema is 'taper.decision/9'"),
        (json.dumps(data | {"branches": []}).encode() + b"\n", "columns differ in length"),
        (json.dumps(data | {"view": 5}).encode() + b"\n", "not subscriptable"),
        (json.dumps(data | {"branches": [10**30] * len(data["branches"])}).encode() + b"\n", "too large"),
        (json.dumps(data | {"measured_s": "1"}).encode() + b"\n", "'1' is no number"),
        (json.dumps(data | {"view": view | {"request": view["request"][::-1]}}).encode() + b"\n", "not ordered"),
        (json.dumps(data | {"knobs": {"rho": 0.8}}).encode() + b"\n", "Knobs of another version"),
    ):
        bad.write_bytes(good + change)
        with pytest.raises(TraceError, match=rf"{bad}:2: .*{words}"):
            list(read_trace(bad))
    with pytest.raises(TraceError, match="No such file"):
        list(read_trace(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigError, match=r"trace /nowhere/x\.jsonl: No such file"):
        TraceWriter(Path("/nowhere/x.jsonl"), max_bytes=1000)


def test_the_command(record, tmp_path):
    path = record()
    run = CliRunner().invoke(cli, ["replay", str(path), "--perfetto", str(tmp_path / "t.json")])
    assert run.exit_code == 0, run.output
    assert ", 0 different" in run.stdout
    other = CliRunner().invoke(cli, ["replay", str(path), "--policy", "off", "--steps", "2"])
    assert other.exit_code == 0
    assert "where they differ most" in other.stdout
    assert CliRunner().invoke(cli, ["replay", str(path), "--policy", "nope"]).exit_code == 2
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused = CliRunner().invoke(cli, ["replay", str(empty)])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_perfetto_export(record):
    out = io.StringIO()
    decisions = list(read_trace(record()))
    count = perfetto.export(decisions, out)
    events = json.loads(out.getvalue())["traceEvents"]
    assert len(events) == count
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in slices} >= {"protected", "extra", "deferred"}
    assert all(event["dur"] >= 0 for event in slices)
    by_track = {}
    for event in sorted(slices, key=lambda event: event["ts"]):
        before = by_track.get((event["pid"], event["tid"]))
        # A track is the engine or one branch: it does one thing at a time (a microsecond of rounding aside).
        assert before is None or before["ts"] + before["dur"] <= event["ts"] + 1
        by_track[event["pid"], event["tid"]] = event
    steps = [event for event in events if event["ph"] == "X" and event["pid"] == perfetto.ENGINE]
    assert len(steps) == len(decisions)

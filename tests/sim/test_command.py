import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from taper.cli import cli
from taper.core.types import ConfigError
from taper.results import read_runs
from taper.sim import scenario as scenarios
from taper.sim.command import COLUMNS, Options, cases_of, fleets_of, table_of
from taper.sim.hardware import hardware
from taper.sim.scenario import settle
from taper.workload import contended

SMALL = ["--steps", "120", "--policies", "off,taper", "--workers", "1"]


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["simulate", *args], standalone_mode=False)


def test_the_same_seeds_give_the_same_bytes_and_the_bench_can_read_them(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, workers in zip(files, "12", strict=True):
        done = invoke("--seeds", "2", *SMALL, "--workers", workers, "--json", str(path))
        assert done.exception is None
    assert files[0].read_bytes() == files[1].read_bytes()
    runs = read_runs(files[0])
    assert [(run.policy, run.conditions.seed) for run in runs] == [("off", 0), ("off", 1), ("taper", 0), ("taper", 1)]
    first = json.loads(files[0].read_text("utf-8"))["runs"][0]
    share = scenarios.load("headline").branching_share
    found = tuple(first[name] for name in ("scenario", "hardware", "load", "share"))
    assert found == ("headline", "a100x8-qwen3-32b", 2.0, share)
    assert first["planner_p99_s"] is None  # the simulator's own time is nobody's figure
    assert all(first[name] > 0 for name in ("goodput_tok_s", "itl_p99_s", "ttft_p95_s", "predictor_mape"))


def test_lists_multiply() -> None:
    options = Options(scenarios="low,knee", loads="0.5,2", replicas="1,4", routers="round-robin,group-affine", seeds=3)
    tables = cases_of(options)
    assert len(tables) == 2 * 2 * (1 + 2)
    assert {len(table) for table in tables} == {6 * 3}
    knee = [table[0].scenario.load for table in tables if table[0].scenario.name == "knee"]
    assert sorted(set(knee)) == [0.45, 1.8]


def test_contended_is_the_bench_s_regime_for_the_hardware() -> None:
    options = Options(scenarios="contended", hardware="cpu-smollm2", loads="0.5", shares="0.4", seeds=1, policies="off")
    ((case,),) = cases_of(options)
    regime = contended(hardware("cpu-smollm2").predictor(), load=1.0)
    setting = settle(case.scenario, case.machine)
    assert (setting.rate_per_s, setting.slo) == (regime.rate_rps, regime.slo)
    assert case.scenario.engine_on(case.machine).max_requests == regime.max_concurrency
    requests = case.scenario.source_on(case.machine).requests(seed=3, rate_rps=regime.rate_rps, horizon_s=20.0)
    assert list(requests) == list(regime.source.requests(seed=3, rate_rps=regime.rate_rps, horizon_s=20.0))


def test_a_share_replaces_the_scenario_s_own() -> None:
    options = Options(scenarios="knee", shares="0.25,0.5", seeds=1, policies="off")
    assert [table[0].scenario.branching_share for table in cases_of(options)] == [0.25, 0.5]


def test_all_is_every_scenario_and_the_trace_only_with_a_file() -> None:
    names = {table[0].scenario.name for table in cases_of(Options(scenarios="all"))}
    assert "headline" in names
    assert "trace" not in names


def test_one_engine_needs_no_router() -> None:
    fleets = fleets_of(Options(replicas="1,2", routers="round-robin,slack-aware"))
    assert [(one.replicas, one.router) for one in fleets][1:] == [(2, "round-robin"), (2, "slack-aware")]
    assert len(fleets) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scenario", "nope"], "unknown scenario 'nope'"),
        (["--scenario", "trace"], "name its file with --trace"),
        (["--hardware", "tpu"], "hardware must be one of"),
        (["--policies", "off,of"], "unknown policy 'of'"),
        (["--policies", ","], "--policies names nothing"),
        (["--load", "x"], "--load must be numbers"),
        (["--load", "0"], "--load must be above 0"),
        (["--replicas", "1.5"], "--replicas must be whole numbers"),
        (["--router", "random"], "router must be one of"),
        (["--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_what_does_not_exist_is_named_before_anything_runs(args: list[str], message: str) -> None:
    done = invoke(*args)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_a_fleet_prints_its_table() -> None:
    done = invoke("--seeds", "1", *SMALL, "--replicas", "2", "--router", "slack-aware")
    assert done.exception is None
    assert "2 replicas, slack-aware" in done.output
    assert "…" not in done.output
    assert "tpot p95 ms" in done.output


def test_a_narrow_table_has_fewer_columns_and_cuts_none(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    invoke("--seeds", "1", *SMALL, "--json", str(path))
    runs = read_runs(path)
    assert len(table_of(runs, width=200).columns) == 1 + len(COLUMNS)
    for width, headings in ((10, ["policy", "goodput"]), (48, ["policy", "goodput", "att %", "serial %", "branch %"])):
        table = table_of(runs, width=width)
        assert [column.header for column in table.columns] == headings
        assert all(column.no_wrap for column in table.columns)

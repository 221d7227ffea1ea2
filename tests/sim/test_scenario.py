import json
from pathlib import Path

import pytest

from taper.core.types import ConfigError
from taper.sim.hardware import Hardware, hardware, machines
from taper.sim.run import Case, run, run_all
from taper.sim.scenario import load, names, operating_points, parse, settle
from taper.workload import Demand

SHORT = """
summary = "s"
load = 1.0
duration_steps = 400
[mix]
branching_share = 0.5
prompt = { low = 10, high = 10 }
serial = { low = 40, high = 40 }
stage = { low = 4, high = 4 }
fanout = { low = 4, high = 4 }
branch = { low = 8, high = 8 }
"""


def test_operating_points_by_hand() -> None:
    machine = Hardware(name="m", base_s=1.0, row_s=0.1, context_s=0.0, prefill_s=0.0)
    demand = Demand(
        tokens=40, prompt_tokens=5, join_tokens=0, siblings=3, context_tokens=10, off_steps=40, eager_steps=10
    )
    off, eager = operating_points(machine, demand, 10)
    assert (off.rows, off.step_s) == (10, 2.0)
    assert off.rate_per_s == pytest.approx(10 / (40 * 2.0))
    assert (eager.rows, eager.step_s) == (40, 5.0)
    assert eager.rate_per_s == pytest.approx(10 / (10 * 5.0))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three requests in ten seconds."""
    path = tmp_path / "trace.csv"
    times = ("00:00:00", "00:00:04", "00:00:10")
    rows = [
        f"2023-11-16 {at}.5,{prompt},{output}"
        for at, prompt, output in zip(times, (9, 8, 7), (30, 20, 10), strict=True)
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("machine", [hardware(name) for name in machines()], ids=lambda machine: machine.name)
def test_every_shipped_scenario_settles_on_every_hardware(name: str, machine: Hardware, trace: Path) -> None:
    setting = settle(load(name, trace=trace), machine)
    assert 0 < setting.off.step_s < setting.eager.step_s
    assert setting.rate_per_s > 0 < setting.slo.tpot_s
    if name not in ("below-t0", "demo-cpu"):
        assert setting.off.step_s < setting.slo.tpot_s < setting.eager.step_s


def test_the_names_that_issue_and_docs_promise() -> None:
    assert set(names()) >= {
        "low", "knee", "saturated", "bursts", "overload", "mixed-slo", "mixed-slo-infeasible", "all-branching",
        "below-t0", "stragglers", "spikes", "drift", "bias-low", "bias-high", "headline", "trace",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("load = 1.0", "laod = 1.0"), "unknown key 'laod'"),
        (("fanout = {", "fanuot = {"), "mix: unknown key 'fanuot'"),
        (("fanout = { low = 4, high = 4 }", "fanout = '4'"), "mix: fanout must be a number or a table"),
        (("fanout = { low = 4", "fanout = { low = 5"), "1 <= low <= high"),
        (("load = 1.0", "load = 1.0\ndisturbance = 3"), "disturbance must be a table"),
        (("[mix]", "[arrivals]\ncvv = 1"), "needs a table mix or trace"),
        (("[mix]", "[trace]\nforks = 1\n[mix]"), "trace does not go with mix"),
        (('summary = "s"\n', ""), "missing 1 required keyword-only argument: 'summary'"),
        (("[mix]", "[mix"), "not TOML"),
        (("[mix]", "x = " + "[" * 5000 + "\n[mix]"), "not TOML: maximum recursion"),
        (("load = 1.0", "load = '1'"), "mine: load must be a number"),
        (("load = 1.0", "load = nan"), "mine: load must be between"),
        (("load = 1.0", "load = 1.0\nmax_requests = 2.5"), "mine: max_requests must be a whole number"),
        (("load = 1.0", "load = 1.0\njoin_prefill = 1"), "mine: join_prefill must be true or false"),
        (("[mix]", "[disturbance]\nspike_share = 2\n[mix]"), "disturbance: spike_share must be between"),
    ],
)
def test_a_scenario_that_is_none_says_why(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("mine", SHORT.replace(*change))


def test_an_unknown_scenario_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown scenario 'nope'; known: .*headline"):
        load("nope")


def test_the_same_case_gives_the_same_bytes_in_one_process_or_several() -> None:
    cases = [
        Case(scenario=parse("short", SHORT), machine=hardware("a100x8-qwen3-32b"), policy=policy, seed=seed)
        for policy in ("off", "taper")
        for seed in (0, 1)
    ]
    alone = json.dumps([run(case).to_json() for case in cases])
    assert alone == json.dumps([one.to_json() for one in run_all(cases, workers=2)])
    first, second = json.loads(alone)[:2]
    assert first["goodput_tok_s"] != second["goodput_tok_s"]


def test_off_never_runs_more_rows_than_requests() -> None:
    engine = run(Case(scenario=parse("s", SHORT), machine=hardware("cpu-smollm2"), policy="off", seed=0)).engine
    assert engine.rows_mean is not None
    assert engine.requests_mean is not None
    assert engine.rows_mean <= engine.requests_mean


def test_a_trace_scenario_replays_the_file_it_is_given(trace: Path) -> None:
    with pytest.raises(ConfigError, match="name its file with --trace"):
        load("trace")
    requests = list(load("trace", trace=trace).source.requests(seed=0, rate_rps=0.2, horizon_s=22.0))
    assert [one.arrival_s for one in requests] == [0.0, 4.0, 10.0, 15.0, 19.0]  # 3 requests a lap of 15 s, as recorded
    assert {one.tokens for one in requests if not one.branching} <= {30, 20, 10}


def test_a_scenario_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHORT, "utf-8")
    assert load(str(path)).name == "mine"
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "none.toml"))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="can't decode"):
        load(str(path))

"""What a report is drawn from, and that the page stands on its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from taper.bench import evidence as ev
from taper.core.types import ConfigError
from taper.goodput import Window, summarize
from taper.records import ChoiceRecord, RequestRecord, StepRecord, request_file, step_file
from taper.results import Conditions, EngineStats, Run, document

EMPTY = summarize([], Window(start_s=0.0, end_s=1.0))
POLICIES = ("taper", "off", "eager", "cap:2")


def run(policy: str, load: float, round_: int, goodput: float, **conditions: object) -> Run:
    window = f"{load}/{round_}/{policy}"
    given = {"policy": policy, "load": load, "share": 0.4, "slo_at": 0.6, "slo_tpot_s": 0.05, "round": round_}
    return Run(
        conditions=Conditions(**{**given, "window": window, "bound_tok_s": 400.0, **conditions}),  # type: ignore[arg-type]
        summary=replace(
            EMPTY,
            goodput_tok_s=goodput,
            raw_tok_s=goodput + 50,
            attainment=0.9,
            judged=10,
            misses_tpot=1,
            misses_error=2,
        ),
        engine=EngineStats(planner_p99_s=1e-4),
    )


RUNS = [
    run(policy, load, round_, 100.0 * load + 10 * round_ + at)
    for at, policy in enumerate(POLICIES)
    for load in (0.5, 2.0)
    for round_ in (0, 1, 2)
]


def record(policy: str, index: int, tpot_s: float) -> RequestRecord:
    choice = ChoiceRecord(
        index=0, tokens=11, first_token_s=1.0, last_token_s=1.0 + 10 * tpot_s, gaps_ms=(tpot_s * 1e3,) * 10
    )
    return RequestRecord(
        id=str(index), policy=policy, round=0, seed=0, index=index, kind="serial", branches=1, prompt_tokens=5,
        scheduled_s=0.5, sent_s=0.6, ended_s=3.0, tpot_slo_s=0.05, choices=(choice,), window=f"2.0/0/{policy}",
    )  # fmt: skip


def step(policy: str, number: int) -> StepRecord:
    return StepRecord(
        step=number, time_s=number * 0.5, policy=policy, rows=6, context_tokens=100, prefill_tokens=0, groups=4,
        protected=4, extra=2, deferred=number % 2, held=0, baseline_s=0.02, predicted_s=0.03, budget_s=None,
        slack_min_s=0.01, measured_s=0.036, ending="clean", planner_s=1e-4, window=f"2.0/0/{policy}",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bench"
    path.mkdir()
    (path / "runs.json").write_text(json.dumps(document(RUNS)), encoding="utf-8")
    request_file().append(path / "requests.jsonl", (record(p, i, 0.01 * (i + 1)) for p in POLICIES for i in range(5)))
    step_file().append(path / "steps.jsonl", (step(policy, number) for policy in POLICIES for number in range(40)))
    return path


def test_medians_have_their_range_and_leave_rejected_runs_out(folder: Path) -> None:
    rejected = run("taper", 2.0, 3, 1e6, accepted=False)
    evidence = replace(ev.gather([folder]), runs=(*RUNS, rejected))
    (row,) = [row for row in ev.medians(evidence) if (row["policy"], row["load"]) == ("taper", 2.0)]
    assert (row["goodput_tok_s"], row["goodput_tok_s_low"], row["goodput_tok_s_high"]) == (210.0, 200.0, 220.0)
    assert (row["panel"], row["rounds"], row["bound_tok_s"]) == ("40% branching, SLO at 0.6", 3, 400.0)
    assert row["tpot_p95_s"] is None


def test_a_point_that_was_measured_and_simulated_is_a_pair() -> None:
    made = [run("taper", 2.0, 0, goodput, hardware="cpu", rate_rps=4.0, window="") for goodput in (190.0, 200.0, 220.0)]
    met = [run("taper", 2.0, at, goodput, rate_rps=4.0) for at, goodput in enumerate((210.0, 212.0, 230.0))]
    other = [run("off", 2.0, 0, 100.0, rate_rps=4.0), run("taper", 1.0, 0, 90.0, rate_rps=2.0)]
    evidence = ev.Evidence(runs=(*met, *made, *other), folders=())
    assert ev.pairs(evidence) == [
        {
            "policy": "taper", "load": 2.0, "share": 0.4, "goodput_tok_s_measured": 212.0,
            "goodput_tok_s_simulated": 200.0, "attainment_measured": 0.9, "attainment_simulated": 0.9,
        }
    ]  # fmt: skip
    assert ev.pairs(ev.Evidence(runs=tuple(RUNS), folders=())) == []


def test_measured_and_simulated_are_drawn_against_each_other() -> None:
    pytest.importorskip("altair")
    from taper.bench.charts import figures

    made = tuple(replace(one, conditions=replace(one.conditions, hardware="cpu", window="")) for one in RUNS)
    drawn = {figure.name: figure.chart.to_dict() for figure in figures(ev.Evidence(runs=(*RUNS, *made), folders=()))}
    assert list(drawn) == ["goodput", "attainment", "raw", "misses", "validation"]
    assert len(drawn["validation"]["hconcat"]) == 2


def test_misses_are_shares_of_the_judged(folder: Path) -> None:
    rows = [row for row in ev.misses(ev.gather([folder])) if (row["policy"], row["load"]) == ("off", 0.5)]
    assert [(row["cause"], row["share"]) for row in rows] == [("error", 0.2), ("ttft", 0.0), ("tpot", 0.1)]


def test_distributions_and_steps_come_from_the_busiest_point(folder: Path) -> None:
    evidence = ev.gather([folder])
    where, windows = ev.busiest(evidence)
    assert where == "40% branching, SLO at 0.6, load 2"
    assert len(windows) == 12
    middle = {row["figure"]: row["ms"] for row in ev.distributions(evidence, windows) if row["share"] == 0.5}
    assert middle == pytest.approx({"TPOT": 30.0, "TTFT": 500.0, "gap": 30.0})
    steps = ev.steps_of(evidence, windows)
    assert {policy: len(records) for policy, records in steps.items()} == dict.fromkeys(POLICIES, 40)
    first = [row for row in ev.timeline({"off": steps["off"]}) if row["time_s"] == ev.timeline(steps)[0]["time_s"]]
    assert {row["kind"]: row.get("rows", row.get("ms")) for row in first} == pytest.approx(
        {"protected": 4.0, "extra": 2.0, "deferred": 0.0, "slack": 10.0}
    )
    dots = ev.predictions({"off": steps["off"]})
    assert len(dots) == 40
    assert (dots[0]["predicted_ms"], dots[0]["measured_ms"]) == pytest.approx((30.0, 36.0))


def test_a_simulation_has_a_panel_per_scenario() -> None:
    assert ev.panel(Conditions(policy="off", scenario="knee", hardware="a100x8", share=0.15, slo_at=0.5)) == (
        "knee, a100x8, 15% branching, SLO at 0.5"
    )
    assert ev.panel(Conditions(policy="off", share=0.0, slo_tpot_s=0.04)) == "0% branching, SLO 40 ms"
    assert ev.panel(Conditions(policy="off")) == "all runs"
    fleet = Conditions(policy="off", scenario="knee", replicas=4, router="round-robin")
    assert ev.panel(fleet) == "knee, 4 replicas, round-robin"


def test_the_load_axis_says_what_the_load_is_relative_to() -> None:
    bench, contended = run("off", 1.0, 0, 1.0), run("off", 1.0, 0, 1.0, scenario="contended", hardware="m")
    scenario = run("off", 1.0, 0, 1.0, scenario="headline", hardware="m")
    assert ev.abscissa([bench, contended])[1] == "offered load, × what fits the SLO by the law"
    assert ev.abscissa([scenario])[1] == "offered load, × what is served half-way between off and eager"
    assert ev.abscissa([bench, scenario])[1] == "offered load, × each panel's own unit"


def test_policies_have_one_order_everywhere() -> None:
    names = ["taper", "mine", "eager", "cap:5", "taper-paper", "off", "cap:2", "stock"]
    assert ev.policy_order(names) == ["stock", "off", "cap:2", "cap:5", "eager", "taper-paper", "taper", "mine"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(document([])), encoding="utf-8")
    with pytest.raises(ConfigError, match="no accepted run"):
        ev.gather([path])


def test_the_page_is_one_file_without_addresses_to_load_from(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    from taper.bench.page import write_report

    out, png = tmp_path / "report.html", tmp_path / "png"
    written = write_report([folder], out, png)
    names = [path.stem for path in written[1:]]
    assert names == ["goodput", "attainment", "raw", "misses", "latency", "timeline", "prediction"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    page = out.read_text(encoding="utf-8")
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # the plotting library's own text aside
    assert not re.findall(r"(?:src|href|url)\s*[=(]", ours)
    for name in names:
        assert f'id="{name}"' in page
    assert "210 <small>200-220</small>" in page


def test_scenarios_without_a_common_load_are_drawn_as_bars(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    from taper.bench.charts import figures

    runs = tuple(
        run(policy, load, 0, 100.0, scenario=name, window="")
        for name, load in (("knee", 1.0), ("low", 0.3))
        for policy in POLICIES
    )
    evidence = ev.Evidence(runs=runs, folders=())
    drawn = {figure.name: figure.chart.to_dict() for figure in figures(evidence)}
    assert list(drawn) == ["goodput", "attainment", "raw", "misses"]
    bars = drawn["goodput"]["layer"][0]
    assert bars["mark"]["type"] == "bar"
    assert (bars["encoding"]["x"]["axis"]["labelLimit"], bars["encoding"]["x"]["axis"]["labelAngle"]) == (0, 0)
    assert drawn["goodput"]["width"] >= 125 * 2  # a name's longest part fits under its bars

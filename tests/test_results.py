"""The summary schema: written flat, read back, strict, and described field by field in the docs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from taper.goodput import Summary, Window, summarize
from taper.records import ChoiceRecord, RequestRecord
from taper.results import SCHEMA, Conditions, EngineStats, ResultsError, Run, document, parse_runs, read_runs

CHOICE = ChoiceRecord(index=0, tokens=5, first_token_s=0.5, last_token_s=2.0)
RECORD = RequestRecord(
    id="a", policy="off", round=0, seed=0, index=0, kind="serial", branches=1, prompt_tokens=3, scheduled_s=0.0,
    sent_s=0.0, ended_s=2.0, tpot_slo_s=0.5, choices=(CHOICE,),
)  # fmt: skip
RUN = Run(
    conditions=Conditions(policy="off", load=0.5, share=0.25, slo_tpot_s=0.5, seed=3, round=1, window="w/off"),
    summary=summarize([RECORD], Window(start_s=0.0, end_s=2.5)),
    engine=EngineStats(planner_p99_s=0.001, unserved=2),
)


def test_a_run_is_written_flat_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(document([RUN, RUN], command="taper bench")), encoding="utf-8")
    body = json.loads(path.read_text(encoding="utf-8"))
    assert (body["schema"], body["command"]) == (SCHEMA, "taper bench")
    assert body["runs"][0]["policy"] == "off"
    assert body["runs"][0]["goodput_tok_s"] == 2.0
    assert body["runs"][0]["planner_p99_s"] == 0.001
    assert read_runs(path) == [RUN, RUN]


def test_fields_with_a_default_may_be_left_out() -> None:
    raw = RUN.to_json()
    for spec in (*fields(Conditions), *fields(EngineStats)):
        if spec.name != "policy":
            del raw[spec.name]
    (run,) = parse_runs({"schema": SCHEMA, "runs": [raw]}, where="x")
    assert run.conditions == Conditions(policy="off")
    assert run.engine == EngineStats()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goodput": 3}, r"x: run 0: unknown field 'goodput'"),
        ({"goodput_tok_s": "fast"}, r"x: run 0: goodput_tok_s: "),
        ({"load": float("nan")}, r"x: run 0: load: "),
        ({"accepted": "perhaps"}, r"x: run 0: accepted: "),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        parse_runs({"schema": SCHEMA, "runs": [{**RUN.to_json(), **change}]}, where="x")


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"x: no taper.runs/1 document"):
        parse_runs({"schema": "taper.demo/1", "runs": []}, where="x")
    with pytest.raises(ResultsError, match="No such file"):
        read_runs(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(ResultsError, match="not JSON"):
        read_runs(tmp_path / "bad.json")


def test_no_two_parts_share_a_field() -> None:
    names = [spec.name for kind in (Conditions, Summary, EngineStats) for spec in fields(kind)]
    assert len(set(names)) == len(names)


def test_the_docs_describe_every_field() -> None:
    text = (Path(__file__).parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    table = text[text.index("| field | unit | meaning |") : text.index("How goodput, attainment")]
    for kind in (Conditions, Summary, EngineStats):
        for spec in fields(kind):
            assert f"`{spec.name}`" in table, spec.name

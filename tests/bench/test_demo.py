"""The demo: its settings, and one short run of the whole thing on the real engine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from taper.bench.driver import WindowPlan
from taper.core.types import ConfigError
from taper.demo import DemoOptions, run_demo
from taper.records import request_file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"seed": -1}, "seed"),
        ({"policies": ()}, "policies"),
        ({"policies": ("off", "off")}, "each once"),
        ({"slo_between": 1.0}, "slo_between"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemoOptions(**settings)  # type: ignore[arg-type]


def test_a_bad_json_path_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        run_demo(DemoOptions(json_path=tmp_path / "no" / "x.json"), Console(file=io.StringIO()))


@pytest.mark.engine
def test_a_short_demo_end_to_end(tmp_path: Path) -> None:
    out, path = io.StringIO(), tmp_path / "demo.json"
    options = DemoOptions(
        rounds=1,
        json_path=path,
        log_path=tmp_path / "server.log",
        plan=WindowPlan(ramp_s=2.0, measure_s=5.0, drain_s=300.0),
    )
    verdict = run_demo(options, Console(file=out))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "goodput, tok/s" in text
    assert verdict.regime_line in text.replace("\n", " ")
    body = json.loads(path.read_text(encoding="utf-8"))
    assert [run["policy"] for run in body["runs"]] == ["off", "eager", "taper"]
    for run in body["runs"]:
        assert run["misses_error"] == 0
        assert run["goodput_tok_s"] <= run["raw_tok_s"]
        assert run["steps"] > 0
    records = [request_file().parse(json.dumps(one)) for one in body["requests"]]
    assert {record.kind for record in records} == {"serial", "branching"}
    # Every branch got exactly the tokens it was asked for, whatever the policy.
    assert all(len({choice.tokens for choice in record.choices}) == 1 for record in records)
    assert all(len(record.choices) == record.branches for record in records)

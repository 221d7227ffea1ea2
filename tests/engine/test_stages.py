"""`taper bench` on the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from taper.cli import cli
from taper.records import request_file
from taper.results import read_runs

pytestmark = pytest.mark.engine


def test_stages(server, tmp_path: Path) -> None:
    """Serial stages, tagged forks and joins: every token comes, whatever the policy, and forks find their prefix."""
    before = server.state()["engines"][0]
    result = CliRunner().invoke(
        cli,
        ["bench", "--out", str(tmp_path), "--url", server.url, "--token", server.config.control_token,
         "--policies", "off,taper", "--branches", "agentic", "--shares", "0.5", "--rates", "2", "--slos-ms", "200",
         "--concurrency", "8", "--output-scale", "0.04", "--steps", "--rounds", "1", "--ramp-s", "1",
         "--measure-s", "6", "--drain-s", "300", "--foreign-cpu", "1"],
    )  # fmt: skip
    server.configure({"policy": before["policy"], "tpot_slo_s": before["tpot_slo_s"]})
    assert result.exit_code == 0, result.output
    runs = read_runs(tmp_path / "runs.json")
    assert [run.policy for run in runs] == ["off", "taper"]
    records = list(request_file().read(tmp_path / "requests.jsonl"))
    assert [record.error for record in records if record.error] == []
    off, taper = (
        {
            record.index: [(choice.stage, choice.tokens) for choice in record.choices]
            for record in records
            if record.policy == policy
        }
        for policy in ("off", "taper")
    )
    assert max(len(choices) for choices in off.values()) > 4
    assert {index: taper[index] for index in off.keys() & taper.keys()} == {
        index: off[index] for index in off.keys() & taper.keys()
    }
    assert all(run.engine.steps > 0 for run in runs)  # a machine that is busy with something else makes few

"""Policies interleaved on one server, and what is made of their windows."""

from __future__ import annotations

import asyncio
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from taper.bench.campaign import Campaign, Findings, order, planned_requests, run_campaign
from taper.bench.client import LoadClient
from taper.bench.control import ControlClient, ControlError
from taper.bench.driver import WindowPlan
from taper.bench.live import display_for
from taper.bench.machine import describe
from taper.bench.report import Setting, check_writable, document, write_json
from taper.bench.table import comparison
from taper.bench.verdict import judge
from taper.core.types import ConfigError, Slo
from taper.records import request_file
from taper.workload import Branching, Lengths, Mix, Regime, Synthetic
from tests.bench.server import FakeEngine, serving

REGIME = Regime(
    name="t",
    source=Synthetic(
        mix=Mix(
            branching_share=0.5,
            serial=Lengths(low=5, high=10),
            branching=Branching(
                at_arrival=True, equal=True, fanout=Lengths(low=2, high=3), branch=Lengths(low=5, high=10)
            ),
        )
    ),
    rate_rps=30.0,
    max_concurrency=8,
    slo=Slo(tpot_s=5.0),
)
CAMPAIGN = Campaign(
    regime=REGIME,
    policies=("off", "eager", "taper"),
    rounds=2,
    seed=4,
    plan=WindowPlan(ramp_s=0.1, measure_s=1.4, drain_s=300.0),
)


def perform(engine: FakeEngine, console: Console, campaign: Campaign = CAMPAIGN) -> Findings:
    async def session() -> Findings:
        async with (
            serving(engine) as url,
            LoadClient(base_url=f"{url}/v1", model="m") as client,
            ControlClient(url=url) as control,
        ):
            with display_for(console, windows=6, plan=campaign.plan) as display:
                return await run_campaign(campaign, client=client, control=control, display=display)

    return asyncio.run(session())


def test_the_order_rotates() -> None:
    assert order(("a", "b", "c"), 0) == ("a", "b", "c")
    assert order(("a", "b", "c"), 1) == ("b", "c", "a")
    assert order(("a", "b", "c"), 3) == ("a", "b", "c")


def test_a_round_has_one_request_sequence_and_the_next_another() -> None:
    assert planned_requests(CAMPAIGN, 1) == planned_requests(CAMPAIGN, 1)
    assert planned_requests(CAMPAIGN, 1) != planned_requests(CAMPAIGN, 0)


@pytest.fixture(scope="module")
def performed() -> tuple[FakeEngine, Findings, str]:
    engine, out = FakeEngine(), io.StringIO()
    findings = perform(engine, Console(file=out, width=100))
    return engine, findings, out.getvalue()


def test_policies_are_switched_interleaved(performed: tuple[FakeEngine, Findings, str]) -> None:
    engine, findings, _ = performed
    switched = [patch["policy"] for patch in engine.patches]
    assert switched == ["off", "eager", "taper", "eager", "taper", "off"]
    assert {(patch["tpot_slo_s"], patch["ttft_slo_s"]) for patch in engine.patches} == {(5.0, 5.0)}
    assert [(run.round, run.policy) for run in findings.runs] == [
        (0, "off"),
        (0, "eager"),
        (0, "taper"),
        (1, "eager"),
        (1, "taper"),
        (1, "off"),
    ]


def test_each_window_has_its_summary_and_the_engines_account(
    performed: tuple[FakeEngine, Findings, str],
) -> None:
    assert max(run.summary.goodput_tok_s for run in performed[1].runs) > 0
    for run in performed[1].runs:
        assert run.summary.misses_error == 0
        assert 0 <= run.summary.goodput_tok_s <= run.summary.raw_tok_s
        assert run.engine.planner_p99_s == 0.0001
        assert run.engine.predictor_mape == 0.03
        assert run.engine.steps <= 1  # of the two records one lies far before the window
        assert run.to_json()["goodput_tok_s"] == run.summary.goodput_tok_s


def test_the_same_requests_go_to_every_policy_of_a_round(
    performed: tuple[FakeEngine, Findings, str],
) -> None:
    shapes = {
        (record.policy, record.index): (record.kind, record.branches, record.tokens)
        for record in performed[1].records
        if record.round == 0
    }
    assert len({policy for policy, _ in shapes}) == 3
    for (policy, index), shape in shapes.items():
        if policy != "off" and ("off", index) in shapes:
            assert shapes["off", index] == shape


def test_output_that_is_no_terminal_has_no_control_codes(
    performed: tuple[FakeEngine, Findings, str],
) -> None:
    text = performed[2]
    assert "\x1b" not in text
    assert text.count("round 1  ") == 3
    assert "round 1/2  off: 2 s of load, then drain" in text


def test_on_a_terminal_the_live_line_is_drawn() -> None:
    out = io.StringIO()
    once = Campaign(regime=REGIME, policies=("taper",), rounds=1, seed=1, plan=CAMPAIGN.plan)
    perform(FakeEngine(), Console(file=out, force_terminal=True, width=140), once)
    assert "protected   3  extra   2  deferred   4" in out.getvalue()


def test_the_document_can_be_read_back(performed: tuple[FakeEngine, Findings, str], tmp_path: Path) -> None:
    findings = performed[1]
    setting = Setting(campaign=CAMPAIGN, model="m", machine=describe(), profile={}, created="2026-01-01")
    path = tmp_path / "demo.json"
    write_json(path, document(setting, findings, judge(findings.runs, REGIME.slo)))
    body = json.loads(path.read_text(encoding="utf-8"))
    assert body["schema"] == "taper.demo/1"
    assert [run["policy"] for run in body["runs"]] == [run.policy for run in findings.runs]
    assert set(body["ratios"]["goodput_tok_s"]) == {"taper/off", "taper/eager"}
    assert body["summary"]["off"]["predictor_mape"]["median"] == 0.03
    assert [request_file().parse(json.dumps(one)) for one in body["requests"]] == findings.records
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_has_a_column_per_policy(performed: tuple[FakeEngine, Findings, str]) -> None:
    out = io.StringIO()
    table = comparison(performed[1].runs, CAMPAIGN.policies, subject="taper", title="T")
    Console(file=out, width=140).print(table)
    text = out.getvalue()
    for word in ("off", "eager", "taper", "taper/off", "goodput", "victim TPOT p50", "planner p99"):
        assert word in text


def test_an_unknown_policy_stops_the_campaign_with_the_servers_words() -> None:
    wrong = Campaign(regime=REGIME, policies=("nonsense",), rounds=1, seed=1, plan=CAMPAIGN.plan)
    with pytest.raises(ControlError, match="http 400: policy 'nonsense' is unknown"):
        perform(FakeEngine(), Console(file=io.StringIO()), wrong)


def test_a_path_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    with pytest.raises(ConfigError, match="cannot write"):
        check_writable(tmp_path / "missing" / "new.json")
    with pytest.raises(ConfigError, match="is a directory"):
        check_writable(tmp_path)


def test_the_machine_is_described() -> None:
    machine = describe()
    assert machine.cores >= 1
    assert machine.cpu
    assert math.isfinite(machine.memory_gib or 1.0)

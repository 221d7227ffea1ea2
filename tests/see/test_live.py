"""What an engine replica counts, and what it tells those who watch it."""

from __future__ import annotations

import json

import pytest

from taper.engines.vllm import control
from taper.engines.vllm.live import MAX_BRANCHES, live, slack_quantiles_s
from taper.engines.vllm.tally import Histogram, Tally
from tests.vllm import harness
from tests.vllm.harness import fork, request, server_config

pytestmark = pytest.mark.vllm


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def make(request, monkeypatch, tmp_path):
    def build(**kwargs):
        driver = harness.make(monkeypatch, tmp_path, is_async=request.param, **kwargs)
        driver.taper.onlooker.tally = Tally(driver.now_s)
        return driver

    return build


def lane(driver, at=0):
    return live(driver.taper)["lanes"][at]


def test_a_lane_shows_what_each_branch_does(make):
    driver = make(config=server_config(policy="cap:2"))
    driver.add(*fork("p", 5, tokens=30), request("s", tokens=30))
    for _ in range(12):
        driver.step()
    forked, serial = live(driver.taper)["lanes"]
    assert (forked["number"], forked["kind"], forked["branches"], forked["finished"]) == (1, "n", 5, 0)
    assert sorted(forked["roles"]) == sorted("PE" + "H" * 3)
    assert (serial["number"], serial["roles"], serial["progress"]) == (2, "P", [serial["tokens"]])
    assert forked["tokens"] == sum(forked["progress"])
    while lane(driver)["branches"] == 5:
        driver.step()
    assert lane(driver)["finished"] == 5 - lane(driver)["branches"]
    driver.run()
    assert live(driver.taper)["lanes"] == []


def test_deferred_prompt_and_waiting_branches(make):
    driver = make(config=server_config(policy="eager"), rows=4)
    driver.add(*fork("p", 3, tokens=60), request("long", prompt=400, tokens=5), request("late", tokens=5))
    seen = set()
    for _ in range(8):
        driver.step()
        seen |= {role for one in live(driver.taper)["lanes"] for role in one["roles"]}
    assert seen >= set("PEFW")
    driver.taper.controller.replace(policy=server_policy("off"))
    for _ in range(6):
        driver.step()
    assert lane(driver)["roles"].count("D") == 2


def server_policy(name):
    from taper.config import resolve_policy

    return resolve_policy(name)


def test_it_names_no_client_and_is_plain_json(make):
    driver = make()
    driver.add(request("secret-id", xargs={"taper_group": "secret-group"}), *fork("secret-parent", 3))
    for _ in range(5):
        driver.step()
    text = json.dumps(live(driver.taper), allow_nan=False)
    assert "secret" not in text
    assert json.loads(text)["lanes"][0]["kind"] == "tag"


def test_wide_requests_are_cut_not_refused(make):
    driver = make(rows=128)
    driver.add(*fork("p", 100))
    for _ in range(4):
        driver.step()
    shown = lane(driver)
    assert (shown["branches"], len(shown["roles"]), len(shown["progress"])) == (100, MAX_BRANCHES, MAX_BRANCHES)


def test_counters_add_up(make):
    driver = make(config=server_config(policy="cap:2"))
    driver.add(*fork("p", 4, tokens=20), request("s", tokens=20))
    driver.run()
    counters = control.snapshot(driver.taper)["counters"]
    assert sum(counters["endings"].values()) == driver.taper.steps
    assert counters["classes"]["serial"]["met"] == 1
    assert counters["classes"]["branching"]["met"] == 1
    assert counters["classes"]["branching"]["goodput_tokens"] == 80
    assert (counters["forks"], counters["joins"]) == (1, 1)
    assert sum(counters["step_s"]["counts"]) == driver.taper.steps
    rows = counters["row_steps"]
    # 2 + 2 prompts of the step a branch starts in are no decode rows, so they are no rows of the widths either.
    assert counters["widths"]["sum"] == pytest.approx(rows["protected"] + rows["extra"], abs=5)
    assert counters["widths"]["counts"][1] > 0
    assert sum(counters["widths"]["counts"][2:]) == 0


def test_misses_have_a_cause(make):
    driver = make(config=server_config(policy="eager"), rows=64)
    driver.step_s = 0.2  # four times the SLO, whatever runs
    driver.add(request("slow", tokens=10))
    driver.run()
    driver.add(request("gone", tokens=50))
    for _ in range(5):
        driver.step()
    driver.abort("gone")
    driver.add(request("one", tokens=1))
    driver.run()
    serial = control.snapshot(driver.taper)["counters"]["classes"]["serial"]
    assert serial["missed"] == {"extras": 0, "baseline": 1, "aborted": 1}
    assert (serial["met"], serial["unjudged"]) == (0, 1)
    recent = driver.taper.onlooker.tally.recent(driver.now_s)
    assert (recent["attainment"], recent["attainment_branching"], recent["judged"]) == (0.0, None, 2)


def test_the_timeline_has_a_row_a_second_and_sends_only_what_is_new(make):
    driver = make()
    driver.add(*fork("p", 3, tokens=100))
    driver.run()
    everything = driver.taper.onlooker.tally.timeline(0)
    seconds = [row[0] for row in everything]
    assert seconds == sorted(set(seconds))
    assert 2 <= len(seconds) <= 4
    assert sum(row[1] for row in everything) == driver.taper.steps
    assert driver.taper.onlooker.tally.timeline(int(seconds[-1])) == everything[-1:]
    for _ in range(400):
        driver.taper.onlooker.tally._second(driver.now_s)
        driver.now_s += 1
    assert len(driver.taper.onlooker.tally.timeline(0)) == 300


def test_slack_of_the_last_planned_step(make):
    driver = make()
    driver.add(*fork("p", 3, tokens=40), request("s", tokens=40, xargs={"taper_tpot_slo_ms": 200}))
    for _ in range(10):
        driver.step()
    least, median = slack_quantiles_s(driver.taper)
    assert least == pytest.approx(driver.taper.onlooker.last_decision.plan.slack_min_s)
    assert least < median
    driver.run()
    driver.add(request("alone"))
    for _ in range(6):
        driver.step()
    assert slack_quantiles_s(driver.taper) is None  # nothing to decide: no slack was looked at


def test_histogram_buckets():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.report() == {"bounds": [1.0, 2.0], "counts": [2, 2, 1], "sum": 14.0}

"""What people see of a real engine under load: page, metrics in Prometheus, terminal, trace.

TAPER_SCREENSHOTS=docs/img writes the pictures of the docs, from a load that has run for more than a minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from taper.cli import cli
from taper.client import by_protocol
from taper.config import ServerConfig, resolve_policy
from taper.core.types import Slo
from taper.engines.vllm.calibrate import calibrate
from taper.engines.vllm.launch import Server, free_port
from taper.model import embedded_model
from taper.profile import Profile, ProfileKey
from taper.trace.file import read_trace
from taper.trace.replay import replay
from tests.see import browsing
from tests.see.browsing import LAPTOP, PHONE, page, serious_findings, shot, until
from tests.waiting import eventually

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "monitoring"
PROMPTS = ("Write a story about a lighthouse.", "Plan a trip to the sea.", "Explain rain to a child.")
SLO_BETWEEN = 0.5  # of the way from a step with one branch per request to one with all of them
TAKES_PICTURES = bool(os.environ.get("TAPER_SCREENSHOTS"))


@contextmanager
def under_load(server: Server) -> Iterator[None]:
    """Programs, wide and serial requests, one after the other in each of eight clients."""
    stop = threading.Event()
    program = {"lead_tokens": 40, "stages": [{"branches": 3, "tokens": 20, "then_tokens": 8}]}
    shapes = [by_protocol("scripted", options=program), {"n": 12, "max_tokens": 60}, {"n": 8, "max_tokens": 60}]
    shapes += [{"max_tokens": 80}] * 5

    def client(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=900, trust_env=False) as http:
            body = {"messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}], "ignore_eos": True}
            while not stop.is_set():
                http.post("/v1/chat/completions", json=body | shapes[number])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(shapes))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def load(server) -> Iterator[None]:
    """Until the module is through."""
    with under_load(server):
        yield


@pytest.fixture
def browser():
    yield from browsing.browser()


def test_a_protocol_streams_in_the_playground(server, browser):
    def with_an_outline(route: Any) -> None:
        """Its form is made sure of, so that no near-tie of the model's decides what is tested."""
        body = route.request.post_data_json
        body["taper"] |= {"opening_regex": r"1\. [a-z ]{8,24}\n2\. [a-z ]{8,24}\n3\. [a-z ]{8,24}"}
        route.continue_(post_data=json.dumps(body))

    titles = "[...document.querySelectorAll('#outputs h3 span:first-child')].map(title => title.textContent).join()"
    done = "document.getElementById('play-note').textContent.startsWith('done')"
    with page(browser, f"{server.url}/taper") as tab:
        until(tab, "document.getElementById('status').textContent === 'live'")
        tab.select_option("#protocol", "scripted")
        tab.fill("#branches", "4")
        tab.fill("#tokens", "80")
        tab.click("#go")
        until(tab, "/^1 request, /.test(document.getElementById('lanes-note').textContent)")
        until(tab, done)
        assert tab.inner_text("#play-note").startswith("done: 480 tokens")
        assert tab.evaluate(titles) == "Root,Branch 1,Branch 2,Branch 3,Branch 4"
        tab.route("**/v1/chat/completions", with_an_outline)
        tab.select_option("#protocol", "skeleton-of-thought")
        tab.fill("#tokens", "24")
        tab.click("#go")
        until(tab, f"{done} && {titles} === 'Root,Branch 1,Branch 2,Branch 3'")
        root, *points = tab.evaluate("[...document.querySelectorAll('#outputs p')].map(text => text.textContent)")
        for line, point in zip(root.split("\n"), points, strict=True):  # the point's header tidies spaces and marks
            assert re.findall(r"\w+", point)[: len(re.findall(r"\w+", line))] == re.findall(r"\w+", line)


def median_step_s(server: Server, policy: str) -> float:
    server.configure({"policy": policy})
    time.sleep(5)  # what the policy before it left
    server.drain_steps()
    time.sleep(8)
    (records,) = server.drain_steps()["engines"]
    return statistics.median(record["measured_s"] for record in records if record["ending"] == "clean")


@pytest.fixture
def shown(server, tmp_path) -> Iterator[Server]:
    """A calibrated server under load, with an SLO that this machine can keep, though not with every branch at once."""
    profile = calibrate(server.url, server.control_headers, budget_s=30, apply=False).profile
    with under_load(server):
        narrow_s, wide_s = median_step_s(server, "off"), median_step_s(server, "eager")
    server.configure({"policy": "taper"})
    config = ServerConfig(profile=profile.to_json(), slo=Slo(tpot_s=narrow_s + SLO_BETWEEN * (wide_s - narrow_s)))
    log = tmp_path / "vllm.log"
    with Server(str(embedded_model()), config=config, embedded=True, log=log) as running, under_load(running):
        time.sleep(75)
        yield running


@pytest.mark.skipif(not TAKES_PICTURES, reason="TAPER_SCREENSHOTS names no folder")
def test_pictures_for_the_docs(shown, browser):
    for name, size, scheme in (
        ("page", LAPTOP, "light"),
        ("page-dark", LAPTOP, "dark"),
        ("page-phone", PHONE, "light"),
        ("page-phone-dark", PHONE, "dark"),
    ):
        with page(browser, f"{shown.url}/taper", size=size, scheme=scheme) as tab:
            until(tab, "document.getElementById('status').textContent === 'live'")
            tab.fill("#branches", "4")
            tab.click("#go")
            until(tab, "document.getElementById('play-note').textContent.startsWith('done')")
            shot(tab, name)


def test_the_page_shows_a_real_load_and_its_playground_streams(server, load, browser):
    with page(browser, f"{server.url}/taper") as tab:
        until(tab, "document.getElementById('status').textContent === 'live'")
        until(tab, "/^[1-9].* requests?, [1-9].* branch/.test(document.getElementById('lanes-note').textContent)")
        tab.click("#table-box summary")
        rows = "[...document.querySelectorAll('#table tr')].map(row => row.innerText).join()"
        before = tab.evaluate(rows)
        until(tab, f"before => {rows} !== before", before)
        tab.fill("#branches", "4")
        tab.fill("#tokens", "24")
        tab.click("#go")
        until(tab, "document.querySelectorAll('#outputs p:not(:empty)').length === 4")
        until(tab, "document.getElementById('play-note').textContent.startsWith('done')")
        assert tab.is_disabled("#apply")
        assert serious_findings(tab) == []


def test_the_terminal_shows_it_too(server, load):
    def once() -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["top", server.url, "--once"], env={"COLUMNS": "130"})
        return result.exit_code, result.stdout

    # An engine that has been silent for two seconds is no error of the terminal's, which says so.
    _, text = eventually(once, lambda found: found[0] == 0 and re.search(r"rows \d+: \d+ protected", found[1]))
    assert re.search(r"policy taper(, learning)?, SLO 30 ms per token", text)


def queries() -> list[tuple[str, str]]:
    """(panel title, query) of every panel of the dashboard, variables filled in."""
    dashboard = json.loads((EXAMPLE / "grafana" / "dashboards" / "taper.json").read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*").replace("$engine", ".*")
            found.append((panel["title"], query))
    return found


@pytest.fixture
def bounded(server) -> Iterator[None]:
    """A law and an SLO with which steps have a budget on any machine; the panels show one."""
    key = ProfileKey(model="m", dtype="d", device="any", parallel="tp1-pp1-dp1", vllm="any")
    law = {"base_s": 0.03, "row_s": 5e-4, "context_s": 1e-6, "prefill_s": 4e-4}
    server.configure({"profile": Profile(key=key, coefficients=law).to_json(), "tpot_slo_s": 1.0})
    yield
    server.configure({"profile": None, "tpot_slo_s": 0.03})


def test_every_panel_of_the_dashboard_has_data(server, load, bounded, tmp_path):
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine (Debian and Ubuntu: apt install prometheus)")
    config = (EXAMPLE / "prometheus.yml").read_text()
    assert "127.0.0.1:8000" in config
    config = config.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("5s", "1s")
    (tmp_path / "prometheus.yml").write_text(config)
    port = free_port()
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    missing = queries()
    assert len(missing) > 25
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as http:
                deadline = time.monotonic() + 150
                while missing and time.monotonic() < deadline:
                    time.sleep(2)
                    missing = [query for query in missing if not has_data(http, query[1])]
        finally:
            process.terminate()
            process.wait(120)
    assert missing == []


def has_data(http: httpx.Client, query: str) -> bool:
    """Whether the query had a finite value in the last minute. A refused query is an error, not an absence."""
    now = time.time()
    try:
        answer = http.get("/api/v1/query_range", params={"query": query, "start": now - 60, "end": now, "step": 1})
    except httpx.TransportError:
        return False  # it is still starting
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return False
    assert answer.status_code == httpx.codes.OK, answer.text
    return any(value != "NaN" for series in answer.json()["data"]["result"] for _, value in series["values"])


def test_the_trace_of_a_real_engine_decides_again_the_same(server, load):
    time.sleep(1)
    decisions = list(read_trace(Path(server.config.trace)))
    found = replay(decisions, None, resolve_policy)
    assert found.identical == found.decisions > 50
    assert all(not decision.view.request.size or decision.plan.run.any() for decision in decisions)

"""The live page in a real browser, over a real scheduler: loads, moves, bears a thousand requests, comes back."""

from __future__ import annotations

import pytest

from taper.config import ServerConfig
from tests.see.browsing import LAPTOP, PHONE, page, serious_findings, until
from tests.see.stage import Stage
from tests.vllm import harness
from tests.vllm.harness import PROFILE, fork, request

pytestmark = pytest.mark.vllm


@pytest.fixture
def driver(monkeypatch, tmp_path):
    def build(**kwargs):
        config = ServerConfig(**{"profile": PROFILE, **kwargs})
        return harness.make(
            monkeypatch,
            tmp_path,
            is_async=True,
            config=config,
            rows=4096,
            step_tokens=8192,
            max_model_len=2048,
            blocks=60000,
        )

    return build


def live(tab):
    until(tab, "document.getElementById('status').textContent === 'live'")


# The tokens of all requests, as the table of lanes gives them.
TOKENS = (
    "[...document.querySelectorAll('#table td:nth-child(3)')]"
    ".reduce((sum, cell) => sum + Number(cell.textContent.replace(/,/g, '')), 0)"
)


@pytest.mark.parametrize(("size", "scheme"), [(LAPTOP, "light"), (LAPTOP, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_it_loads_moves_and_is_accessible(browser, driver, size, scheme):
    scene = driver()
    scene.add(
        *fork("a", 8, tokens=1500), *fork("b", 12, tokens=1500), *[request(f"s{i}", tokens=1500) for i in range(6)]
    )
    with Stage(scene) as stage, page(browser, f"{stage.url}/taper", size=size, scheme=scheme) as tab:
        live(tab)
        assert tab.title() == "TAPER live"
        until(tab, "document.getElementById('lanes-note').textContent === '8 requests, 26 branches'")
        tab.click("#table-box summary")
        before = tab.evaluate(TOKENS)
        until(tab, f"before => {TOKENS} > before", before)
        assert tab.inner_text("#policy") == "taper"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        assert serious_findings(tab) == []
        assert "predicted step" in tab.inner_text("#charts")


def test_a_thousand_requests_do_not_freeze_it(browser, driver):
    scene = driver()
    for index in range(1000):
        scene.add(*fork(f"g{index}", 4, prompt=4, tokens=1500))
    with Stage(scene) as stage, page(browser, f"{stage.url}/taper") as tab:
        live(tab)
        until(tab, "document.getElementById('lanes-note').textContent.startsWith('1000 requests')")
        elements = tab.evaluate("document.querySelectorAll('*').length")
        assert elements < 400  # bounded, however many requests there are
        for top in (5000, 27_000, 0):
            tab.evaluate("top => document.getElementById('lanes').scrollTo(0, top)", top)
            # Animation frames go on: the page answers while a thousand lanes are shown.
            assert tab.evaluate(
                "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
            )
        tab.click("#table-box summary")
        tab.wait_for_selector("#table tr:nth-child(100)", state="attached")
        assert tab.locator("#table tr").count() == 100


def test_the_playground_streams_its_branches_side_by_side(browser, driver):
    with Stage(driver()) as stage, page(browser, f"{stage.url}/taper") as tab:
        live(tab)
        tab.fill("#branches", "4")
        tab.fill("#tokens", "30")
        tab.click("#go")
        until(tab, "document.getElementById('play-note').textContent.startsWith('done: 120 tokens')")
        texts = tab.locator("#outputs p").all_inner_texts()
        assert [text.split()[0] for text in texts] == ["b0w0", "b1w0", "b2w0", "b3w0"]
        assert all(len(text.split()) == 30 for text in texts)
        tab.fill("#tokens", "4096")
        tab.click("#go")
        until(tab, "document.querySelector('#outputs p').textContent.includes('b0w3')")
        tab.click("#stop")
        until(tab, "document.getElementById('play-note').textContent.startsWith('stopped')")
        assert {state for _, state, _ in cards(tab)} == {"cut short"}


def cards(tab):
    """(title, state, text) of every card of the playground."""
    found = tab.evaluate(
        "[...document.querySelectorAll('#outputs li')].map(card => [...card.querySelectorAll('h3 span, p')]"
        ".map(part => part.textContent))"
    )
    return [tuple(card) for card in found]


def note(tab, words):
    until(tab, "words => document.getElementById('play-note').textContent.includes(words)", words)


def test_the_playground_follows_a_protocol(browser, driver):
    with Stage(driver()) as stage, page(browser, f"{stage.url}/taper") as tab:
        live(tab)
        tab.fill("#branches", "24")
        tab.select_option("#protocol", "skeleton-of-thought")
        assert tab.input_value("#branches") == "10"  # as many as it can have
        tab.click("#go")
        note(tab, "done: ")
        assert cards(tab) == [
            ("Root", "stop", "1. Sun\n2. Moon\n3. Sky"),
            ("Branch 1", "stop", "1. Sun: hot.\n\n"),
            ("Branch 2", "stop", "2. Moon: cold.\n\n"),
            ("Branch 3", "stop", "3. Sky: blue.\n\n"),
        ]
        assert tab.inner_text("#play-note").startswith("done: 38 tokens in ")
        assert serious_findings(tab) == []
        tab.select_option("#protocol", "scripted")
        tab.fill("#tokens", "5")
        tab.fill("#branches", "2")
        tab.click("#go")
        note(tab, "done: 20 tokens")
        root, *branches = cards(tab)
        assert root == ("Root", "length", " blue\n blue")
        assert branches == [("Branch 1", "length", "\n blue"), ("Branch 2", "length", "\n blue")]
        tab.select_option("#protocol", "off")
        tab.click("#go")
        note(tab, "done: 10 tokens")
        assert [card[:2] for card in cards(tab)] == [("Branch 1", "length"), ("Branch 2", "length")]


def test_the_playground_says_what_went_wrong(browser, driver):
    with Stage(driver()) as stage, page(browser, f"{stage.url}/taper") as tab:
        tab.expected_errors.append("400")
        live(tab)
        tab.select_option("#protocol", "scripted")
        tab.fill("#branches", "17")  # the toy engine holds 16 rows
        tab.click("#go")
        note(tab, "Failed: HTTP 400: ")
        assert "17 branches at once" in tab.inner_text("#play-note")
        tab.select_option("#protocol", "skeleton-of-thought")
        tab.fill("#prompt", "With a bang?")
        tab.click("#go")
        note(tab, "Failed: the answer is incomplete: ")
        assert "out of luck" in tab.inner_text("#play-note")
        tab.fill("#prompt", "An eclipse?")
        tab.click("#go")
        note(tab, "done in part, branch 0.2 ended with error: RuntimeError: no moon; ")
        assert [state for _, state, _ in cards(tab)] == ["stop", "stop", "RuntimeError: no moon", "stop"]


def test_settings_are_off_unless_allowed(browser, driver):
    with Stage(driver()) as stage, page(browser, f"{stage.url}/taper") as tab:
        live(tab)
        assert tab.is_disabled("#apply")
        assert "--taper-allow-control" in tab.inner_text("#settings-why")


def test_changing_the_policy_needs_the_key(browser, driver):
    scene = driver(allow_control=True)
    with Stage(scene, api_key="k3y") as stage, page(browser, f"{stage.url}/taper") as tab:
        tab.expected_errors.append("401")
        live(tab)
        tab.fill("#new-policy", "off")
        tab.click("#apply")
        until(tab, "document.getElementById('settings-note').textContent.includes('Refused: HTTP 401')")
        assert scene.taper.controller.policy.name == "taper"
        tab.fill("#control-key", "k3y")
        tab.click("#apply")
        until(tab, "document.getElementById('settings-note').textContent.startsWith('In force: off')")
        assert scene.taper.controller.policy.name == "off"
        until(tab, "document.getElementById('policy').textContent === 'off'")


def test_it_survives_a_server_that_goes_away_and_comes_back(browser, driver):
    scene = driver()
    scene.add(*fork("a", 4, tokens=1500))
    with Stage(scene) as stage:
        context = page(browser, f"{stage.url}/taper")
        tab = context.__enter__()
        tab.expected_errors.append("net::ERR_")
        live(tab)
    until(tab, "document.getElementById('status').textContent.startsWith('no answer, trying again')")
    with Stage(scene, port=stage.port):
        live(tab)
        context.__exit__(None, None, None)

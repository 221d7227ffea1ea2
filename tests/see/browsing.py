"""Chromium through Playwright, for the tests here and for those with a real engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server",
)  # fmt: skip
PATIENCE_S = 300.0  # the page is drawn by two cores that may also run a model
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SERIOUS = {"serious", "critical"}


def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine (Debian and Ubuntu: apt install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright is not installed; it comes with the dev extra")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@contextmanager
def page(chromium: Any, url: str, *, size: dict[str, int] = LAPTOP, scheme: str = "light") -> Iterator[Any]:
    """An open page; on leaving, whatever it said on its console must not be an error."""
    context = chromium.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1)
    context.set_default_timeout(PATIENCE_S * 1000)
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.expected_errors = []
    try:
        tab.goto(url)
        yield tab
        unexpected = [text for text in wrong if not any(words in text for words in tab.expected_errors)]
        assert unexpected == []
    finally:
        context.close()


def until(tab: Any, condition: str, argument: Any = None, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until a JavaScript expression, or function of `argument`, is true; the page's own policy forbids
    Playwright's way of doing that inside the page."""
    for _ in range(round(patience_s / 0.05)):
        if tab.evaluate(condition, argument):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never true on the page: {condition}; its status: {tab.inner_text('#status')}")


def serious_findings(tab: Any) -> list[str]:
    """What axe finds serious or worse, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    response = Axe().run(tab).response
    assert len(response["passes"]) > 10  # it did look
    violations = response["violations"]
    return [
        f"{found['id']}: {node['target']}"
        for found in violations
        if found["impact"] in SERIOUS
        for node in found["nodes"]
    ]


def shot(tab: Any, name: str) -> None:
    folder = os.environ.get("TAPER_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=f"{folder}/{name}.png", full_page=True)

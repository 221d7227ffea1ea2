"""A browser for the tests of the page. What they need and this machine lacks is named when they are skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.see import browsing

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = [f"test_{name}.py" for name in ("page", "metrics", "trace", "live", "spans", "routes")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium for one module: while Playwright is at work no other test may run an event loop of its own."""
    yield from browsing.browser()

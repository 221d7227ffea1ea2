"""Figures of the fuzz tests at the end of a run: one that exercised nothing must not look like one that did."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.fuzz.explore import Tally

TALLIES = pytest.StashKey[list[Tally]]()

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_scheduler.py"]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    found = Tally(request.node.name.removeprefix("test_"))
    request.config.stash.setdefault(TALLIES, []).append(found)
    return found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for tally in config.stash.get(TALLIES, []):
        terminalreporter.write_line(f"fuzz {tally}")

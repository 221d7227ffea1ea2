"""Figures of the fuzz tests at the end of a run: one that exercised nothing must not look like one that did."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz.explore import Tally

PROPERTY = "fuzz"  # reports carry it, also from the workers of pytest-xdist

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_scheduler.py"]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    found = Tally(request.node.name.removeprefix("test_"))
    yield found
    request.node.user_properties.append((PROPERTY, str(found)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ends = [
        one for reports in terminalreporter.stats.values() for one in reports if getattr(one, "when", "") == "teardown"
    ]
    for report in ends:
        for name, figures in report.user_properties:
            if name == PROPERTY:
                terminalreporter.write_line(f"fuzz {figures}")

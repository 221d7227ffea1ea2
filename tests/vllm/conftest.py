"""Everything in this folder needs vLLM, and no engine unless it says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_async: bool) -> Callable[..., Any]:
    """Build a `Driver` over a TaperScheduler; see `harness.make`."""
    from tests.vllm import harness

    def build(**kwargs: Any) -> Any:
        return harness.make(monkeypatch, tmp_path, is_async=is_async, **kwargs)

    return build

"""The set-up script refuses what it must not act on: it removes the folder it is told to make anew."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["/..", "0.30.0/../..", "latest", "-r", "0.30 0"])
def test_a_version_that_is_none_is_refused_before_anything_is_touched(version: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/setup.sh")],
        env={**os.environ, "VLLM": version},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"set-up failed: VLLM is a release such as 0.32.0, not '{version}'\n"

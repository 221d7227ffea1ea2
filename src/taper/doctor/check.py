"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]

REINSTALL = "Install again: pip install 'taper-llm[cpu]' (or [cuda] on a GPU machine)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found. `advice` says what to do and is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""

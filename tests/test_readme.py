"""The README says what the code says: knobs, commands, claim fields."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from taper.claims import FIELDS
from taper.cli import cli
from taper.core.policies import BUILTIN
from taper.core.types import Knobs

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("knob", fields(Knobs), ids=lambda knob: knob.name)
def test_every_knob_with_its_default_and_range(knob):
    meta = knob.metadata
    row = f"| `{knob.name}` | {knob.default:g} | {meta['low']:g} to {meta['high']:g} | {meta['unit']} | {meta['doc']} |"
    assert row in README


@pytest.mark.parametrize("name", [*BUILTIN, *FIELDS, *(f"taper {name}" for name in cli.commands)])
def test_every_policy_claim_and_command_is_there(name):
    assert f"`{name}" in README

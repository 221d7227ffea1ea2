"""The README and the page of settings say what the code says: knobs, commands, claim fields, settings."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from taper.claims import FIELDS, ClaimLimits
from taper.cli import cli
from taper.config import ServerConfig
from taper.core.policies import BUILTIN
from taper.core.types import Knobs, Slo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("knob", fields(Knobs), ids=lambda knob: knob.name)
def test_every_knob_with_its_default_and_range(knob):
    meta = knob.metadata
    row = f"| `{knob.name}` | {knob.default:g} | {meta['low']:g} to {meta['high']:g} | {meta['unit']} | {meta['doc']} |"
    assert row in README


@pytest.mark.parametrize("name", [*BUILTIN, *FIELDS, *(f"taper {name}" for name in cli.commands)])
def test_every_policy_claim_and_command_is_there(name):
    assert f"`{name}" in README


@pytest.mark.parametrize("setting", [*fields(ServerConfig), *fields(ClaimLimits)], ids=lambda setting: setting.name)
def test_every_setting_is_there_with_its_default(setting):
    row = next((line for line in SETTINGS.splitlines() if line.startswith(f"| `{setting.name}` |")), "")
    shown = row.split("|")[2].strip().strip("`") if row else ""
    if setting.name not in ("slo", "knobs", "limits"):
        assert json.loads(shown) == setting.default
    assert shown


def test_the_slo_shown_is_the_default():
    assert f'`{{"tpot_s": {Slo().tpot_s}, "ttft_s": {Slo().ttft_s}}}`' in SETTINGS

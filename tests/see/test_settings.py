"""`--taper-trace` and its settings: what is refused, before any engine starts."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from taper.cli import cli
from taper.config import ServerConfig
from taper.core.types import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trace": ""}, "trace must be the path of a file, not ''"),
        ({"trace": 3}, "trace must be the path of a file, not 3"),
        ({"trace_mib": 0}, "trace_mib must be an integer from 1 to 65536 MiB, not 0"),
        ({"trace_mib": 1.5}, "trace_mib must be an integer"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**settings)


def test_they_travel_to_the_engine(tmp_path):
    config = ServerConfig(trace=str(tmp_path / "t.jsonl"), trace_mib=3)
    assert ServerConfig.from_json(config.to_json(), where="x") == config


def test_a_trace_that_cannot_be_written_is_refused_at_once(tmp_path):
    for path in ("/nowhere/t.jsonl", str(tmp_path)):
        result = CliRunner().invoke(cli, ["serve", "--taper-trace", path])
        assert result.exit_code == 2
        assert f"--taper-trace {path}: not a file that can be written" in result.stderr

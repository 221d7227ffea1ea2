"""Settings and claims: what is refused, and in which words."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from taper import config
from taper.claims import ClaimLimits, parse_claims
from taper.config import ENV_VAR, ServerConfig, resolve_policy
from taper.core.policies import FixedCap
from taper.core.types import ConfigError, Slo

HERE = __name__


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "TAPER_CONFIG: not JSON"),
        ('{"slo":' * 5000, "TAPER_CONFIG: not JSON: maximum recursion"),
        (f'{{"record_steps": {"9" * 5000}}}', "TAPER_CONFIG: not JSON: Exceeds the limit"),
        ('{"speed": 1}', "TAPER_CONFIG: unknown key 'speed' in config"),
        ('{"policy": "fast"}', "unknown policy 'fast'"),
        ('{"slo": {"tpot_s": 0}}', "tpot_s must be between"),
        ('{"slo": {"tpot_s": NaN}}', "tpot_s must be between"),
        (f'{{"slo": {{"tpot_s": 1{"0" * 400}}}}}', "tpot_s must be between"),
        ('{"knobs": {"reserve_slos": 1}}', "unknown key 'reserve_slos' in knobs"),
        ('{"limits": {"tightest_slo": 2}}', "limits.tightest_slo must be between"),
        ('{"limits": {"max_branches": 0}}', "limits.max_branches must be an integer"),
        ('{"group_secret": "short"}', "group_secret must be a string of at least 16"),
        ('{"record_steps": 0}', "record_steps must be an integer"),
        ('{"control_token": 5}', "control_token must be a string"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.setenv(ENV_VAR, text)
    with pytest.raises(ConfigError, match=words):
        ServerConfig.from_env()


def test_a_file_that_is_not_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe")
    monkeypatch.setenv(ENV_VAR, str(path))
    with pytest.raises(ConfigError, match=r"config\.json', which cannot be read: 'utf-8' codec"):
        ServerConfig.from_env()


def test_settings_survive_their_json() -> None:
    settings = ServerConfig(policy="cap:3", slo=Slo(tpot_s=0.0637), limits=ClaimLimits(tightest_slo=0.5))
    assert ServerConfig.from_json(settings.to_json(), where="here") == settings


class Named(FixedCap):
    """A policy from another package."""


def mine() -> Named:
    return Named(2)


def nameless() -> object:
    return object()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"mine": f"{HERE}:mine", "nameless": f"{HERE}:nameless", "gone": "no_such_package:policy"}
    group = config.POLICY_ENTRY_POINTS
    installed = [EntryPoint(name=name, value=value, group=group) for name, value in points.items()]
    monkeypatch.setattr(config, "entry_points", lambda group: installed)


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_is_refused_by_name_and_only_when_asked_for() -> None:
    assert isinstance(resolve_policy("mine"), Named)
    assert resolve_policy("taper").name == "taper"
    with pytest.raises(ConfigError, match=r"'gone' \(no_such_package:policy\) cannot be loaded: ModuleNotFoundError"):
        resolve_policy("gone")
    with pytest.raises(ConfigError, match=r"'nameless' .* cannot be loaded: AttributeError.*name"):
        resolve_policy("nameless")
    with pytest.raises(ConfigError, match=r"known: cap:N .*gone, mine, nameless"):
        resolve_policy("other")


@pytest.mark.parametrize("slo_ms", [50.0, 63.7, 127.9, 254.3])
def test_the_servers_own_slo_may_be_claimed_and_nothing_tighter(slo_ms: float) -> None:
    server = Slo(tpot_s=slo_ms / 1000)
    claimed = parse_claims({"taper_tpot_slo_ms": slo_ms}, ClaimLimits(), server)
    assert claimed.slo.tpot_s == pytest.approx(server.tpot_s)
    with pytest.raises(ConfigError, match="taper_tpot_slo_ms must be between"):
        parse_claims({"taper_tpot_slo_ms": slo_ms * 0.999}, ClaimLimits(), server)
    most = ClaimLimits(loosest_slo=3.0)
    parse_claims({"taper_tpot_slo_ms": slo_ms * 3}, most, server)
    with pytest.raises(ConfigError, match="taper_tpot_slo_ms must be between"):
        parse_claims({"taper_tpot_slo_ms": slo_ms * 3.01}, most, server)

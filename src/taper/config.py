"""One inert object with everything the engine side needs, and its JSON form in the environment.

It travels in an environment variable because vLLM hashes its own `additional_config` into the compile cache
key: a tunable there would recompile the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from taper.claims import ClaimLimits
from taper.core.policies import Policy, PolicyFactory, resolve
from taper.core.types import ConfigError, Knobs, Slo
from taper.files import parse_json, read_text

ENV_VAR = "TAPER_CONFIG"
POLICY_ENTRY_POINTS = "taper.policies"

_Settings = TypeVar("_Settings", Slo, Knobs, ClaimLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one engine replica. Build it once; change a running engine through its control route."""

    policy: str = "taper"
    slo: Slo = field(default_factory=Slo)
    knobs: Knobs = field(default_factory=Knobs)
    limits: ClaimLimits = field(default_factory=ClaimLimits)
    profile: dict[str, Any] | None = None  # calibrated profile, inline; None = learn online
    allow_control: bool = False  # may anyone past the server's own authentication change policy and SLO
    control_token: str | None = None  # the parent process's own right to do so
    group_secret: str | None = None  # seals group tags; tags without its seal are then refused
    record_steps: int = 4096  # step records kept for whoever asks
    trace: str | None = None  # file that every planned step is written to; None: no trace
    trace_mib: int = 64  # of one trace file; one full one is kept beside it

    def __post_init__(self) -> None:
        resolve_policy(self.policy)
        if not isinstance(self.record_steps, int) or not 1 <= self.record_steps <= 1_000_000:
            raise ConfigError(f"record_steps must be an integer from 1 to 1000000, not {self.record_steps!r}")
        if self.trace is not None and (not isinstance(self.trace, str) or not self.trace):
            raise ConfigError(f"trace must be the path of a file, not {self.trace!r}")
        if not isinstance(self.trace_mib, int) or not 1 <= self.trace_mib <= 65536:
            raise ConfigError(f"trace_mib must be an integer from 1 to 65536 MiB, not {self.trace_mib!r}")
        if not isinstance(self.allow_control, bool):
            raise ConfigError(f"allow_control must be true or false, not {self.allow_control!r}")
        if self.profile is not None and not isinstance(self.profile, dict):
            raise ConfigError("profile must be a JSON object")
        if self.control_token is not None and not isinstance(self.control_token, str):
            raise ConfigError("control_token must be a string")
        if self.group_secret is not None and (not isinstance(self.group_secret, str) or len(self.group_secret) < 16):
            raise ConfigError("group_secret must be a string of at least 16 characters")

    @classmethod
    def from_env(cls) -> ServerConfig:
        """Read `TAPER_CONFIG`: JSON text, or the path of a JSON file. Unset means all defaults."""
        value = os.environ.get(ENV_VAR, "").strip()
        if not value:
            return cls()
        if value.startswith("{"):
            return cls.from_json(value, where=ENV_VAR)
        text = read_text(value, f"{ENV_VAR} names {value!r}, which cannot be read")
        return cls.from_json(text, where=value)

    @classmethod
    def from_json(cls, text: str, *, where: str) -> ServerConfig:
        """Raises `ConfigError` for broken JSON, an unknown key or a bad value, naming `where` it stands."""
        raw = parse_json(text, where)
        try:
            raw = _known(cls, raw, "config")
            raw["slo"] = settings(Slo, raw.get("slo", {}), "slo")
            raw["knobs"] = settings(Knobs, raw.get("knobs", {}), "knobs")
            raw["limits"] = settings(ClaimLimits, raw.get("limits", {}), "limits")
            return cls(**raw)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def settings(kind: type[_Settings], raw: object, name: str) -> _Settings:
    """Build `kind` from a JSON object; raises `ConfigError` for unknown keys and values out of range."""
    return kind(**_known(kind, raw, name))


def _known(kind: type, raw: object, name: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{name} must be a JSON object, not {type(raw).__name__}")
    known = [spec.name for spec in fields(kind)]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {name}; known: {', '.join(known)}")
    return dict(raw)


def plugin_policies() -> dict[str, PolicyFactory]:
    """Policies that installed packages register under the entry point group `taper.policies`.

    None is imported before it is asked for: a broken package must not stop a server that uses another policy.
    """
    return {point.name: partial(_plugin, point) for point in entry_points(group=POLICY_ENTRY_POINTS)}


def _plugin(point: EntryPoint) -> Policy:
    try:
        policy: Policy = point.load()()
        _ = policy.name, policy.is_stock
    except Exception as error:
        raise ConfigError(
            f"policy {point.name!r} ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return policy


def resolve_policy(name: object) -> Policy:
    """`core.policies.resolve` with the installed plug-ins."""
    if not isinstance(name, str):
        raise ConfigError(f"policy must be a string, not {name!r}")
    return resolve(name, plugin_policies())

"""Calibrated profiles on disk: which machine and model a fitted latency law belongs to.

A profile is a small JSON file. Files are written beside their final name and renamed, so a reader sees a
whole file or none; what is read is checked field by field, and every refusal says which field and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError

SCHEMA = "taper.profile/1"
CACHE_VAR = "TAPER_CACHE_DIR"
COEFFICIENTS = ("base_s", "row_s", "context_s", "prefill_s")
KNEE = ("knee_rows", "steep_s")  # of a law that has one
MAX_FILE_BYTES = 1 << 20
# What an engine could have. Else a law overflows, prices everything at zero, or fills the memory with its staircase.
LEAST_BASE_S, MOST_S = 1e-6, 3600.0
MOST_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a law is valid for; any difference makes a profile foreign."""

    model: str
    dtype: str
    device: str  # hardware, with the number of CPU cores where it is a CPU
    parallel: str  # "tp1-pp1-dp1"
    vllm: str  # version

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"profile key: {spec.name} must be a non-empty string, not {value!r}")

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} on {self.device} ({self.parallel}, vLLM {self.vllm})"

    @property
    def file_name(self) -> str:
        """Readable, and unique through a digest of the whole key."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(self.model).name).strip("-.")[:60]
        return f"{readable or 'model'}-{self.dtype}-{digest}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A latency law, what it belongs to, and how well it was fitted (`fit`: see `core.calibration.Fit`)."""

    key: ProfileKey
    coefficients: Mapping[str, float]
    capture_sizes: tuple[int, ...] = ()
    fit: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""  # ISO date and time

    def latency(self) -> LinearLatency:
        """The law without online corrections."""
        return LinearLatency(**self.coefficients, capture_sizes=self.capture_sizes)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "key": asdict(self.key),
            "coefficients": dict(self.coefficients),
            "capture_sizes": list(self.capture_sizes),
            "fit": dict(self.fit),
            "created": self.created,
        }


def parse_profile(raw: object, *, where: str = "profile", expected: ProfileKey | None = None) -> Profile:
    """Check a profile's JSON object. Raises `ConfigError`, beginning with `where`, for anything amiss.

    With `expected`, a profile made for another key is refused; the message names both.
    """
    try:
        profile = _parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if expected is not None and profile.key != expected:
        raise ConfigError(f"{where}: belongs to {profile.key}, but this server is {expected}; run taper calibrate")
    return profile


def load_profile(path: str | Path, *, expected: ProfileKey | None = None) -> Profile:
    """Read and check a profile file. Raises `ConfigError` with one line that names the file."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"profile {path}: {len(data)} bytes is no TAPER profile")
    try:
        raw = json.loads(data, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(f"profile {path}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        broken = "truncated (it ends in mid-JSON)" if error.pos >= len(data.rstrip()) else "not JSON"
        raise ConfigError(f"profile {path}: {broken}: {error}; run taper calibrate to write it anew") from error
    except (ValueError, RecursionError) as error:  # an endless number, brackets without end
        raise ConfigError(f"profile {path}: no TAPER profile: {error}") from error
    return parse_profile(raw, where=f"profile {path}", expected=expected)


def save_profile(profile: Profile, path: str | Path | None = None) -> Path:
    """Write `profile` atomically, by default to its place in the cache; returns the path.

    Raises `ConfigError` if the place cannot be written.
    """
    target = Path(path) if path is not None else profile_path(profile.key)
    text = json.dumps(profile.to_json(), indent=2, allow_nan=False) + "\n"
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ConfigError(f"profile {target}: cannot be written: {error.strerror or error}") from error
    return target


def find_profile(key: ProfileKey) -> Profile | None:
    """The cached profile of `key`, or None. Raises `ConfigError` if one is there but broken."""
    path = profile_path(key)
    return load_profile(path, expected=key) if path.exists() else None


def profile_path(key: ProfileKey) -> Path:
    """Where the profile of `key` lives, written or not."""
    return cache_dir() / "profiles" / key.file_name


def model_identity(model: str) -> str:
    """The model as a profile names it: a hub id as it is, a local folder by its name and a digest of where it is.

    Profiles are passed around; where someone keeps their models is nobody's business.
    """
    if not os.path.isdir(model):
        return model
    path = os.path.realpath(model)
    return f"{os.path.basename(path)}@{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def cache_dir() -> Path:
    """`$TAPER_CACHE_DIR`, else `taper` under `$XDG_CACHE_HOME` or `~/.cache`. Not created here."""
    if own := os.environ.get(CACHE_VAR):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "taper"
    return Path.home() / ".cache" / "taper"


def _parse(raw: object) -> Profile:
    raw = _object(raw, "the file")
    schema = raw.get("schema")
    if schema != SCHEMA:
        raise ConfigError(f"schema is {schema!r}, this TAPER reads {SCHEMA!r}; run taper calibrate")
    missing = {"key", "coefficients", "capture_sizes", "fit", "created"} - raw.keys()
    if missing:
        raise ConfigError(f"missing {', '.join(sorted(missing))}")
    key = _object(raw["key"], "key")
    if unlike := key.keys() ^ {spec.name for spec in fields(ProfileKey)}:
        raise ConfigError(f"key: unknown or missing {', '.join(sorted(unlike))}")
    coefficients = _object(raw["coefficients"], "coefficients")
    unlike = coefficients.keys() ^ set(COEFFICIENTS)
    if unlike and unlike != set(KNEE):
        raise ConfigError(f"coefficients: unknown or missing {', '.join(sorted(unlike))}")
    for name, value in coefficients.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"coefficients: {name} must be a number, not {value!r}")
        least = LEAST_BASE_S if name == "base_s" else 0.0
        most = MOST_ROWS if name == "knee_rows" else MOST_S
        if not least <= value <= most:
            raise ConfigError(f"coefficients: {name} must be between {least:g} and {most:g}, not {_short(value)}")
    sizes = raw["capture_sizes"]
    if not isinstance(sizes, list) or any(type(size) is not int or not 1 <= size <= MOST_ROWS for size in sizes):
        raise ConfigError(f"capture_sizes must be a list of integers from 1 to {MOST_ROWS}")
    if not isinstance(raw["created"], str):
        raise ConfigError("created must be a string")
    profile = Profile(
        key=ProfileKey(**key),
        coefficients={name: float(value) for name, value in coefficients.items()},
        capture_sizes=tuple(sizes),
        fit=dict(_object(raw["fit"], "fit")),
        created=raw["created"],
    )
    profile.latency()  # what the coefficients must be to each other is the law's own business
    return profile


def _object(raw: object, name: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{name} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _short(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:20]


def _no_constant(name: str) -> float:
    raise ConfigError(f"{name} is not a number that a profile may hold")

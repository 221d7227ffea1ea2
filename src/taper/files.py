"""Files as a user hands them over: whatever is wrong with one is a `ConfigError` that names it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from taper.core.types import ConfigError


def read_text(path: str, where: str) -> str:
    """Raises `ConfigError`, beginning with `where`, for a file that is not there or not text."""
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or no path at all
        raise ConfigError(f"{where}: {error}") from error


def parse_table(text: str, where: str) -> dict[str, Any]:
    """Raises `ConfigError`, beginning with `where`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        raise ConfigError(f"{where}: not TOML: {error}") from error


def parse_json(text: str, where: str) -> Any:
    """Raises `ConfigError`, beginning with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, and too deep a nesting
        raise ConfigError(f"{where}: not JSON: {error}") from error

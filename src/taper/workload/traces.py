"""Readers of public request traces: when a request came, how long its prompt and its answer were. Streaming.

| format     | file                                       | columns used                                     |
| azure      | CSV, Azure LLM inference traces 2023, 2024 | TIMESTAMP, ContextTokens, GeneratedTokens        |
| burstgpt   | CSV, BurstGPT                              | Timestamp (s), Request tokens, Response tokens   |
| mooncake   | JSON lines, Mooncake                       | timestamp (ms), input_length, output_length      |

Every line is checked; what is wrong is a `TraceError` that names file, line and field. Lines must be in order of
time. A row without output (a failed request in BurstGPT) has nothing to generate and is left out; a prompt of 0
tokens counts as 1.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from taper.core.types import ConfigError

_MAX_TOKENS = 10_000_000


class TraceError(ConfigError):
    """A trace that cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One request of a trace."""

    at_s: float  # from the trace's first row
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Names of the three columns, and how its time becomes seconds."""

    time: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]


def _date_s(text: Any) -> float:
    """`2023-11-16 18:15:46.6805900` or `2024-05-10 00:00:00.009930+00:00`; without a zone it is UTC."""
    at = datetime.fromisoformat(str(text))
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()


_AZURE = _Format(time="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", seconds=_date_s)
_BURSTGPT = _Format(time="Timestamp", prompt="Request tokens", output="Response tokens", seconds=float)
_MOONCAKE = _Format(
    time="timestamp", prompt="input_length", output="output_length", seconds=lambda value: float(value) / 1e3
)


def read_trace(path: str | Path) -> Iterator[TraceRow]:
    """Rows of a trace file in order of time; the format is told from its first line.

    Raises TraceError, when the row is reached, for a file or a line that is not in one of the formats above.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as lines:
            yield from _rows(lines, str(path))
    except OSError as error:
        raise TraceError(f"trace {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {path}: not UTF-8 text") from error


def _rows(lines: TextIO, name: str) -> Iterator[TraceRow]:
    first = lines.readline()
    lines.seek(0)
    if first.lstrip().startswith("{"):
        return _checked(_json_rows(lines, name), _MOONCAKE, name)
    header = next(csv.reader([first]), [])
    for kind in (_AZURE, _BURSTGPT):
        if {kind.time, kind.prompt, kind.output} <= set(header):
            return _checked(_csv_rows(lines, name), kind, name)
    raise TraceError(
        f"trace {name}:1: header {first.strip()[:80]!r} is none of: {', '.join(_names(_AZURE))} (Azure);"
        f" {', '.join(_names(_BURSTGPT))} (BurstGPT); JSON lines with {', '.join(_names(_MOONCAKE))} (Mooncake)"
    )


def _names(kind: _Format) -> tuple[str, str, str]:
    return kind.time, kind.prompt, kind.output


def _csv_rows(lines: TextIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            if row.pop(None, None) is not None:
                raise TraceError(f"trace {name}:{reader.line_num}: more fields than the header has")
            yield reader.line_num, row
    except csv.Error as error:
        raise TraceError(f"trace {name}:{reader.line_num}: {error}") from error


def _json_rows(lines: TextIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"trace {name}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"trace {name}:{number}: not a JSON object")
        yield number, row


def _checked(rows: Iterable[tuple[int, dict[str, Any]]], kind: _Format, name: str) -> Iterator[TraceRow]:
    start_s, last_s = None, -math.inf
    for number, row in rows:
        where = f"trace {name}:{number}"
        at_s = _time(row.get(kind.time), kind, where)
        if at_s < last_s:
            raise TraceError(f"{where}: {kind.time} lies {last_s - at_s:g} s before the line above; sort the trace")
        start_s, last_s = at_s if start_s is None else start_s, at_s
        prompt_tokens = _tokens(row.get(kind.prompt), f"{where}: {kind.prompt}")
        output_tokens = _tokens(row.get(kind.output), f"{where}: {kind.output}")
        if output_tokens:
            yield TraceRow(at_s=at_s - start_s, prompt_tokens=max(1, prompt_tokens), output_tokens=output_tokens)
    if start_s is None:
        raise TraceError(f"trace {name}: holds no request")


def _time(value: Any, kind: _Format, where: str) -> float:
    try:
        at_s = kind.seconds(value)
    except (TypeError, ValueError):
        at_s = math.nan
    if isinstance(value, bool) or not math.isfinite(at_s):
        raise TraceError(f"{where}: {kind.time} is no time: {value!r}")
    return at_s


def _tokens(value: Any, where: str) -> int:
    try:
        count = int(str(value)) if not isinstance(value, bool) else -1
    except ValueError:
        count = -1
    if not 0 <= count <= _MAX_TOKENS:
        raise TraceError(f"{where} must be a whole number from 0 to {_MAX_TOKENS}, not {value!r}")
    return count

"""What a run leaves behind: one JSON object per line, the only file format between rooms.

`RequestRecord` is written by the client when a request ends, `StepRecord` by the engine for every step.
All times are seconds on the monotonic clock of whoever wrote the record, so they compare within one file
and one kind only. Unknown fields, wrong types and non-finite numbers are refused with the line number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

log = logging.getLogger(__name__)

REQUEST_SCHEMA = "taper.request/1"
STEP_SCHEMA = "taper.step/1"

Kind = Literal["serial", "branching"]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RecordError(ValueError):
    """A record file that cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRecord:
    """One branch as the client saw it. A branch without a token has no record."""

    index: int  # over all branches of the request
    tokens: int
    first_token_s: float
    last_token_s: float
    gaps_ms: tuple[float, ...] = ()  # between consecutive chunks; a chunk may carry several tokens
    finish_reason: str | None = None
    stage: int = 0  # of a request that forks and joins on its way

    @property
    def itl_p99_s(self) -> float | None:
        """99th percentile of the gaps a reader of this branch sat through; None with a single chunk."""
        return float(np.percentile(self.gaps_ms, 99)) / 1e3 if self.gaps_ms else None

    @property
    def itl_max_s(self) -> float | None:
        return max(self.gaps_ms) / 1e3 if self.gaps_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One logical request, from its planned arrival to its last token or its failure."""

    __pydantic_config__ = _STRICT

    id: str
    policy: str
    round: int
    seed: int
    index: int  # (seed, index) reproduces the request
    kind: Kind
    branches: int  # of the widest stage
    prompt_tokens: int  # 0 where the server did not say
    scheduled_s: float  # planned arrival
    sent_s: float  # when it left the client; later than planned where the client bounds concurrency
    ended_s: float  # last byte, or the failure
    tpot_slo_s: float
    ttft_slo_s: float | None = None  # None: time to first token is reported, not judged
    choices: tuple[ChoiceRecord, ...] = ()
    error: str | None = None  # cause, when the request failed or timed out
    window: str = ""  # of a sweep: which of its windows, and which try at it
    schema: Literal["taper.request/1"] = REQUEST_SCHEMA  # type: ignore[assignment]

    @property
    def tokens(self) -> int:
        """Output tokens over all branches."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def first_token_s(self) -> float | None:
        return min((choice.first_token_s for choice in self.choices), default=None)

    @property
    def last_token_s(self) -> float | None:
        return max((choice.last_token_s for choice in self.choices), default=None)

    @property
    def ttft_s(self) -> float | None:
        """First token minus *planned* arrival: waiting in the client's own queue counts."""
        first = self.first_token_s
        return None if first is None else first - self.scheduled_s

    @property
    def ttft_sent_s(self) -> float | None:
        """First token minus sending: the server's part of it."""
        first = self.first_token_s
        return None if first is None else first - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Effective time per output token over all branches; None below two tokens."""
        first, last = self.first_token_s, self.last_token_s
        if first is None or last is None or self.tokens < 2:
            return None
        return (last - first) / (self.tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One engine step, as planned and as measured. None stands for an unbounded or unknown number.

    `measured_s` counts from the end of the step before, decision and host included, or after a pause from this one's
    schedule; `time_s` is that moment.
    """

    __pydantic_config__ = _STRICT

    step: int
    time_s: float
    policy: str
    rows: int
    context_tokens: int
    prefill_tokens: int
    groups: int
    protected: int
    extra: int
    deferred: int
    held: int
    baseline_s: float | None
    predicted_s: float | None
    budget_s: float | None
    slack_min_s: float | None
    measured_s: float | None
    ending: str | None
    planner_s: float | None
    window: str = ""  # of a sweep, filled in by whoever collects the records
    schema: Literal["taper.step/1"] = STEP_SCHEMA  # type: ignore[assignment]


RecordT = TypeVar("RecordT", RequestRecord, StepRecord)


class RecordFile(Generic[RecordT]):
    """Reader and writer of one kind of record."""

    def __init__(self, kind: type[RecordT]) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def dump(self, record: RecordT) -> str:
        """One line of JSON, without the newline."""
        return self._adapter.dump_json(record).decode()

    def to_dict(self, record: RecordT) -> dict[str, Any]:
        data: dict[str, Any] = self._adapter.dump_python(record, mode="json")
        return data

    def parse(self, line: str | bytes, *, where: str = "record") -> RecordT:
        """Raises `RecordError` naming `where`, the field and what is wrong with it."""
        try:
            record: RecordT = self._adapter.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "line"
            raise RecordError(f"{where}: {field}: {first['msg']}") from None
        return record

    def append(self, path: Path, records: Iterable[RecordT]) -> None:
        with path.open("a", encoding="utf-8") as out:
            out.writelines(self.dump(record) + "\n" for record in records)

    def read(self, path: Path) -> Iterator[RecordT]:
        """Yield every record of a file.

        A last line without its newline that does not parse is what a killed writer leaves: it is reported
        in the log and skipped. Any other bad line raises `RecordError`.
        """
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield self.parse(line, where=f"{path}:{number}")
                except RecordError:
                    if line.endswith(b"\n"):
                        raise
                    log.warning("%s:%d: torn last line skipped (%d bytes)", path, number, len(line))


def request_file() -> RecordFile[RequestRecord]:
    return RecordFile(RequestRecord)


def step_file() -> RecordFile[StepRecord]:
    return RecordFile(StepRecord)

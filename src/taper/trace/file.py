"""A trace on disk: PATH and, once that is full, PATH.1 with what came before; nothing older is kept.

Writing never holds up an engine: lines are made and written by a thread of their own, and what it cannot keep
up with is dropped and counted.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from taper.core.types import ConfigError
from taper.trace.decision import Decision, TraceError, dump, parse

logger = logging.getLogger(__name__)

QUEUE_DECISIONS = 2048  # half a minute of steps
FLUSH_S = 0.5
BLOCK_BYTES = 1 << 16


def older(path: Path) -> Path:
    """Where the full file before `path` goes."""
    return path.with_name(path.name + ".1")


class TraceWriter:
    """Appends decisions to `path`, at most two files of `max_bytes` each (and one line)."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Raises `ConfigError` if nothing can be written there."""
        self.dropped = 0
        self._path = path
        self._max_bytes = max_bytes
        self._queue: deque[Decision] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._is_broken = False
        try:
            self._file: BinaryIO = path.open("a+b")
            self._size = _drop_torn_line(self._file)
        except OSError as error:
            raise ConfigError(f"trace {path}: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._run, name="taper-trace", daemon=True)
        self._thread.start()

    def put(self, decision: Decision) -> None:
        """Takes a microsecond; the decision's columns must not change any more."""
        if self._is_broken or len(self._queue) >= QUEUE_DECISIONS:
            self.dropped += 1
            return
        self._queue.append(decision)

    def close(self) -> None:
        """Write what is left. The writer takes nothing after that."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing or self._queue:
                self._wake.wait(FLUSH_S)
                self._drain()
            self._file.close()
        except Exception as error:  # whatever it is, it may end the trace and nothing else
            logger.warning("TAPER's trace ends here: %s: %s", self._path, error)
            self._is_broken = True
            self._queue.clear()
            with suppress(OSError):  # what is still in its buffer does not fit either
                self._file.close()

    def _drain(self) -> None:
        while self._queue:
            line = dump(self._queue.popleft()) + b"\n"
            if self._size and self._size + len(line) > self._max_bytes:
                self._file.close()
                self._path.replace(older(self._path))
                self._file, self._size = self._path.open("wb"), 0
            self._file.write(line)
            self._size += len(line)
        self._file.flush()


def _drop_torn_line(file: BinaryIO) -> int:
    """Cut off what a killed writer left of its last line, lest the next one be appended to it; the size then."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - BLOCK_BYTES, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    return end


def read_trace(path: Path) -> Iterator[Decision]:
    """Decisions of `path`, oldest first, those in the file before it included.

    A torn last line is what a killed writer leaves; it is skipped. Raises `TraceError` for any other bad line
    and where there is no such file.
    """
    for part in (older(path), path):
        if part == older(path) and not part.exists():
            continue
        try:
            with part.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.endswith(b"\n"):
                        break  # its rest may be written while we read
                    yield parse(line, where=f"{part}:{number}")
        except OSError as error:
            raise TraceError(f"trace {part}: {error.strerror or error}") from error

"""The output folder of a sweep: raw records as they come, summaries as windows end, and where to go on.

    DIR/meta.json       settings, command, commit, machine, versions, profile
    DIR/requests.jsonl  one record per request, written when it ends
    DIR/steps.jsonl     one record per engine step, where they were asked for
    DIR/runs.json       summaries of all finished windows, replaced as a whole after each

A window counts once `runs.json` names it. Records of a window that a killed run left unfinished are dropped when the
run is taken up again, and the window is measured anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from taper.bench.measure import Measured
from taper.bench.report import write_json
from taper.core.types import ConfigError
from taper.files import parse_json, read_text
from taper.records import RequestRecord, request_file
from taper.results import Run, document, read_runs

SCHEMA = "taper.bench/1"


class Store:
    """Opens or continues the folder `path`. Raises ConfigError where it holds a sweep with other `settings`.

    `about` is what else `meta.json` keeps; it does not have to be the same when a sweep is taken up again.
    """

    def __init__(
        self, path: Path, *, settings: Mapping[str, Any], about: Mapping[str, Any], keep_steps: bool = False
    ) -> None:
        self._path = path
        self._writer = request_file()
        self._keep_steps = keep_steps
        meta = path / "meta.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            fresh = not meta.exists()
            if fresh:
                if any(path.iterdir()):
                    raise ConfigError(f"--out {path}: is not empty and holds no bench")
                write_json(meta, {"schema": SCHEMA, "settings": dict(settings), **about})
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror or error}") from error
        self.meta: dict[str, Any] = _read_meta(path, meta)
        _check_same(path, self.meta, json.loads(json.dumps(settings)))
        self.runs: list[Run] = read_runs(path / "runs.json") if (path / "runs.json").exists() else []
        finished = {run.conditions.window for run in self.runs}
        for name in ("requests.jsonl", "steps.jsonl"):
            if (path / name).exists():
                _keep(path / name, finished)
        self._requests: IO[str] = (path / "requests.jsonl").open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.close()

    def note(self, **about: Any) -> None:
        """Add to `meta.json` what is known only once a server runs."""
        self.meta |= about
        write_json(self._path / "meta.json", self.meta)

    def attempts(self, slot: str) -> int:
        """How often the window was tried."""
        return sum(_slot(run) == slot for run in self.runs)

    def accepted(self, slot: str) -> bool:
        return any(_slot(run) == slot and run.conditions.accepted for run in self.runs)

    def add_request(self, record: RequestRecord) -> None:
        self._requests.write(self._writer.dump(record) + "\n")
        self._requests.flush()

    def finish(self, measured: Measured, *, accepted: bool) -> Run:
        """Take a window up among the finished ones."""
        run = measured.run
        run = replace(run, conditions=replace(run.conditions, accepted=accepted))
        if self._keep_steps:
            with (self._path / "steps.jsonl").open("a", encoding="utf-8") as out:
                for engine in measured.steps:
                    out.writelines(json.dumps({**step, "window": run.conditions.window}) + "\n" for step in engine)
        os.fsync(self._requests.fileno())
        self.runs.append(run)
        write_json(self._path / "runs.json", document(self.runs))
        return run


def _slot(run: Run) -> str:
    return run.conditions.window.rpartition("/")[0]


def _read_meta(path: Path, meta: Path) -> dict[str, Any]:
    where = f"--out {path}"
    body = parse_json(read_text(str(meta), where), f"{where}: meta.json")
    if not isinstance(body, dict) or body.get("schema") != SCHEMA or not isinstance(body.get("settings"), dict):
        raise ConfigError(f"{where}: meta.json is not of schema {SCHEMA}")
    return body


def _check_same(path: Path, meta: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    held = meta["settings"]
    for name in sorted(held.keys() | settings.keys()):
        if held.get(name) != settings.get(name):
            raise ConfigError(
                f"--out {path}: holds a bench with {name} = {held.get(name)!r}, not {settings.get(name)!r};"
                " give the same settings to go on with it, or another folder"
            )


def _keep(path: Path, windows: set[str]) -> None:
    """Drop the records of other windows, and a torn last line."""
    part = path.with_suffix(".part")
    with path.open("rb") as lines, part.open("wb") as out:
        for line in lines:
            try:
                window = json.loads(line).get("window")
            except (ValueError, AttributeError, RecursionError):  # torn, or no record
                continue
            if isinstance(window, str) and window in windows and line.endswith(b"\n"):
                out.write(line)
    shutil.copymode(path, part)
    part.replace(path)

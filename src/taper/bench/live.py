"""What a person watches while windows run: bars and one line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from taper.bench.driver import Progress as Window
from taper.bench.driver import WindowPlan

_PLAIN_EVERY_S = 10.0


class Display(Protocol):
    """Draws; knows nothing about how the numbers come about."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def window_started(self, title: str) -> None: ...
    def update(self, window: Window, snapshot: Mapping[str, Any] | None) -> None: ...
    def window_ended(self, line: str) -> None: ...


def display_for(console: Console, *, windows: int, plan: WindowPlan) -> Display:
    if console.is_terminal:
        return TerminalDisplay(console, windows=windows, plan=plan)
    return PlainDisplay(console, windows=windows, plan=plan)


def state_line(snapshot: Mapping[str, Any] | None) -> str:
    """Rows, protected, extra, deferred and slack of the last step on one line."""
    step = (snapshot or {}).get("step") or {}
    if not step.get("rows"):
        return "engine idle"
    return (
        f"rows {step['rows']:>3}  protected {_count(step, 'protected')}  extra {_count(step, 'extra')}"
        f"  deferred {_count(step, 'deferred')}  held {_count(step, 'held')}"
        f"  slack {_ms(step, 'slack_min_s')}  budget {_ms(step, 'budget_s')}"
        f"  step {_ms(step, 'predicted_s')} predicted, {_ms(step, 'measured_s')} measured"
    )


class TerminalDisplay:
    """Two bars and the live line, redrawn in place."""

    def __init__(self, console: Console, *, windows: int, plan: WindowPlan) -> None:
        self._console = console
        self._plan = plan
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )
        self._total = self._bars.add_task("windows", total=windows, note="")
        self._window = self._bars.add_task("", total=round(plan.load_s), note="")
        self._line = Text("")
        # No refresh thread: drawing happens between requests, not while a time is being taken.
        self._live = Live(self._group(), console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def window_started(self, title: str) -> None:
        self._bars.reset(self._window, description=title, total=round(self._plan.load_s), note="")
        self._redraw()

    def update(self, window: Window, snapshot: Mapping[str, Any] | None) -> None:
        self._bars.update(
            self._window,
            completed=min(round(window.elapsed_s), round(self._plan.load_s)),
            note=f"s {window.phase}, {window.in_service} in service, {window.waiting} waiting",
        )
        self._line = Text(state_line(snapshot), style="cyan", no_wrap=True, overflow="ellipsis")
        self._redraw()

    def window_ended(self, line: str) -> None:
        self._live.console.print(line, highlight=False)
        self._bars.advance(self._total)
        self._redraw()

    def _redraw(self) -> None:
        self._live.update(self._group(), refresh=True)

    def _group(self) -> Group:
        return Group(self._line, self._bars)


class PlainDisplay:
    """For pipes and logs: a line per window and one now and then in between, no control codes."""

    def __init__(
        self, console: Console, *, windows: int, plan: WindowPlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._windows = windows
        self._plan = plan
        self._clock = clock
        self._begun_s: float | None = None
        self._ended = 0
        self._said_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def window_started(self, title: str) -> None:
        self._said_s = 0.0
        if self._begun_s is None:
            self._begun_s = self._clock()
        self._say(f"{title}: {self._plan.load_s:.0f} s of load, then drain{self._eta()}")

    def update(self, window: Window, snapshot: Mapping[str, Any] | None) -> None:
        if window.elapsed_s - self._said_s >= _PLAIN_EVERY_S:
            self._said_s = window.elapsed_s
            self._say(f"  {window.elapsed_s:4.0f} s {window.phase:<7} {state_line(snapshot)}")

    def window_ended(self, line: str) -> None:
        self._ended += 1
        self._say(line)

    def _eta(self) -> str:
        """From the windows so far; one that is repeated makes it late."""
        left = self._windows - self._ended
        if self._begun_s is None or not self._ended or left < 1:
            return ""
        left_min = (self._clock() - self._begun_s) / self._ended * left / 60
        return f" ({self._ended} of {self._windows} windows done, about {left_min:.0f} min left)"

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _count(step: Mapping[str, Any], name: str) -> str:
    return f"{step.get(name) or 0:>3}"


def _ms(step: Mapping[str, Any], name: str) -> str:
    value = step.get(name)
    return "  -  " if value is None else f"{value * 1e3:5.1f} ms"

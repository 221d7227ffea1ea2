"""`taper top`: what the live page shows, on a terminal, for any server URL."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

PERIOD_S = 0.5
SLOWEST_S = 5.0
STALE_S = 3.0
KEPT_S = 300
SPARKS = "▁▂▃▄▅▆▇█"
# Role -> glyph and style. Glyphs differ, so that it reads without colour too.
ROLES = {
    "P": ("█", "blue"),
    "E": ("▓", "green"),
    "F": ("»", "magenta"),
    "D": ("░", "yellow"),
    "H": ("·", "bright_black"),
    "W": ("·", "bright_black"),
}
FINISHED = ("✓", "bright_black")
LEGEND = (("P", "protected"), ("E", "extra"), ("F", "prompt"), ("D", "deferred"), ("H", "held"))


@dataclass(slots=True)
class Watch:
    """The latest live state of a server, and its timelines put together from what each poll brought."""

    url: str
    state: dict[str, Any] | None = None
    trouble: str | None = None  # why the last poll brought nothing
    failures: int = 0
    timelines: list[list[list[float | None]]] = field(default_factory=list)

    def poll(self, http: httpx.Client) -> None:
        """Ask once; a server that is not there is noted and never raised."""
        since = min((int(line[-1][0] or 0) if line else 0 for line in self.timelines), default=0)
        try:
            answer = http.get("/taper/live", params={"since": since})
            if answer.status_code == httpx.codes.NOT_FOUND:
                raise ValueError("no TAPER on this server (start it with taper serve)")
            body = answer.json()
            if not answer.is_success:
                raise ValueError(f"HTTP {answer.status_code}: {body['error']['message']}")
            self.take(body)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self.failures += 1
            self.trouble = str(error) or type(error).__name__

    def take(self, body: dict[str, Any]) -> None:
        """An answer of `/taper/live`."""
        engines = body["engines"]
        if len(self.timelines) != len(engines):
            self.timelines = [[] for _ in engines]
        for at, engine in enumerate(engines):
            rows, kept = engine.get("timeline", []), self.timelines[at]
            if kept and (kept[-1][0] or 0) > engine.get("now_s", 0.0) + 1:  # the server started anew
                kept = []
            first = rows[0][0] if rows else float("inf")
            self.timelines[at] = [*(row for row in kept if (row[0] or 0) < first), *rows][-KEPT_S:]
        age_s = float(body["age_s"])
        self.state, self.failures = body, 0
        self.trouble = f"the engine has not answered for {age_s:.0f} s" if age_s > STALE_S else None

    @property
    def wait_s(self) -> float:
        return float(min(PERIOD_S * 2**self.failures, SLOWEST_S))


def top(url: str, console: Console, *, once: bool) -> int:
    """Watch until interrupted; with `once` print one frame, and return 1 where the server does not answer."""
    watch = Watch(url)
    with httpx.Client(base_url=url, timeout=5.0, trust_env=not _is_local(url), verify=not _is_local(url)) as http:
        watch.poll(http)
        if once:
            console.print(frame(watch, width=console.width, height=200))
            return 0 if watch.trouble is None else 1
        with Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(frame(watch, width=console.width, height=console.height), refresh=True)
                    time.sleep(watch.wait_s)
                    watch.poll(http)
            except KeyboardInterrupt:
                return 0


def frame(watch: Watch, *, width: int, height: int) -> RenderableType:
    """One picture, at most `width` columns and `height` lines."""
    parts: list[RenderableType] = [_head(watch)]
    if watch.state is None:
        return Group(*parts)
    engines = watch.state["engines"]
    room = max((height - 2) // len(engines) - 12, 3)
    for rank, engine, timeline in zip(watch.state["server"]["engines"], engines, watch.timelines, strict=True):
        if "error" in engine:
            parts.append(Text(f"engine {rank}: {engine['error']}", style="red"))
        else:
            title = f"engine {rank}" if len(engines) > 1 else None
            parts.append(Panel(_engine(engine, timeline, width=width - 4, lanes=room), title=title, title_align="left"))
    return Group(*parts)


def _head(watch: Watch) -> Text:
    line = Text("TAPER ", style="bold")
    if watch.state is not None:
        model = str(watch.state["server"]["model"])
        line.append(f"{Path(model).name if model.startswith('/') else model}  ", style="bright_black")
    line.append(f"{watch.url}  ", style="bright_black")
    if watch.trouble is None:
        line.append("● live", style="green")
    else:
        what = "trying again" if watch.state is None else "trying again; what follows is old"
        line.append(f"● {watch.trouble} ({what})", style="red")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _engine(engine: Mapping[str, Any], timeline: Sequence[Sequence[Any]], *, width: int, lanes: int) -> Group:
    columns = {name: at for at, name in enumerate(engine["columns"])}
    graph = max(width - 34, 10)

    def series(name: str) -> list[float | None]:
        return [row[columns[name]] for row in timeline][-graph:]

    step, budget = series("step_s"), series("budget_s")
    high = max([v for v in (*step, *budget) if v is not None], default=1.0) or 1.0
    table = Table.grid(padding=(0, 1))
    for title, values, top_value, last in (
        ("step time", step, high, _ms(_last(step))),
        ("budget", budget, high, _ms(_last(budget))),
        ("rows per request", series("width"), None, _number(_last(series("width")), 1)),
        ("deferred", series("deferred"), None, _number(_last(series("deferred")), 0)),
    ):
        table.add_row(Text(title, style="bright_black"), Text(last, justify="right"), spark(values, top_value))
    return Group(_figures(engine), table, Text(""), _legend(engine), *_lanes(engine, width=width, most=lanes))


def _figures(engine: Mapping[str, Any]) -> Text:
    recent, step = engine["recent"], engine["step"]
    line = Text()
    learning = ", learning" if engine["learning"] else ""
    line.append(f"policy {engine['policy']}{learning}, SLO {engine['tpot_slo_s'] * 1e3:.0f} ms per token", style="bold")
    line.append(
        f"\nattainment {_percent(recent['attainment'])} (serial {_percent(recent['attainment_serial'])},"
        f" branching {_percent(recent['attainment_branching'])})"
        f"   goodput {recent['goodput_tok_s']:.0f} tok/s, raw {recent['raw_tok_s']:.0f}"
        f"\nfirst token {_seconds(recent['ttft_p50_s'])}, 95 % {_seconds(recent['ttft_p95_s'])}"
    )
    if step is not None:
        line.append(
            f"\nrows {step['rows']}: {step['protected']} protected, {step['extra']} extra;"
            f" {step['deferred']} deferred, {step['held']} held;"
            f" step {_ms(step['measured_s'])} of {_ms(step['budget_s'])}"
        )
    else:
        line.append("\nidle")
    return line


def _legend(engine: Mapping[str, Any]) -> Text:
    line = Text(f"{engine['groups']} requests, {engine['branches']} branches   ")
    for role, name in LEGEND:
        line.append(ROLES[role][0], style=ROLES[role][1])
        line.append(f" {name}  ", style="bright_black")
    line.append(f"{FINISHED[0]} finished", style=FINISHED[1])
    return line


def _lanes(engine: Mapping[str, Any], *, width: int, most: int) -> Iterable[Text]:
    """Branching requests first, oldest first."""
    found = sorted(engine["lanes"], key=lambda lane: (lane["branches"] + lane["finished"] < 2, lane["number"]))
    room = max(width - 29, 4)
    for lane in found[:most]:
        line = Text(f"#{lane['number']:<7}", style="bright_black", no_wrap=True)
        live = [ROLES[role] for role in lane["roles"]]
        cells = [FINISHED] * min(lane["finished"], max(room - len(live), 0)) + live
        for glyph, style in cells[:room]:
            line.append(glyph, style=style)
        line.append(" " * (room - min(len(cells), room)))
        line.append(f"{lane['tokens']:>7} tok ", style="bright_black")
        credit_s = lane["credit_s"]
        if credit_s is not None:
            line.append(f"{credit_s:>+7.1f} s", style="red" if credit_s < 0 else "green")
        yield line
    hidden = engine["groups"] - min(len(found), most)
    if hidden:
        yield Text(f"and {hidden} more", style="bright_black")


def spark(values: Sequence[float | None], high: float | None) -> Text:
    """A bar per value from zero to `high` (None: the largest); a gap where there is none."""
    top_value = high or max([v for v in values if v is not None], default=0.0) or 1.0
    last = len(SPARKS) - 1
    bars = [" " if v is None else SPARKS[min(int(v / top_value * last + 0.5), last)] for v in values]
    return Text("".join(bars), style="cyan")


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _is_local(url: str) -> bool:
    """A server on this machine: no proxy in between, and its certificate need not be one that others trust."""
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")

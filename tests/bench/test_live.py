"""Plain output says how far a run is and how long it will take."""

from __future__ import annotations

import io

from rich.console import Console

from taper.bench.driver import WindowPlan
from taper.bench.live import PlainDisplay


def test_the_time_left_follows_from_the_windows_so_far() -> None:
    now_s = iter((0.0, 90.0, 180.0, 360.0))
    out = io.StringIO()
    plan = WindowPlan(ramp_s=2.0, measure_s=8.0)
    display = PlainDisplay(Console(file=out, width=120), windows=4, plan=plan, clock=lambda: next(now_s))
    for name in "abc":
        display.window_started(name)
        display.window_ended(f"{name} done")
    assert out.getvalue().splitlines() == [
        "a: 10 s of load, then drain",
        "a done",
        "b: 10 s of load, then drain (1 of 4 windows done, about 4 min left)",
        "b done",
        "c: 10 s of load, then drain (2 of 4 windows done, about 3 min left)",
        "c done",
    ]

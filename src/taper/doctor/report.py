"""All checks in order, and how they are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table
from rich.text import Text

from taper import profile
from taper.doctor import companions, machine, stack
from taper.doctor.check import Check, Status
from taper.engines.vllm import command, compat

STYLES: Mapping[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run_checks(*, repair: bool = False, port: int = command.DEFAULT_PORT) -> list[Check]:
    """Look at everything, in the order in which things depend on each other; takes about 20 s.

    Args:
        repair: take out torchvision, torchaudio, torchcodec where broken (text serving needs none of them).
        port: the TCP port that `taper serve` would use.
    """
    # Before the others: a broken companion breaks them too, and `repair` mends them.
    torch_friends = stack.check_companions(companions.inspect_companions(), repair=repair)
    slow: tuple[Callable[[], Check], ...] = (stack.check_torch, stack.check_seams, stack.check_server)
    with ThreadPoolExecutor(max_workers=len(slow)) as pool:
        torch, seams, server = pool.map(lambda check: check(), slow)
    return [
        stack.check_python(tuple(sys.version_info[:3])),
        stack.check_vllm(compat.installed()),
        torch_friends,
        torch,
        seams,
        server,
        stack.check_plugins(),
        stack.check_plugin_filter(os.environ.get("VLLM_PLUGINS")),
        machine.check_cpu(),
        machine.check_memory(machine.available_gib()),
        machine.check_port(port),
        machine.check_model(),
        machine.check_profiles(profile.cache_dir() / "profiles"),
    ]


def exit_code(checks: Sequence[Check]) -> int:
    """0 unless something failed; warnings alone do not count."""
    return int(any(check.status == "fail" for check in checks))


def render(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print the findings as a table, then what to do, one line each."""
    console = console or Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, style=STYLES[check.status]), check.name, Text(check.detail))
    console.print(table)
    to_do = [check for check in checks if check.advice]
    if to_do:
        console.print("\nWhat to do:")
    for check in to_do:
        line = Text(f"  {check.name}: ", style=STYLES[check.status])
        console.print(line.append(check.advice, style="default"))
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"\n{len(checks) - failed - warned} ok, {warned} warnings, {failed} failures")

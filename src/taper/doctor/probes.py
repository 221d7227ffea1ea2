"""Questions about the installed stack, each answered by an interpreter of its own.

`ask("torch")` runs `answer("torch")` in a fresh interpreter and returns the facts it prints as JSON:
importing torch or vLLM takes seconds, may print, and may crash in a broken install, none of which the asker can bear.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NoReturn

MARK = "taper-probe:"
LIMIT_S = 180.0
ANSWER = "import sys; from taper.doctor import probes; probes.answer(sys.argv[1])"

Facts = dict[str, Any]


class ProbeError(RuntimeError):
    """The probe crashed, hung or said nothing; the message is the last line of what it printed."""


def ask(name: str, *, limit_s: float = LIMIT_S, env: Mapping[str, str] | None = None) -> Facts:
    """Facts of the probe `name` (a key of `PROBES`). Raises `ProbeError`."""
    command = [sys.executable, "-P", "-c", ANSWER, name]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {limit_s:g} s") from error
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            facts: Facts = json.loads(line.removeprefix(MARK))
            return facts
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise ProbeError(lines[-1] if lines else f"ended with code {done.returncode}")


def torch_facts() -> Facts:
    """Keys: version, wanted (what vLLM requires, if this is not it), cpu_capability, cuda_build, gpus."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "wanted": _unmet("torch", str(torch.__version__)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda,
        "gpus": gpus,
    }


def _unmet(name: str, number: str) -> str | None:
    """What the installed vLLM requires of the package `name`, where version `number` is not that."""
    from packaging.requirements import Requirement

    from taper.engines.vllm import compat

    found = compat.installed()
    for line in metadata.requires(found[0]) or [] if found else []:
        wanted = Requirement(line)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if wanted.name == name and applies and not wanted.specifier.contains(number, prereleases=True):
            return f"{name}{wanted.specifier}"
    return None


def seam_facts() -> Facts:
    """What `taper.engines.vllm.compat` finds in the installed vLLM, in the engine and in the API server."""
    from taper.engines.vllm import compat, contract

    return dict(compat.seam_report((*contract.ENGINE, *contract.SERVER)))


def server_facts() -> Facts:
    """Imports the module that runs as the API server."""
    import importlib

    from taper.engines.vllm import command

    argv = command.server_command("model", [], stock=False)
    importlib.import_module(argv[1])
    return {"module": argv[1]}


PROBES: Mapping[str, Callable[[], Facts]] = {
    "torch": torch_facts,
    "seams": seam_facts,
    "server": server_facts,
}


def answer(name: str) -> NoReturn:
    """Print the facts of the probe `name` as one marked JSON line and end the process."""
    print(MARK + json.dumps(PROBES[name](), default=str), flush=True)
    os._exit(0)  # the answer is out; a library's exit handlers must not hold it back

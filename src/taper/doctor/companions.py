"""torch's companion packages: found broken, taken out. Run by the set-up.

The CPU build of vLLM pulls torchvision, torchaudio and torchcodec. Where only their CUDA builds are to be
had, importing one fails, and transformers, which imports whatever is installed, fails with it. Serving text
needs none of the three, so a broken one is best removed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
IMPORT_LIMIT_S = 120.0

Importer = Callable[[str], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """An installed companion package; `error` is why it cannot be imported, None if it can."""

    name: str
    version: str
    error: str | None


def installed(names: Sequence[str] = COMPANIONS) -> dict[str, str]:
    """Name to version of those companion packages that are installed."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def inspect_companions(names: Sequence[str] = COMPANIONS, *, importer: Importer | None = None) -> list[Companion]:
    """Import each installed one in a process of its own (a broken one may crash it) and say how it went."""
    found = installed(names)
    with ThreadPoolExecutor(max_workers=max(1, len(found))) as pool:
        errors = list(pool.map(importer or import_error, found))
    return [
        Companion(name=name, version=number, error=error)
        for (name, number), error in zip(found.items(), errors, strict=True)
    ]


def import_error(name: str) -> str | None:
    """Last line of what `import name` prints in a fresh interpreter, or None if it works."""
    command = [sys.executable, "-P", "-c", f"import {name}"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it took over {IMPORT_LIMIT_S:g} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"importing it ended with code {done.returncode}"


def removal_command(names: Sequence[str]) -> list[str]:
    """The command that takes `names` out of this environment."""
    return [sys.executable, "-m", "pip", "uninstall", "--yes", *names]


def remove(companions: Sequence[Companion]) -> list[str]:
    """Uninstall the broken ones among `companions`, return their names. `RuntimeError` if pip fails."""
    names = [companion.name for companion in companions if companion.error is not None]
    if not names:
        return []
    done = subprocess.run(removal_command(names), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not remove {', '.join(names)}: {done.stderr.strip() or done.stdout.strip()}")
    if left := installed(names):
        raise RuntimeError(f"{', '.join(left)} lies outside this environment; remove it there")
    return names


def repair() -> None:
    """Say which are installed and remove the broken ones. Raises `RuntimeError` if pip fails."""
    found = inspect_companions()
    for companion in found:
        print(f"{companion.name} {companion.version}: {companion.error or 'works'}")
    if removed := remove(found):
        print(f"removed {', '.join(removed)}: text serving does not need them")

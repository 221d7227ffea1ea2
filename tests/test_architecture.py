"""The rooms of the package and the arrows between them, read from the import statements."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taper

ROOT = Path(taper.__file__).parent
FLOORS = (
    {"core"},
    {
        "config",
        "claims",
        "tenancy",
        "profile",
        "files",
        "records",
        "trace",
        "goodput",
        "results",
        "model",
        "gguf_convert",
        "workload",
    },
    {"sim", "engines", "forkjoin", "client", "bench"},
    {"doctor", "demo", "top", "benchmark", "fleet", "bench_commands", "sim_commands", "cli", "vllm_plugin"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MIDDLE = 2
IMPURE = {
    "asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "shutil",
    "socket", "subprocess", "tempfile", "threading", "time", "uuid", "warnings",
}  # fmt: skip
ENGINE_PACKAGES = {"vllm", "torch", "transformers", "gguf", "tokenizers"}
MAY_NAME_ENGINES = {"engines", "vllm_plugin", "gguf_convert", "doctor"}

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `path` imports, also inside functions."""
    package = ("taper", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, node.module) if node.module else base)
            if origin == "taper":
                yield from ((node.lineno, f"taper.{name.name}") for name in node.names)
            else:
                yield node.lineno, origin


def allowed(importer: str, imported: str) -> bool:
    """Arrows go down; along one floor only inside a room, or between the small modules outside the middle."""
    if importer == imported:
        return True
    if FLOOR[imported] == FLOOR[importer]:
        return FLOOR[importer] != MIDDLE
    return FLOOR[imported] < FLOOR[importer]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_arrows_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor; give it one in this test and in the design"
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "taper" and len(parts) > 1 and parts[1] in FLOOR and not allowed(room, parts[1]):
            wrong.append(f"line {line}: {room} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "core"], ids=named)
def test_core_is_standard_library_and_numpy_without_clock_or_io(path: Path) -> None:
    tops = {name.split(".")[0] for _, name in imports(path)}
    assert tops - set(sys.stdlib_module_names) <= {"numpy", "taper"}
    assert tops & IMPURE == set()
    tree = ast.parse(path.read_text("utf-8"))
    assert [node.lineno for node in ast.walk(tree) if is_randomness(node)] == []
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in {"open", "print"}] == []


def is_randomness(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "random"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_only_the_engine_side_names_engine_packages(path: Path) -> None:
    tops = {name.split(".")[0] for _, name in imports(path)}
    if room_of(path) not in MAY_NAME_ENGINES:
        assert tops & ENGINE_PACKAGES == set()


def test_the_rules_themselves() -> None:
    assert allowed("bench", "core")
    assert allowed("goodput", "records")
    assert allowed("demo", "engines")
    assert not allowed("core", "config")
    assert not allowed("bench", "engines")
    assert not allowed("model", "engines")

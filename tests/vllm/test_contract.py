"""Every seam of the contract holds in the installed vLLM, and the contract names everything the code uses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from taper.engines.vllm import compat, contract

ROOM = Path(compat.__file__).parent
SCHEDULER = f"{contract.SCHED}.scheduler:Scheduler"
REQUEST = "vllm.v1.request:Request"


@pytest.mark.parametrize("one", [*contract.ENGINE, *contract.SERVER], ids=lambda one: one.name)
def test_seam(one):
    if missing := one.missing():
        pytest.fail(", ".join(missing), pytrace=False)


def attributes(module: str, *owners: str) -> set[str]:
    """What the module reads off names, or attributes of self, called one of `owners`."""
    tree = ast.parse((ROOM / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "attrgetter":
            found.add(ast.literal_eval(node.args[0]))
    return found


def test_what_is_read_off_the_scheduler_is_in_the_contract():
    used = attributes("seam", "scheduler", "self._scheduler")
    assert "current_step" in used
    assert used - {"skipped_waiting"} <= set(contract.ENGINE_HAS[SCHEDULER].split())  # asked for before it is read


@pytest.mark.parametrize("module", ["compat", "seam", "groups"])
def test_what_is_read_off_a_request_is_in_the_contract(module):
    used = attributes(module, "request", "one.request", "branch.request")
    assert used
    assert used <= set(contract.ENGINE_HAS[REQUEST].split())


class Base:
    def __init__(self) -> None:
        self.inherited = 1

    def method(self, first, second, third=None):
        return first.current + second


class Sample(Base):
    attribute = 1

    def own(self, first, *rest):
        return [third.nested for third in rest]


HERE = f"{__name__}:Sample"


def seam_of(table, make):
    (one,) = make(table)
    return one


@pytest.mark.parametrize(
    ("names", "missing"),
    [("attribute inherited method", []), ("attribute gone lost", ["Sample.gone", "Sample.lost"])],
)
def test_an_object_has_what_its_class_has_and_its_init_sets(names, missing):
    assert seam_of({HERE: names}, contract._has).missing() == missing


@pytest.mark.parametrize(
    ("path", "names", "holds"),
    [
        (f"{__name__}:Base.method", "first second", True),
        (f"{__name__}:Base.method", "first second third", True),
        (f"{__name__}:Base.method", "first", False),  # it wants one that we do not pass
        (f"{__name__}:Base.method", "first second fourth", False),
        (f"{__name__}:Sample.own", "first", True),
        (f"{__name__}:Sample.method", "first second", False),  # not its own
    ],
)
def test_a_signature_must_know_our_parameters_and_need_no_others(path, names, holds):
    assert (seam_of({path: names}, contract._takes).missing() == []) is holds


def test_a_use_may_be_in_a_nested_function():
    assert seam_of({f"{HERE}.own": "nested"}, contract._uses).missing() == []
    assert seam_of({f"{HERE}.own": "current"}, contract._uses).missing() == ["Sample.own() uses current"]


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        (f"{__name__}:Gone", f"Gone: module '{__name__}' has no attribute 'Gone'"),
        ("no_such_module:Gone", "Gone: No module named 'no_such_module'"),
    ],
)
def test_a_class_or_module_that_is_gone_is_a_missing_seam_and_no_error(path, missing):
    assert seam_of({path: "x"}, contract._has).missing() == [missing]

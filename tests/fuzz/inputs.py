"""Hostile input: what a reader accepts, changed a little, and what no reader has asked for."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

# Fragments that have broken readers before: numbers that fit no float or no int(), nesting that fits no stack.
FRAGMENTS = (
    "", "\n", "\r", "\0", ",", '"', "{", "}", "[", "]", "=", ":", "null", "true", "-1", "0", "1e999", "-1e999", "NaN",
    "nan", "inf",
    "9" * 400, "9" * 5000, "[" * 5000, '{"a":' * 5000, "²", "\ufeff", "\ud800", '"\\ud800"', "0x10", "1_0",
    "1.5", "x", "[[a]]",
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1, 0.5, 1e308, float("inf"), float("nan"), 10**30, 10**400, "", "x", "\ud800", [], {}, [[]],
    [None], {"a": 1},
)  # fmt: skip

_leaves = st.sampled_from(VALUES).map(
    deepcopy
)  # some of them are containers, which a later change would change for all
values: st.SearchStrategy[Any] = st.one_of(
    _leaves,
    st.recursive(
        _leaves | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON tree is, the root included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in items for found in _paths(value, (*path, key)))]


@st.composite
def trees(draw: st.DrawFn, seeds: tuple[str, ...]) -> Any:
    """A seed, parsed, with up to three values replaced, left out or added."""
    tree = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        paths = [path for path in _paths(tree) if path]
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        parent = tree
        for key in above:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "drop", "add"])), parent:
            case "replace", dict() | list():
                parent[last] = draw(values)
            case "drop", dict() | list():
                del parent[last]
            case "add", dict():
                parent[draw(st.text(max_size=8))] = draw(values)
    return tree


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[str, ...]) -> str:
    """A seed with up to four pieces cut out, doubled or replaced by a fragment."""
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(st.sampled_from(FRAGMENTS) | st.just(text[start:end] * 2) | st.text(max_size=5))
        text = text[:start] + piece + text[end:]
    return text


def json_texts(*seeds: str) -> st.SearchStrategy[str]:
    changed = st.one_of(trees(seeds).map(json.dumps), values.map(json.dumps), mutated(seeds))
    return st.one_of(st.sampled_from(seeds), changed, st.text(max_size=40))


def toml_texts(*seeds: str) -> st.SearchStrategy[str]:
    """Also with the value of one line replaced."""
    hostile = (
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e300",
        "9" * 30,
        "9" * 400,
        "true",
        '"x"',
        "[]",
        "{}",
        "[[1]]",
        "1979-05-27",
    )

    @st.composite
    def revalued(draw: st.DrawFn) -> str:
        lines = draw(st.sampled_from(seeds)).splitlines()
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.sampled_from([at for at, line in enumerate(lines) if "=" in line]))
            lines[at] = lines[at].partition("=")[0] + "= " + draw(st.sampled_from(hostile))
        return "\n".join(lines)

    return st.one_of(st.sampled_from(seeds), revalued(), mutated(seeds), st.text(max_size=40))


def texts(*seeds: str) -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from(seeds), mutated(seeds), st.text(max_size=40))

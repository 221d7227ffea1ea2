"""Profiles on disk: written whole or not at all, and refused with one specific line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.profile import (
    SCHEMA,
    Profile,
    ProfileKey,
    cache_dir,
    find_profile,
    load_profile,
    model_identity,
    parse_profile,
    profile_path,
    save_profile,
)  # fmt: skip

KEY = ProfileKey(model="org/Model-1B", dtype="bfloat16", device="cpu x2", parallel="tp1-pp1-dp1", vllm="0.32.0")
PROFILE = Profile(
    key=KEY,
    coefficients={"base_s": 0.014, "row_s": 5e-4, "context_s": 1.7e-6, "prefill_s": 3.6e-4},
    capture_sizes=(1, 2, 4),
    fit={"samples": 10, "mape": 0.03},
    created="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPER_CACHE_DIR", str(tmp_path / "cache"))


def altered(**changes: Any) -> dict[str, Any]:
    return {**PROFILE.to_json(), **changes}


def test_what_is_saved_is_what_is_found() -> None:
    assert find_profile(KEY) is None
    path = save_profile(PROFILE)
    assert path == profile_path(KEY)
    assert find_profile(KEY) == PROFILE
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert os.listdir(path.parent) == [path.name]  # nothing temporary is left behind


def test_the_law_of_a_profile() -> None:
    law = LinearLatency(base_s=0.014, row_s=5e-4, context_s=1.7e-6, prefill_s=3.6e-4, capture_sizes=(1, 2, 4))
    assert PROFILE.latency() == law


def test_any_difference_in_the_key_is_another_file() -> None:
    others = [
        ProfileKey(**{**PROFILE.to_json()["key"], name: "other"})
        for name in ("model", "dtype", "device", "parallel", "vllm")
    ]
    assert len({key.file_name for key in [KEY, *others]}) == 6
    assert KEY.file_name.startswith("Model-1B-bfloat16-")


def test_a_failed_write_leaves_the_old_profile(tmp_path: Path) -> None:
    path = save_profile(PROFILE, tmp_path / "p.json")
    unwritable = Profile(key=KEY, coefficients=PROFILE.coefficients, fit={"mape": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        save_profile(unwritable, path)
    assert load_profile(path) == PROFILE
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(PROFILE, tmp_path / "file" / "p.json")


def test_every_truncation_is_refused_with_one_line(tmp_path: Path) -> None:
    whole = save_profile(PROFILE, tmp_path / "whole.json").read_bytes()
    cut = tmp_path / "cut.json"
    for size in range(len(whole.rstrip())):
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigError) as caught:
            load_profile(cut)
        assert str(cut) in str(caught.value)
        assert "\n" not in str(caught.value)
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="truncated"):
        load_profile(cut)


def test_a_law_with_a_knee_comes_back_as_it_was(tmp_path: Path) -> None:
    knee = {**PROFILE.coefficients, "knee_rows": 128.0, "steep_s": 7e-5}
    path = save_profile(replace(PROFILE, coefficients=knee), tmp_path / "knee.json")
    assert load_profile(path).latency() == replace(PROFILE.latency(), knee_rows=128.0, steep_s=7e-5)


def test_a_foreign_profile_names_both_keys(tmp_path: Path) -> None:
    path = save_profile(PROFILE, tmp_path / "p.json")
    here = ProfileKey(model="m", dtype="float32", device="H200", parallel="tp8-pp1-dp1", vllm="0.30.0")
    with pytest.raises(ConfigError) as caught:
        load_profile(path, expected=here)
    assert str(KEY) in str(caught.value)
    assert str(here) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "must hold a JSON object, not list"),
        (altered(schema="taper.profile/9"), "'taper.profile/9', this TAPER reads 'taper.profile/1'"),
        ({"schema": SCHEMA}, "missing capture_sizes, coefficients, created, fit, key"),
        (altered(key={"model": "m"}), "key: unknown or missing device, dtype, parallel, vllm"),
        (altered(key={**PROFILE.to_json()["key"], "model": 3}), "model must be a non-empty string, not 3"),
        (altered(coefficients={"base_s": 1.0}), "coefficients: unknown or missing"),
        (altered(coefficients={**PROFILE.coefficients, "knee_rows": 8}), "coefficients: unknown or missing knee_rows"),
        (altered(coefficients={**PROFILE.coefficients, "row_s": "x"}), "row_s must be a number, not 'x'"),
        (altered(coefficients={**PROFILE.coefficients, "row_s": True}), "row_s must be a number, not True"),
        (altered(coefficients={**PROFILE.coefficients, "row_s": -1.0}), "row_s must be between 0 and 3600, not -1"),
        (altered(coefficients={**PROFILE.coefficients, "base_s": 0.0}), "base_s must be between 1e-06 and 3600, not 0"),
        (
            altered(coefficients={**PROFILE.coefficients, "base_s": float("nan")}),
            "base_s must be between 1e-06 and 3600, not nan",
        ),
        (
            altered(coefficients={**PROFILE.coefficients, "row_s": 1e308}),
            "row_s must be between 0 and 3600, not 1e+308",
        ),
        (
            altered(coefficients={**PROFILE.coefficients, "row_s": 10**400}),
            "row_s must be between 0 and 3600, not 1000",
        ),
        (altered(coefficients={**PROFILE.coefficients, "base_s": 1e-300}), "base_s must be between 1e-06"),
        (altered(capture_sizes=[4, 2]), "ascending"),
        (altered(capture_sizes=[1.5]), "capture_sizes must be a list of integers from 1 to 65536"),
        (altered(capture_sizes=[True]), "capture_sizes must be a list of integers from 1 to 65536"),
        (altered(capture_sizes=[1, 10**12]), "capture_sizes must be a list of integers from 1 to 65536"),
        (altered(fit=[]), "fit must hold a JSON object"),
        (altered(created=None), "created must be a string"),
    ],
)
def test_what_a_profile_must_not_be(raw: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_profile(raw, where="here")
    assert str(caught.value).startswith("here: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"schema": NaN}', "NaN is not a number"),
        (b'{"schema": "\xff"}', "not UTF-8"),
        (b"{]}", "not JSON"),
        (b"[" * (1 << 19), "no TAPER profile"),
        (b"9" * (1 << 19), "no TAPER profile"),
        (b" " * ((1 << 20) + 1), "no TAPER profile"),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_profile(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"TAPER_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/taper"),
        ({"HOME": "/c"}, "/c/.cache/taper"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wanted: str) -> None:
    for name in ("TAPER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(wanted)


def test_a_local_folder_is_named_without_saying_where_it_is(tmp_path):
    assert model_identity("org/Model-1B") == "org/Model-1B"
    folders = [tmp_path / "a" / "Model", tmp_path / "b" / "Model"]
    for folder in folders:
        folder.mkdir(parents=True)
    first, second = (model_identity(str(folder)) for folder in folders)
    assert first.startswith("Model@")
    assert str(tmp_path) not in first
    assert first != second

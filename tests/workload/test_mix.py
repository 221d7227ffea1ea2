"""Requests follow from (seed, index) alone, and their shapes stay within the mix."""

from __future__ import annotations

import pytest

from taper.core.types import ConfigError
from taper.workload.mix import Mix, request, schedule

MIX = Mix(branching_share=0.4, fan_out=(4, 16), serial_tokens=(40, 120), branch_tokens=(32, 64))


def test_a_request_is_reproduced_from_seed_and_index() -> None:
    drawn = [request(MIX, seed=7, index=index) for index in range(50)]
    assert request(MIX, seed=7, index=31) == drawn[31]
    assert request(MIX, seed=8, index=31) != drawn[31]


def test_shapes_stay_in_range_and_cover_it() -> None:
    drawn = [request(MIX, seed=0, index=index) for index in range(2000)]
    branching = [one for one in drawn if one.kind == "branching"]
    serial = [one for one in drawn if one.kind == "serial"]
    assert len(branching) / len(drawn) == pytest.approx(0.4, abs=0.04)
    assert {one.branches for one in branching} == set(range(4, 17))
    assert {one.branches for one in serial} == {1}
    assert {one.max_tokens for one in serial} == set(range(40, 121))
    assert {one.max_tokens for one in branching} == set(range(32, 65))
    mean = sum(one.branches * one.max_tokens for one in drawn) / len(drawn)
    assert mean == pytest.approx(MIX.mean_tokens, rel=0.06)


def test_prompts_differ_and_have_the_length_of_a_short_question() -> None:
    prompts = [request(MIX, seed=0, index=index).prompt for index in range(300)]
    assert len(set(prompts)) >= 299
    assert len({prompt[:12] for prompt in prompts}) > 250  # a shared beginning would hit the prefix cache
    assert all(12 <= len(prompt.split()) <= 45 for prompt in prompts)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_pure_mixes(share: float) -> None:
    mix = Mix(branching_share=share)
    kinds = {request(mix, seed=0, index=index).kind for index in range(200)}
    assert kinds == {"branching" if share else "serial"}


def test_scaling_keeps_the_shape() -> None:
    half = Mix(serial_tokens=(80, 120), branch_tokens=(48, 72)).scaled(0.5)
    assert (half.serial_tokens, half.branch_tokens, half.fan_out) == ((40, 60), (24, 36), (4, 16))
    assert half.scaled(0.001).serial_tokens == (2, 2)


def test_schedule_numbers_arrivals() -> None:
    planned = schedule(MIX, [0.5, 0.75], seed=3)
    assert [(one.offset_s, one.spec) for one in planned] == [
        (0.5, request(MIX, seed=3, index=0)),
        (0.75, request(MIX, seed=3, index=1)),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branching_share": 1.5}, "branching_share"),
        ({"fan_out": (1, 4)}, "fan_out"),
        ({"serial_tokens": (9, 8)}, "serial_tokens"),
        ({"branch_tokens": (0, 8)}, "branch_tokens"),
    ],
)
def test_impossible_mixes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mix(**settings)  # type: ignore[arg-type]

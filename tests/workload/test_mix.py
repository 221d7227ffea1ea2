"""Requests follow from (seed, index) alone, and their shapes stay within the mix."""

from __future__ import annotations

import numpy as np
import pytest

from taper.core.types import ConfigError
from taper.workload import Branching, Lengths, Mix, parse_mix, profile, profile_names
from taper.workload.prompts import prompt_ids, prompt_text

FORKING = Branching(
    forks=Lengths(low=2, high=2),
    stage=Lengths(low=5, high=6),
    fanout=Lengths(low=2, high=3),
    branch=Lengths(low=7, high=9),
)


def test_a_request_is_reproduced_from_seed_and_index() -> None:
    drawn = [Mix().request(seed=7, index=index) for index in range(50)]
    assert Mix().request(seed=7, index=31) == drawn[31]
    assert Mix().request(seed=8, index=31) != drawn[31]


def test_siblings_at_arrival_are_one_fork_of_equal_branches() -> None:
    drawn = [Mix().request(seed=0, index=index) for index in range(2000)]
    branching = [one for one in drawn if one.branching]
    serial = [one for one in drawn if not one.branching]
    assert len(branching) / len(drawn) == pytest.approx(0.4, abs=0.04)
    assert {one.branches for one in branching} == set(range(4, 17))
    assert {one.tokens for one in serial} == set(range(100, 151))
    assert all(len(one.stages) == 1 and len(set(one.stages[0])) == 1 for one in branching)
    assert {one.critical_path_tokens for one in branching} == set(range(48, 73))


def test_stages_have_the_shape_of_the_mix() -> None:
    mix = Mix(branching_share=1.0, branching=FORKING)
    for index in range(200):
        widths = [len(stage) for stage in mix.request(seed=0, index=index).stages]
        assert widths[0::2] == [1, 1, 1]
        assert all(2 <= width <= 3 for width in widths[1::2])


def test_a_larger_share_only_adds_branching_requests() -> None:
    few, many = (Mix(branching_share=share) for share in (0.2, 0.6))
    for index in range(300):
        one, other = few.request(seed=1, index=index), many.request(seed=1, index=index)
        assert one == other or not one.branching


def test_slo_classes_cover_their_shares() -> None:
    mix = Mix(branching_share=0.0, slo_classes=((0.25, 0.5), (0.25, 2.0)))
    factors = np.array([mix.request(seed=0, index=index).slo_factor for index in range(4000)])
    assert [np.mean(factors == wanted) for wanted in (0.5, 2.0, 1.0)] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


def test_requests_that_branch_may_have_classes_of_their_own() -> None:
    mix = Mix(branching_share=0.5, slo_classes=((0.5, 0.8),), branching_slo=((0.25, 0.65), (0.25, 0.4)))
    drawn = [mix.request(seed=0, index=index) for index in range(4000)]
    for branching, shares in ((True, {0.65: 0.25, 0.4: 0.25, 1.0: 0.5}), (False, {0.8: 0.5, 1.0: 0.5})):
        factors = np.array([one.slo_factor for one in drawn if one.branching is branching])
        assert {factor: np.mean(factors == factor) for factor in shares} == pytest.approx(shares, abs=0.03)


def test_scaling_keeps_fan_out_and_share() -> None:
    half = Mix(branching=FORKING).scaled(0.5, prompt=0.1)
    assert half.serial == Lengths(low=50, high=75)
    assert half.prompt == Lengths(low=3, high=5)
    assert half.branching.branch == Lengths(low=4, high=4)
    assert half.branching.fanout == FORKING.fanout


def drawn_from(name: str, count: int = 3000) -> list[tuple[tuple[int, ...], ...]]:
    shape = profile(name)
    assert shape is not None
    return [shape.stages(np.random.default_rng((5, index)), 100) for index in range(count)]


def test_the_sprint_profile_has_the_published_figures() -> None:
    stages = drawn_from("sprint")
    forks = [stage for one in stages for stage in one[1::2]]
    widths = np.array([len(stage) for stage in forks])
    tokens = np.array([length for stage in forks for length in stage])
    assert np.mean([len(one[1::2]) for one in stages]) == pytest.approx(4.46, rel=0.03)
    assert widths.mean() == pytest.approx(1.85, rel=0.03)
    assert np.percentile(widths, [90, 99, 100]).tolist() == [3, 7, 11]
    assert tokens.mean() == pytest.approx(282, rel=0.03)
    assert np.percentile(tokens, [50, 90, 99]) == pytest.approx([173, 596, 1840], rel=0.07)


def test_the_multiverse_profile_gives_the_published_tokens_per_step() -> None:
    stages = drawn_from("multiverse")
    tokens = sum(sum(map(sum, one)) for one in stages)
    assert 1.15 <= tokens / sum(sum(map(max, one)) for one in stages) <= 1.18


def test_the_other_profiles() -> None:
    assert profile("none") is None
    assert all(len(one) == 1 and set(one[0]) == {100} for one in drawn_from("best-of-n", 200))
    outline = drawn_from("sot", 200)
    assert {len(one) for one in outline} == {2}
    assert {len(one[1]) for one in outline} == set(range(3, 11))
    page = drawn_from("hpd", 200)
    assert {len(one[1]) for one in page} <= set(range(7, 26))  # 6 to 24 children and the parent
    assert all(100 <= one[1][0] <= 300 for one in page)
    assert set(map(len, drawn_from("agentic", 200))) == {3, 5, 7, 9}
    assert profile_names() == ("none", "best-of-n", "multiverse", "sprint", "sot", "hpd", "agentic")
    with pytest.raises(ConfigError, match=r"one of none, best-of-n.*not 'sprnt'"):
        profile("sprnt")


def test_a_mix_from_a_table() -> None:
    table = {"branching_share": 0.2, "serial": {"low": 1, "high": 2}, "forks": 2, "fanout": {"low": 8, "high": 9}}
    mix = parse_mix(table, "mix")
    assert (mix.branching_share, mix.serial) == (0.2, Lengths(low=1, high=2))
    assert (mix.branching.forks, mix.branching.fanout) == (Lengths(low=2, high=2), Lengths(low=8, high=9))
    assert parse_mix({"profile": "sot"}, "mix").branching == profile("sot")
    assert parse_mix({"profile": "none"}, "mix").branching_share == 0.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"profile": "sot", "forks": 2}, "profile and forks do not go together"),
        ({"fan_out": 3}, "unknown key 'fan_out'"),
        ({"closing": 1}, "closing must be true or false"),
        ({"branching_share": 1.5}, "branching_share"),
        ({"slo_classes": [[0.5, 0.0]]}, "slo_classes"),
        ({"branching_slo": [[1.5, 0.5]]}, "branching_slo"),
        ({"branching_slo": 0.65}, "mix: branching_slo must be pairs of a share and a factor, not 0.65"),
    ],
)
def test_impossible_mixes_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mix(table, "mix")


def test_prompts_differ_and_have_the_length_asked_for() -> None:
    requests = [Mix().request(seed=0, index=index) for index in range(300)]
    texts = [prompt_text(one) for one in requests]
    assert len(set(texts)) >= 299
    assert len({text[:12] for text in texts}) > 250  # a shared beginning would hit the prefix cache
    assert all(12 <= len(text.split()) <= 65 for text in texts)
    assert [len(prompt_ids(one)) for one in requests] == [one.prompt_tokens for one in requests]
    assert prompt_ids(requests[3]) == prompt_ids(requests[3]) != prompt_ids(requests[4])[: requests[3].prompt_tokens]
    long = Mix(prompt=Lengths(low=1000, high=1000)).request(seed=0, index=0)
    assert pytest.approx(1.3 * len(prompt_text(long).split()), rel=0.05) == 1000

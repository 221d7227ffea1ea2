import numpy as np
import pytest

from taper.core.types import ConfigError
from taper.sim.workload import Arrivals, Lengths, Mix, Request, generate

MIX = Mix(
    branching_share=0.5,
    prompt=Lengths(low=10, high=20),
    serial=Lengths(low=30, high=40),
    stage=Lengths(low=5, high=6),
    fanout=Lengths(low=2, high=3),
    branch=Lengths(low=7, high=9),
    forks=2,
)


def requests(rate: float = 2.0, seed: int = 1, mix: Mix = MIX) -> list[Request]:
    return generate(mix=mix, arrivals=Arrivals(), rate_per_s=rate, duration_s=100.0, seed=seed)


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    assert requests() == requests()
    assert requests() != requests(seed=2)


def test_a_request_keeps_its_shape_at_any_load() -> None:
    slow, fast = requests(rate=1.0), requests(rate=3.0)
    assert [r.stages for r in slow] == [r.stages for r in fast[: len(slow)]]


def test_stages_have_the_shape_of_the_mix() -> None:
    for request in requests():
        widths = [len(stage) for stage in request.stages]
        if not request.branching:
            assert widths == [1]
            assert 30 <= request.tokens <= 40
            continue
        assert widths[0::2] == [1, 1, 1]
        assert all(2 <= width <= 3 for width in widths[1::2])
        assert all(7 <= tokens <= 9 for stage in request.stages[1::2] for tokens in stage)


def test_a_fork_at_arrival_is_one_parallel_stage() -> None:
    mix = Mix(branching_share=1.0, prompt=MIX.prompt, serial=MIX.serial, fork_at_arrival=True)
    assert all(len(request.stages) == 1 and request.branching for request in requests(mix=mix))


def test_what_a_request_adds_up_to() -> None:
    request = Request(arrival_s=0.0, prompt_tokens=1, stages=((5,), (3, 9, 4), (2,)))
    assert (request.tokens, request.serial_tokens, request.critical_path_tokens) == (23, 7, 16)


def test_slo_classes_cover_their_shares() -> None:
    mix = Mix(branching_share=0.0, prompt=MIX.prompt, serial=MIX.serial, slo_classes=((0.25, 0.5), (0.25, 2.0)))
    factors = [r.slo_factor for r in requests(rate=40.0, mix=mix)]
    shares = [np.isclose(factors, wanted).mean() for wanted in (0.5, 2.0, 1.0)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03)


def test_bursts_keep_the_rate_and_come_in_the_first_part_of_each_period() -> None:
    bursts = Arrivals(burst_period_s=10.0, burst_share=0.2)
    times = np.array(bursts.times(5.0, 1000.0, np.random.default_rng(0)))
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert (times % 10.0).max() <= 2.0
    assert (np.diff(times) >= 0).all()


def test_lognormal_lengths_put_the_range_at_the_fifth_and_ninety_fifth_percentile() -> None:
    lengths = Lengths(low=40, high=500, shape="lognormal")
    rng = np.random.default_rng(0)
    drawn = np.array([lengths.draw(rng) for _ in range(20_000)])
    assert np.percentile(drawn, [5, 95]) == pytest.approx([40, 500], rel=0.06)
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.03)


def test_lengths_that_are_none_are_refused() -> None:
    for low, high in ((0, 5), (6, 5)):
        with pytest.raises(ConfigError, match="1 <= low <= high"):
            Lengths(low=low, high=high)

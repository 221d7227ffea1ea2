from dataclasses import replace

import numpy as np
import pytest

from taper.core.types import ConfigError, StepLoad
from taper.sim.cost import Disturbance, StepCost
from taper.sim.hardware import Hardware, hardware

MACHINE = Hardware(name="m", base_s=10.0, row_s=1.0, context_s=0.5, prefill_s=2.0, noise=0.0)


def cost(machine: Hardware, disturbance: Disturbance, seed: int = 0) -> StepCost:
    return StepCost(machine, disturbance, duration_s=100.0, seed=seed)


def test_the_law() -> None:
    assert MACHINE.seconds(StepLoad(rows=3, context_tokens=4, prefill_tokens=5)) == 10 + 3 + 2 + 10


def test_rows_are_padded_to_the_next_captured_size() -> None:
    padded = Hardware(name="m", base_s=10.0, row_s=1.0, context_s=0.0, prefill_s=0.0, capture_sizes=(1, 4, 8))
    seconds = [padded.seconds(StepLoad(rows=n, context_tokens=0, prefill_tokens=0)) for n in (0, 1, 2, 4, 5, 9)]
    assert seconds == [11, 11, 14, 14, 18, 19]


def test_a_spike_multiplies_and_drift_grows_linearly() -> None:
    load = StepLoad(rows=0, context_tokens=0, prefill_tokens=0)
    assert cost(MACHINE, Disturbance(spike_share=1.0, spike_factor=12.0)).seconds(load, 0.0) == 120
    drifting = cost(MACHINE, Disturbance(drift_to=1.5))
    assert [drifting.seconds(load, at) for at in (0.0, 50.0, 100.0, 900.0)] == [10, 12.5, 15, 15]


def test_noise_is_the_same_for_the_same_seed_only() -> None:
    load = StepLoad(rows=1, context_tokens=0, prefill_tokens=0)
    noisy = hardware("cpu-smollm2")
    first, again, other = (cost(noisy, Disturbance(), seed) for seed in (1, 1, 2))
    draws = [first.seconds(load, 0.0) for _ in range(5000)]
    assert draws == [again.seconds(load, 0.0) for _ in range(5000)]
    assert draws[0] != other.seconds(load, 0.0)


def test_noise_that_lasts_keeps_its_size_and_has_its_memory() -> None:
    load = StepLoad(rows=0, context_tokens=0, prefill_tokens=0)
    lasting = replace(MACHINE, noise=0.2, slow_share=0.6, slow_steps=10.0)
    costs = cost(lasting, Disturbance())
    logs = np.log([costs.seconds(load, 0.0) / 10 for _ in range(100_000)])
    assert logs.std() == pytest.approx(0.2, rel=0.05)
    for lag in (1, 10):
        measured = np.corrcoef(logs[lag:], logs[:-lag])[0, 1]
        assert measured == pytest.approx(0.6 * np.exp(-lag / 10), abs=0.03), lag


def test_the_predictor_knows_the_law_up_to_its_bias_and_not_the_staircase() -> None:
    predictor = hardware("a100x8-qwen3-32b").predictor(bias=0.5)
    assert predictor.predict(3, 0, 0) == pytest.approx(0.5 * (11.2e-3 + 3 * 100e-6))
    assert predictor.capture_sizes == ()


def test_a_slower_machine_is_slower_in_every_term() -> None:
    load = StepLoad(rows=3, context_tokens=4, prefill_tokens=5)
    assert MACHINE.scaled(2.0).seconds(load) == 2 * MACHINE.seconds(load)


def test_hardware_by_name_or_unique_prefix() -> None:
    assert hardware("a100x8").name == "a100x8-qwen3-32b"
    for wrong in ("h200", "tpu", ""):
        with pytest.raises(ConfigError, match="hardware must be one of a100x8-qwen3-32b, cpu-smollm2"):
            hardware(wrong)

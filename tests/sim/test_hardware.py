import json
from pathlib import Path

import pytest

from taper.core.types import ConfigError, StepLoad
from taper.profile import Profile, ProfileKey, save_profile
from taper.sim.hardware import CUDA_GRAPH_SIZES, UNBOUNDED, calibrated, hardware, machines, parse


def profile(path: Path, *, row_s: float, prefill_s: float, fit: dict[str, float], sizes: tuple[int, ...] = ()) -> Path:
    key = ProfileKey(model="org/model", dtype="bfloat16", device="card", parallel="tp1-pp1-dp1", vllm="0.32.0")
    coefficients = {"base_s": 10e-3, "row_s": row_s, "context_s": 0.0, "prefill_s": prefill_s}
    return save_profile(Profile(key=key, coefficients=coefficients, capture_sizes=sizes, fit=fit), path)


def test_a_calibrated_profile_is_a_machine(tmp_path: Path) -> None:
    path = profile(tmp_path / "p.json", row_s=100e-6, prefill_s=50e-6, fit={"noise_floor": 0.04}, sizes=(1, 2, 4))
    machine = hardware(str(path))
    assert (machine.name, machine.base_s, machine.row_s, machine.prefill_s) == ("model on card", 10e-3, 100e-6, 50e-6)
    assert (machine.capture_sizes, machine.kv_tokens, machine.max_rows) == ((1, 2, 4), UNBOUNDED, UNBOUNDED)
    assert machine.noise == pytest.approx(0.04 * 1.2533)
    assert machine.nominal_requests == 76  # 0.76 * 10 ms / 100 us
    assert (machine.output_scale, machine.max_batched_tokens) == (1.0, 2048)


def test_a_slow_prefill_means_short_requests(tmp_path: Path) -> None:
    machine = hardware(str(profile(tmp_path / "p.json", row_s=500e-6, prefill_s=300e-6, fit={})))
    like = hardware("cpu-smollm2")
    assert (machine.output_scale, machine.prompt_scale) == (like.output_scale, like.prompt_scale)
    assert (machine.noise, machine.nominal_requests) == (like.noise, 15)


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        hardware(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"schema": "x"}), "utf-8")
    with pytest.raises(ConfigError, match="schema is 'x'"):
        hardware(str(tmp_path / "bad.json"))
    free = profile(tmp_path / "free.json", row_s=0.0, prefill_s=1e-6, fit={})
    with pytest.raises(ConfigError, match="prices rows at zero"):
        hardware(str(free))


def test_the_shipped_h200_is_the_one_that_was_measured() -> None:
    measured = calibrated(Path(__file__).parents[2] / "results/gpu/h200-qwen3-32b/profile.json")
    shipped = hardware("h200x1-qwen3-32b")
    for name in ("base_s", "row_s", "context_s", "prefill_s", "knee_rows", "steep_s"):
        assert getattr(shipped, name) == pytest.approx(getattr(measured, name), rel=0.02), name
    assert shipped.capture_sizes == measured.capture_sizes
    load = StepLoad(rows=300, context_tokens=100_000, prefill_tokens=64)
    assert shipped.seconds(load) == pytest.approx(measured.seconds(load), rel=0.02)
    assert shipped.predictor().predict_load(load) == pytest.approx(shipped.seconds(load), rel=0.05)


@pytest.mark.parametrize("name", machines())
def test_every_shipped_machine_is_a_file_and_takes_a_prefix(name: str) -> None:
    assert hardware(name).name == name
    assert hardware(name[:6] + name[6:-1]).name == name


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base_s = 1e-2\nrow_s = 1e-4\ncontext_s = 0\nprefill_s = 1e-5\ncapture_sizes = "vllm"\n', "utf-8")
    machine = hardware(str(path))
    assert (machine.name, machine.base_s, machine.context_s) == ("mine", 1e-2, 0.0)
    assert machine.capture_sizes == CUDA_GRAPH_SIZES
    with pytest.raises(ConfigError, match=r"hardware .*none.toml: No such file"):
        hardware(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row_s = 1e-4\ncontext_s = 0\nprefill_s = 0", "hardware mine: base_s: Field required"),
        ("base_s = 0\nrow_s = 1e-4\ncontext_s = 0\nprefill_s = 0", "base_s: Input should be greater than 0"),
        ("base_s = 1\nrow_s = -1\ncontext_s = 0\nprefill_s = 0", "row_s: Input should be greater than or equal to 0"),
        ("base_s = 1\nrow_s = 1\ncontext_s = 0\nprefill_s = 0\nbase = 3", "base: Unexpected keyword argument"),
        ("base_s = '1'\nrow_s = 1\ncontext_s = 0\nprefill_s = 0", "base_s: Input should be a valid number"),
        (
            "base_s = 1\nrow_s = 1\ncontext_s = 0\nprefill_s = 0\ncapture_sizes = 'all'",
            "capture_sizes: Input should be",
        ),
        (
            "base_s = 1\nrow_s = 1\ncontext_s = 0\nprefill_s = 0\nslow_share = 2",
            "slow_share: Input should be less than",
        ),
        ("base_s", "not TOML"),
    ],
)
def test_a_file_that_is_no_machine_says_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("mine", text)

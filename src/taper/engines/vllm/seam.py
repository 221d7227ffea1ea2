"""One vLLM scheduler, reduced to what TAPER reads and does. With `compat`, the only module to name its privates."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import filterfalse
from typing import Any

from taper.engines.vllm.compat import installed
from taper.engines.vllm.facts import engine_facts

START_QUEUES = ("waiting", "skipped_waiting")  # the latter up to 0.30


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """One of the scheduler's queues while a short one stands in for it."""

    name: str
    queue: Any
    kept: list[Any]  # what the short one began with
    live: int  # requests that the scheduler had then


class SchedulerSeam:
    """The scheduler's state as numbers, and the few levers on it. Nothing in here decides anything."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.vllm_config
        self._scheduler = scheduler
        self.is_async = bool(config.scheduler_config.async_scheduling)
        self.block_tokens = int(scheduler.block_size)
        self.hash_block_tokens = int(getattr(scheduler, "hash_block_size", scheduler.block_size))
        self.caches_prefixes = bool(scheduler.cache_config.enable_prefix_caching)
        self.max_rows = int(getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs))
        self.spec_tokens = int(scheduler.num_spec_tokens)
        self.last_position = int(scheduler.max_model_len) - int(scheduler.num_sampled_tokens_per_step)
        self.adapters = scheduler.lora_config is not None
        self.otlp_endpoint: str | None = config.observability_config.otlp_traces_endpoint
        self.replica = int(scheduler.parallel_config.data_parallel_index)
        # Decodes of one request are spaced by the pipeline depth only on the V2 runner.
        is_v2 = bool(scheduler.use_v2_model_runner)
        self.is_staggered = is_v2 and scheduler.parallel_config.pipeline_parallel_size > 1
        self._clears_drafts = self.is_async and self.spec_tokens > 0 and not is_v2
        self._kv_groups = max(len(scheduler.kv_cache_config.kv_cache_groups), 1)
        # A bound on prompt tokens must not fall below what the engine schedules in one piece.
        self.can_limit_prefill = bool(
            scheduler.scheduler_config.enable_chunked_prefill
            and not scheduler.scheduler_config.disable_chunked_mm_input
            and not scheduler.need_mamba_block_aligned_split
            and not getattr(scheduler, "num_prefill_lookahead", 0)  # from 0.27
        )

    @property
    def _pool(self) -> Any:
        return self._scheduler.kv_cache_manager.block_pool

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Identity and bounds of this engine, see `engine_facts`."""
        found = installed()
        return engine_facts(
            self._scheduler.vllm_config,
            vllm_version=found[1] if found else "unknown",
            kv_tokens=int(self._pool.num_gpu_blocks) // self._kv_groups * self.block_tokens,
        )

    @property
    def running(self) -> list[Any]:
        running: list[Any] = self._scheduler.running
        return running

    @property
    def next_step(self) -> int:
        """Number that the coming `schedule()` call will carry."""
        return int(self._scheduler.current_step) + 1

    @property
    def max_step_tokens(self) -> int:
        return int(self._scheduler.max_num_scheduled_tokens)

    @max_step_tokens.setter
    def max_step_tokens(self, tokens: int) -> None:
        self._scheduler.max_num_scheduled_tokens = tokens

    @property
    def kv_usage(self) -> float:
        return float(self._scheduler.kv_cache_manager.usage)

    @property
    def kv_free_tokens(self) -> int:
        blocks = self._pool.get_num_free_blocks()
        return int(blocks) // self._kv_groups * self.block_tokens

    def is_known(self, request_id: str) -> bool:
        return request_id in self._scheduler.requests

    @property
    def is_empty(self) -> bool:
        return not self._scheduler.requests

    def defer(self, requests: Iterable[Any]) -> None:
        """Skip these rows in the coming step, and in no other. Frees nothing; harmless where not running."""
        after = self.next_step + 1
        for request in requests:
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, after)
            if self._clears_drafts and request.spec_token_ids:
                # The worker matches drafts to the rows of the step before; those of a skipped row are lost.
                # The list is shared between requests, so it is replaced and not emptied.
                request.spec_token_ids = []

    def hold(self, requests: Set[Any]) -> list[SetAside]:
        """Give the coming call queues without these requests; give the result to `release`.

        The queue itself is set aside untouched: taking thousands out of it and putting them back costs more than a
        copy of the few that stay.
        """
        aside = []
        for name in START_QUEUES:
            queue: Any = getattr(self._scheduler, name, ())
            kept = list(filterfalse(requests.__contains__, _members(queue)))
            if len(kept) < len(queue):
                short = type(queue)()
                for request in kept:
                    short.add_request(request)
                setattr(self._scheduler, name, short)
                aside.append(SetAside(name=name, queue=queue, kept=kept, live=len(self._scheduler.requests)))
        return aside

    def release(self, aside: list[SetAside]) -> None:
        """The whole queues again, less what has left the short ones and with what has come into them in front."""
        for one in aside:
            short = getattr(self._scheduler, one.name)
            left, known = set(_members(short)), set(one.kept)
            gone = [request for request in one.kept if request not in left]
            come = [request for request in short if request not in known]
            if len(self._scheduler.requests) < one.live:  # a request that ended meanwhile has no place in a queue
                gone += [request for request in _members(one.queue) if request.is_finished()]
            if gone:
                one.queue.remove_requests(gone)
            one.queue.prepend_requests(reversed(come) if hasattr(short, "extendleft") else come)
            setattr(self._scheduler, one.name, one.queue)


def _members(queue: Any) -> Any:
    """The queue's requests, of a priority queue in no order: in order it sorts itself anew each time."""
    return getattr(queue, "_heap", queue)


def step_rows(output: Any) -> tuple[int, int, int]:
    """(decode rows, context tokens they read, prompt tokens) of a SchedulerOutput."""
    scheduled: dict[str, int] = output.num_scheduled_tokens
    cached = output.scheduled_cached_reqs
    drafts = output.scheduled_spec_decode_tokens
    if output.total_num_scheduled_tokens == len(scheduled) and not output.scheduled_new_reqs:
        return len(scheduled), sum(cached.num_computed_tokens), 0
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed.update((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
    chunks = [name for name, tokens in scheduled.items() if tokens > 1 and name not in drafts]
    prefill = sum(map(scheduled.__getitem__, chunks))
    context = sum(computed.values()) - sum(map(computed.__getitem__, chunks))
    return len(scheduled) - len(chunks), context, prefill


def preempted(output: Any) -> bool:
    return bool(output.preempted_req_ids)

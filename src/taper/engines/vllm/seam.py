"""One vLLM scheduler, reduced to what TAPER reads and does. With `compat`, the only module to name its privates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from taper.engines.vllm.compat import installed
from taper.engines.vllm.facts import engine_facts


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

    def hold(self, requests: set[Any]) -> list[tuple[Any, list[Any]]]:
        """Take requests out of the queues that starts are taken from; give the result to `release`."""
        held = []
        queues = [self._scheduler.waiting]
        if hasattr(self._scheduler, "skipped_waiting"):  # up to 0.30
            queues.append(self._scheduler.skipped_waiting)
        for queue in queues:
            taken = [request for request in queue if request in requests]
            if taken:
                queue.remove_requests(taken)
                held.append((queue, taken))
        return held

    def release(self, held: list[tuple[Any, list[Any]]]) -> None:
        """Put held requests back at the front of their queue, in the order they had."""
        for queue, taken in held:
            # A request that ended meanwhile has no place in a queue.
            alive = [request for request in taken if not request.is_finished()]
            queue.prepend_requests(reversed(alive) if hasattr(queue, "extendleft") else alive)


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

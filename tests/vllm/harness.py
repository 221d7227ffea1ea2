"""A real vLLM scheduler without an engine: configuration, requests, and a stand-in for the model runner.

`Driver` plays EngineCore: it calls `schedule` and `update_from_output` in the order that the sync loop and
the async loop (two batches in flight) use, and answers every row with a token. Time is a number the test
moves.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from taper.config import ENV_VAR, ServerConfig
from taper.engines.vllm.scheduler import TaperScheduler
from taper.profile import parse_profile

BLOCK = 16
TOKEN = 7
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
PROFILE = {
    "schema": "taper.profile/1",
    "key": {"model": "tiny", "dtype": "float32", "device": "none", "parallel": "tp1-pp1-dp1", "vllm": "0"},
    "coefficients": {"base_s": 0.01, "row_s": 0.001, "context_s": 0.0, "prefill_s": 0.0001},
    "capture_sizes": [],
    "fit": {},
    "created": "2026-01-01T00:00:00",
}
assert parse_profile(PROFILE)
init_none_hash(sha256)  # once: it draws the seed of all block hashes


def vllm_config(
    folder: Path,
    *,
    is_async: bool,
    rows: int = 64,
    step_tokens: int = 256,
    max_model_len: int = 512,
    loras: int = 0,
    policy: str = "fcfs",
    drafts: int = 0,
) -> VllmConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        max_model_len=max_model_len,
    )
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=step_tokens,
            max_model_len=max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=is_async and not drafts,  # vLLM knows no ngram drafts there; the scheduler does
            policy=policy,
            scheduler_cls="taper.engines.vllm.scheduler.TaperScheduler",
        ),
        lora_config=LoRAConfig(max_loras=loras, max_lora_rank=8) if loras else None,
        speculative_config=_drafts(model, drafts) if drafts else None,
    )
    config.scheduler_config.async_scheduling = is_async  # the CPU platform would say no
    return config


def _drafts(model: ModelConfig, tokens: int) -> SpeculativeConfig:
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=tokens,
        prompt_lookup_max=2,
        prompt_lookup_min=1,
        target_model_config=model,
        target_parallel_config=ParallelConfig(),
    )


def build(config: VllmConfig, cls: Any, *, blocks: int = 512) -> Any:
    config.cache_config.num_gpu_blocks = blocks
    group = KVCacheGroupSpec(
        ["layer"], FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    )
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def request(
    name: str,
    *,
    prompt: int | list[int] = 20,
    tokens: int = 50,
    arrival: float = 0.0,
    xargs: dict[str, Any] | None = None,
    lora: int = 0,
    priority: int = 0,
) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[hash_token(name, i) for i in range(prompt)] if isinstance(prompt, int) else prompt,
        sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=xargs),
        pooling_params=None,
        arrival_time=arrival,
        lora_request=LoRARequest(f"lora{lora}", lora, "/none") if lora else None,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def hash_token(name: str, index: int) -> int:
    """A prompt of its own for every name."""
    return (sum(name.encode()) * 31 + index * 7) % 100 + 1


def fork(parent: str, width: int, *, prompt: int = 20, **kwargs: Any) -> list[Request]:
    """Children of an n>1 request, as vLLM's front end names them."""
    shared = [hash_token(parent, index) for index in range(prompt)]
    return [request(f"{index}_{parent}", prompt=list(shared), **kwargs) for index in range(width)]


@dataclass
class Driver:
    """EngineCore's loop over one scheduler."""

    scheduler: Any
    is_async: bool
    step_s: float = 0.02
    now_s: float = 100.0
    drafts: int = 0  # tokens that the model runner proposes for every row; with async scheduling vLLM does
    in_flight: deque[Any] = field(default_factory=deque)
    outputs: list[Any] = field(default_factory=list)  # every SchedulerOutput so far
    tokens: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    _sampling: deque[set[str]] = field(default_factory=deque)  # rows of each batch in flight that answer with a token

    def __post_init__(self) -> None:
        if hasattr(self.scheduler, "taper"):
            self.scheduler.taper.clock = lambda: self.now_s

    @property
    def taper(self) -> Any:
        return self.scheduler.taper

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.scheduler.add_request(one)

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> Any:
        known = {name: one.num_tokens + one.num_output_placeholders for name, one in self.scheduler.requests.items()}
        output = self.scheduler.schedule()
        self.outputs.append(output)
        self.in_flight.append(output)
        # A row samples unless this was a prompt chunk (after a preemption: of all its tokens), and not the last.
        done = {name: self.scheduler.requests[name].num_computed_tokens for name in output.num_scheduled_tokens}
        self._sampling.append({name for name, tokens in done.items() if tokens >= known[name]})
        return output

    def update(self) -> None:
        """The oldest batch comes back, `step_s` later."""
        output, sampling = self.in_flight.popleft(), self._sampling.popleft()
        self.now_s += self.step_s
        names = list(output.num_scheduled_tokens)
        sampled = [[TOKEN] * (1 + self._accepted(name, output)) if name in sampling else [] for name in names]
        result = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
            ),
        )
        for batch in result.values():
            for one in batch.outputs:
                self.tokens[one.request_id] = self.tokens.get(one.request_id, 0) + len(one.new_token_ids)
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)
        if self.drafts and not self.is_async:
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[TOKEN] * self.drafts for _ in names]))

    def step(self) -> dict[str, int]:
        """One turn of the loop; the tokens scheduled in it."""
        output = self.schedule()
        if len(self.in_flight) > (1 if self.is_async else 0):
            self.update()
        return dict(output.num_scheduled_tokens)

    def run(self, steps: int = 10_000) -> int:
        """Steps until nothing is left, at most `steps`; drains what is in flight."""
        done = 0
        while done < steps and self.scheduler.has_requests():
            self.step()
            done += 1
        while self.in_flight:
            self.update()
        return done

    def blocks(self, name: str) -> tuple[list[int], ...]:
        return self.scheduler.kv_cache_manager.get_block_ids(name)

    def _accepted(self, name: str, output: Any) -> int:
        """How many of a row's drafts the model agrees with: any number, and the same in every run."""
        drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
        return (len(name) + 3 * self.tokens.get(name, 0)) % (drafts + 1)


def server_config(**kwargs: Any) -> ServerConfig:
    return ServerConfig(**{"profile": PROFILE, **kwargs})


def make(
    monkeypatch: Any, folder: Path, *, is_async: bool, config: ServerConfig | None = None, **kwargs: Any
) -> Driver:
    """A driver over a TaperScheduler; keyword arguments as for `vllm_config`, and `blocks`."""
    monkeypatch.setenv(ENV_VAR, (config or server_config()).to_json())
    blocks = kwargs.pop("blocks", 512)
    scheduler = build(vllm_config(folder, is_async=is_async, **kwargs), TaperScheduler, blocks=blocks)
    return Driver(scheduler, is_async)


def make_stock(folder: Path, *, is_async: bool, **kwargs: Any) -> Driver:
    blocks = kwargs.pop("blocks", 512)
    cls = AsyncScheduler if is_async else Scheduler
    return Driver(build(vllm_config(folder, is_async=is_async, **kwargs), cls, blocks=blocks), is_async)

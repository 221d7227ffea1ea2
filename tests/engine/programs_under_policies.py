"""Run the same programs beside a serial request under each policy and compare every run's tokens with eager's.

python -m tests.engine.programs_under_policies REPORT

The law is given, not measured: a row costs 0.3 s, so that with an SLO of 1 s the serial request leaves the program
two of its four rows, on any machine. Real steps are far shorter, so nobody runs up a debt.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from taper.client import Branch, Continuation, Join, Lead, by_protocol
from taper.client.types import to_json
from taper.config import ServerConfig
from taper.engines.vllm import compat
from taper.engines.vllm.programs import VllmEngine
from taper.forkjoin.answers import Gathered
from taper.forkjoin.compile import chat_program, explicit_program
from taper.forkjoin.service import Service
from taper.forkjoin.wire import ChatRequest, ProgramRequest
from taper.model import embedded_model
from taper.profile import Profile, ProfileKey
from tests.engine.outputs_under_policies import mismatch

POLICIES = ("eager", "off", "taper")
TOPICS = ("Bread", "Rain", "Tea", "Sea")
OPENING = r"Two sides\.\n<Goal>\n<Outline> 1: [a-z ]{5,12}</Outline>\n<Outline> 2: [a-z ]{5,12}</Outline>\n</Goal>"
LAW = Profile(
    key=ProfileKey(model="any", dtype="float32", device="any", parallel="tp1-pp1-dp1", vllm="any"),
    coefficients={"base_s": 1e-6, "row_s": 0.3, "context_s": 0.0, "prefill_s": 1e-6},
)
SETTINGS = {"tpot_slo_s": 1.0, "knobs": {"horizon_steps": 1024, "correction_rate": 0.0}, "profile": LAW.to_json()}


@dataclass(slots=True)
class Tape:
    """One run on the engine: its tokens, and the two best logits behind each."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class TapedClient:
    """vLLM's engine client, with a tape of every run in the order they began."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.tapes: list[Tape] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        tape = Tape()
        self.tapes.append(tape)
        async with aclosing(self._client.generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                tape.token_ids += output.outputs[0].token_ids
                tape.logprobs += output.outputs[0].logprobs
                yield output


def requests(engine: VllmEngine) -> list[Any]:
    """An explicit program and one whose forks are in the model's output."""
    # Longer than a quantum: a branch that starts only when its sibling has ended is held, never deferred.
    branches = [Branch(suffix=f"\n{topic}:", max_tokens=24, ignore_eos=True) for topic in TOPICS]
    explicit = {
        "prompt": "A short list of things and what they are good for.",
        "lead": Lead(max_tokens=16, ignore_eos=True),
        "branches": branches,
        "join": Join(instruction="\nAll in all,", continuation=Continuation(max_tokens=16, ignore_eos=True)),
        "temperature": 0.0,
    }
    chat = {
        "messages": [{"role": "user", "content": "Compare cats and dogs as pets."}],
        "temperature": 0.0,
        "max_tokens": 90,
        **by_protocol("multiverse", opening_regex=OPENING, branch_max_tokens=24),
    }
    config = ServerConfig()
    return [
        explicit_program(ProgramRequest.model_validate(to_json(explicit)), engine, config, None),
        chat_program(ChatRequest.model_validate(chat), engine, config, None),
    ]


async def serial(client: TapedClient, has_begun: asyncio.Event) -> None:
    delta = RequestOutputKind.DELTA
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True, logprobs=2, output_kind=delta)
    outputs = client.generate(compat.token_prompt([504, 253, 29]), params, request_id="serial")
    async for _ in outputs:
        has_begun.set()


async def under(policy: str, client: TapedClient, engine: VllmEngine) -> tuple[list[Tape], dict[str, Any]]:
    await compat.call_engines(client, "taper_configure", {"policy": policy, **SETTINGS})
    client.tapes = []
    has_begun = asyncio.Event()
    beside = asyncio.create_task(serial(client, has_begun))
    await has_begun.wait()
    service, said = Service(engine, asyncio.get_running_loop().time), []
    for program in requests(engine):
        gathered = Gathered()
        with_logits = replace(program, sampling={**program.sampling, "logprobs": 2})
        async with aclosing(service.events(with_logits)) as events:
            async for event in events:
                gathered.feed(event)
        assert gathered.done is not None
        said.append([gathered.done.status.value, *(branch.text for branch in gathered.branches.values())])
    await beside
    (state,) = await compat.call_engines(client, "taper_snapshot")
    return client.tapes, {
        "said": said,
        "deferred_row_steps": state["window"]["deferred_row_steps"],
        "fallbacks": state["window"]["fallbacks"],
        "lengths": [len(tape.token_ids) for tape in client.tapes],
    }


async def compare() -> dict[str, Any]:
    args = AsyncEngineArgs(
        model=str(embedded_model()),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        block_size=32,
        enforce_eager=True,
        seed=0,
        scheduler_cls="taper.engines.vllm.scheduler.TaperScheduler",
    )
    llm = AsyncLLM.from_engine_args(args)
    try:
        client = TapedClient(llm)
        engine = VllmEngine(client, SimpleNamespace(served_model_name=["m"]))
        tapes: dict[str, list[Tape]] = {}
        report: dict[str, Any] = {}
        for policy in POLICIES:
            tapes[policy], report[policy] = await under(policy, client, engine)
            pairs = zip(tapes["eager"], tapes[policy], strict=True)
            found = [mismatch(index, left, right) for index, (left, right) in enumerate(pairs)]
            report[policy]["mismatches"] = [entry for entry in found if entry]
        return report
    finally:
        llm.shutdown()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asyncio.run(compare()), indent=1))

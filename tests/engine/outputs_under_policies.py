"""Generate the same 24 grouped requests under each policy and compare them with eager; writes a JSON report.

VLLM_ENABLE_V1_MULTIPROCESSING=0 python -m tests.engine.outputs_under_policies REPORT
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from taper.config import ENV_VAR, ServerConfig, resolve_policy
from taper.core.budget import StepBudget
from taper.core.latency import LatencyModel
from taper.core.policies import Guidance
from taper.core.types import Knobs, Plan, Slo, StepView
from taper.model import embedded_model
from taper.profile import Profile, ProfileKey

GROUPS = (6, 1, 4, 5, 1, 7)  # branches per request, 24 in all
TOPICS = ("a lighthouse", "bread", "the moon", "a violin", "rain", "a bridge", "tea")
POLICIES = ("eager", "off", "cap:2", "taper", "random")
MAX_TOKENS = 40

# Room for one extra beside the six protected rows while a serial request runs, whatever the machine: a law so slow,
# and kept so, that no real step tells under the SLO.
CONFIG = ServerConfig(
    slo=Slo(tpot_s=37.0),
    knobs=Knobs(margin=0.0, horizon_steps=1024, correction_rate=0.0, throughput_floor=0),
    profile=Profile(
        key=ProfileKey(model="any", dtype="float32", device="any", parallel="tp1-pp1-dp1", vllm="any"),
        coefficients={"base_s": 1.0, "row_s": 5.0, "context_s": 0.0, "prefill_s": 0.0},
    ).to_json(),
)


@dataclass(slots=True)
class RandomWidths:
    """A width at random for every request and step: the most irregular schedule there is."""

    name: str = "random"
    is_stock: bool = False
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def __call__(self, view: StepView, predict: LatencyModel, knobs: Knobs, guidance: Guidance) -> Plan:
        budget = StepBudget(view, predict, quantum_tokens=float(self.rng.integers(1, 20)))
        return budget.plan(self.rng.integers(1, budget.live + 1))


def generate(llm: LLM, policy: str) -> tuple[list[Any], dict[str, Any]]:
    taper = llm.llm_engine.engine_core.engine_core.scheduler.taper
    taper.controller.replace(policy=RandomWidths() if policy == "random" else resolve_policy(policy))
    before = (taper.window.deferred_row_steps, taper.fallbacks)
    prompts, params = [], []
    for group, width in enumerate(GROUPS):
        for branch in range(width):
            prompts.append(f"Question {group}: write a short story about {TOPICS[branch]}.\nAnswer:")
            params.append(
                SamplingParams(
                    temperature=0.0, max_tokens=MAX_TOKENS, logprobs=2, extra_args={"taper_group": f"g{group}"}
                )
            )
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return outputs, {
        "deferred_row_steps": taper.window.deferred_row_steps - before[0],
        "fallbacks": taper.fallbacks - before[1],
        "lengths": [len(output.token_ids) for output in outputs],
    }


def mismatch(index: int, reference: Any, other: Any) -> dict[str, Any] | None:
    """Where two outputs part, with the gap between the two best logits on either side."""
    pairs = zip(reference.token_ids, other.token_ids, strict=False)
    at = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    if at is None and len(reference.token_ids) == len(other.token_ids):
        return None
    at = min(len(reference.token_ids), len(other.token_ids)) - 1 if at is None else at

    def gap(output: Any) -> float:
        best = sorted((entry.logprob for entry in output.logprobs[at].values()), reverse=True)
        return best[0] - best[1]

    return {"request": index, "token": at, "gap_eager": gap(reference), "gap": gap(other)}


def main() -> None:
    os.environ[ENV_VAR] = CONFIG.to_json()
    llm = LLM(
        model=str(embedded_model()),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        max_num_batched_tokens=128,
        block_size=32,
        enforce_eager=True,
        seed=0,
        scheduler_cls="taper.engines.vllm.scheduler.TaperScheduler",
    )
    outputs, report = {}, {}
    for policy in POLICIES:
        outputs[policy], report[policy] = generate(llm, policy)
        pairs = zip(outputs["eager"], outputs[policy], strict=True)
        found = [mismatch(index, left, right) for index, (left, right) in enumerate(pairs)]
        report[policy]["mismatches"] = [entry for entry in found if entry]
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

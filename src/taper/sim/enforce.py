"""A decision within the engine's own limits: row slots, KV and tokens per step, as vLLM keeps them.

* A branch starts only where a slot and KV for all it has to compute are free. A request that is left without a row
  by that runs one that it has; one that has none waits.
* A row that runs needs one token of KV more. Where there is none, prefixes that no branch uses are evicted, then
  branches are preempted from the end of the running order (deferred rows, then prompts, then admitted and protected
  rows; the youngest first). What they held is computed again. Nothing starts in such a step.
* Decoding rows take their token of the step first, prompts share the rest in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from taper.core.types import Bools, Ints
from taper.sim.batch import Batch
from taper.sim.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to run, as the controller planned it or, where there is nothing to decide, all of it."""

    run: Bools  # (B,)
    protected: Bools  # (B,)
    prefill_limit_tokens: int | None = None
    externality_s: float = 0.0
    is_planned: bool = False  # there was something to decide


@dataclass(slots=True, kw_only=True)
class Rows:
    """What does run. While `is_steady` the same decision means the same rows in the next step."""

    version: int  # of the batch
    run_bytes: bytes  # of the decision's mask
    decode: Bools  # (B,)
    chunks: list[tuple[int, int]]  # (branch, prompt tokens)
    emits: Bools  # (B,) a token at the end of the step
    emitted: Ints  # (B,) the same as a number
    gained: Ints  # (G,) tokens per step
    rows: int
    context_tokens: int  # read by the decoding rows in the coming step
    tokens: int  # emitted per step
    deferred: int  # resident branches that sit the step out
    steps_left: int  # until a decoding branch ends
    preempted: int = 0
    recomputed_tokens: int = 0
    is_new: bool = True  # has not landed yet

    @property
    def is_steady(self) -> bool:
        return not self.chunks and not self.preempted

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.chunks)


def enforce(batch: Batch, machine: Hardware, decision: Decision) -> Rows:
    """Carry a decision out on the batch: starts and preemptions happen here, tokens when the step lands."""
    run = decision.run & batch.resident
    preempted = recomputed = 0
    if int(np.count_nonzero(run)) > machine.kv_tokens - batch.kv_tokens:
        run, preempted, recomputed = _preempt(batch, machine, decision)
    decode = run & (batch.prefill == 0)
    prefilling = (run & ~decode).nonzero()[0].tolist()
    limit = decision.prefill_limit_tokens
    left = machine.max_batched_tokens - int(np.count_nonzero(decode))
    prompts = _Prompts(left if limit is None else min(left, limit))
    for branch in prefilling:
        prompts.take(branch, int(batch.prefill[branch]))
    fresh = (decision.run & ~batch.resident).nonzero()[0].tolist()
    if fresh and not preempted:
        _start(batch, machine, fresh, decode, prompts)
    if not prompts.chunks and not decode.any():
        _start_something(batch, machine, decision.run, decode, prompts)
    emits = decode.copy()
    for branch, tokens in prompts.chunks:
        emits[branch] = tokens == batch.prefill[branch]
    rows = int(np.count_nonzero(decode))
    emitted = emits.astype(np.int64)
    return Rows(
        version=batch.version,
        run_bytes=decision.run.tobytes(),
        decode=decode,
        chunks=prompts.chunks,
        emits=emits,
        emitted=emitted,
        gained=np.bincount(batch.request, emitted, len(batch)).astype(np.int64),
        rows=rows,
        context_tokens=int(batch.context.dot(decode)),
        tokens=int(np.count_nonzero(emits)),
        deferred=batch.resident_rows - rows - len(prompts.chunks),
        steps_left=int((batch.target - batch.progress)[decode].min()) if rows else 0,
        preempted=preempted,
        recomputed_tokens=recomputed,
    )


class _Prompts:
    """The step's room for prompt tokens, handed out first come first served."""

    def __init__(self, left: int) -> None:
        self.left = max(left, 0)
        self.chunks: list[tuple[int, int]] = []

    def take(self, branch: int, tokens: int) -> None:
        if self.left:
            self.chunks.append((branch, min(tokens, self.left)))
            self.left -= min(tokens, self.left)


def _start(batch: Batch, machine: Hardware, fresh: list[int], decode: Bools, prompts: _Prompts) -> None:
    """Start the new branches that find a slot, KV and prompt tokens; a started request left without a row by the
    others runs one that it has."""
    refused = []
    growing = int(np.count_nonzero(decode)) + len(prompts.chunks)
    for branch in fresh:
        needed = growing + batch.start_kv_tokens(branch) + 1
        if prompts.left and batch.resident_rows < machine.max_rows and _make_room(batch, machine, needed):
            batch.start(branch)
            prompts.take(branch, int(batch.prefill[branch]))
            growing += 1
        else:
            refused.append(branch)
    if not refused:
        return
    has_row = np.bincount(batch.request[decode], minlength=len(batch)) > 0
    has_row[[batch.request[branch] for branch, _ in prompts.chunks]] = True
    for group in np.unique(batch.request[refused]).tolist():
        if not has_row[group]:
            own = np.flatnonzero((batch.request == group) & batch.resident & (batch.prefill == 0))
            decode[own[np.argsort(batch.progress[own], kind="stable")[:1]]] = True


def _make_room(batch: Batch, machine: Hardware, needed: int) -> bool:
    """Whether `needed` tokens of KV are free, once prefixes that no branch uses are gone."""
    if needed <= machine.kv_tokens - batch.kv_tokens:
        return True
    for group in reversed(batch.idle_prefixes()):
        batch.evict_prefix(group)
        if needed <= machine.kv_tokens - batch.kv_tokens:
            return True
    return False


def _preempt(batch: Batch, machine: Hardware, decision: Decision) -> tuple[Bools, int, int]:
    """(rows that go on, branches preempted, tokens they will compute again)."""
    run = decision.run & batch.resident
    preempted = recomputed = 0
    rank = np.where(batch.prefill > 0, 2, np.where(decision.protected, 0, 1))
    rank = np.where(run, rank, 3)  # deferred
    order = [b for b in np.lexsort((np.arange(len(rank)), rank)).tolist() if batch.resident[b]]
    while not _make_room(batch, machine, int(np.count_nonzero(run))) and len(order) > 1:
        victim = order.pop()
        batch.preempt(victim)
        run[victim] = False
        preempted += 1
        recomputed += int(batch.prefill[victim])
    return run, preempted, recomputed


def _start_something(batch: Batch, machine: Hardware, wanted: Bools, decode: Bools, prompts: _Prompts) -> None:
    """Nothing can go on: the first branch that is wanted and fits runs. Raises `RuntimeError` for none."""
    for branch in np.flatnonzero(wanted).tolist():
        if batch.resident[branch] and not batch.prefill[branch]:
            decode[branch] = True
            return
        if batch.resident[branch] or _make_room(batch, machine, batch.start_kv_tokens(branch) + 1):
            if not batch.resident[branch]:
                batch.start(branch)
            prompts.left = max(prompts.left, 1)
            prompts.take(branch, int(batch.prefill[branch]))
            return
    raise RuntimeError("the plan runs nothing: an engine would spin")

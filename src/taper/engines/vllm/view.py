"""From the group table and one vLLM scheduler to the controller's `StepView`.

A view holds the branches that *can* be a row of the coming step. Left out, and left alone, are branches that
vLLM would skip anyway (all tokens in flight, waiting for a grammar or for remote KV, out of turn in the
pipeline), and the requests in vLLM's queue for which there is no slot or no KV: they cost this step nothing, and
the queue is as in stock vLLM. Left out and held are unstarted branches of a request that already runs, or of one that
queues, where a slot or KV for them is short: the policy must be free to name any branch it sees as the one that
keeps its request going.

With async scheduling the columns lag by the tokens in flight.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np

from taper.core.types import Bools, Ints, StepView
from taper.engines.vllm import compat
from taper.engines.vllm.groups import Columns, GroupTable
from taper.engines.vllm.seam import SchedulerSeam

# Share of the row slots that extras leave to requests that have yet to start: a deferred branch keeps its
# slot, so without it deferral would close the door to newcomers.
RESERVED_SLOTS = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A view, and where its branches are in the table's columns."""

    view: StepView
    columns: Columns
    branch: Ints  # (B,) index into `columns`
    withheld: Ints  # indices into `columns` of branches that must not start in this step
    extras: set[Any]  # the requests of all extra branches; those out of sight must not start either


def build(
    table: GroupTable,
    seam: SchedulerSeam,
    *,
    now_s: float,
    ran_last: Container[str],
    tokens_per_row: float,
    may_start: bool,
) -> Frame:
    """The coming step as the controller sees it; `table` must not be empty.

    `may_start` False withholds every unstarted branch of a request that has one started.
    """
    columns = table.columns
    requests, of = columns.requests, columns.request
    context = compat.computed_tokens(requests)
    progress = np.fromiter(map(len, columns.output_tokens), np.int64, len(requests))
    resident = context > 0
    remaining = columns.prompt_tokens + progress - context
    unused = seam.kv_free_tokens
    kv_free = unused - int(np.count_nonzero(resident)) * seam.block_tokens
    prefill = np.where(remaining > 1, remaining, 0)
    can_run, in_flight = _can_run(seam, columns, context, resident, remaining)
    withheld = np.zeros(0, dtype=np.int64)
    if not resident.all():
        longest = np.maximum(np.maximum.reduceat(context, columns.first), columns.computed_tokens)
        lent = longest // seam.block_tokens * seam.block_tokens
        spared = np.minimum(columns.spared_tokens, lent[of])
        prefill = np.where(resident, prefill, np.maximum(remaining - spared, 1))
        withheld, queued = _without_room(
            columns,
            starts=np.flatnonzero(can_run & ~resident),
            has_row=_groups(columns, resident & can_run),
            in_flight=_groups(columns, in_flight),
            # A start takes its own blocks and one to grow; without a started sibling also the shared prefix.
            kv_tokens=(prefill // seam.block_tokens + 2) * seam.block_tokens,
            opening_kv_tokens=(remaining // seam.block_tokens + 2) * seam.block_tokens,
            queue_kv_tokens=unused,
            slots=seam.max_rows - len(seam.running),
            reserve=int(seam.max_rows * RESERVED_SLOTS),
            kv_free_tokens=kv_free,
            may_start=may_start,
        )
        can_run[withheld] = can_run[queued] = False
    branch = np.flatnonzero(can_run)
    shown: slice | Ints = slice(None)
    request = of
    if len(branch) < len(of):
        shown, request = np.unique(of[branch], return_inverse=True)
    tokens = columns.ended_tokens + np.add.reduceat(progress, columns.first)
    return Frame(
        columns=columns,
        branch=branch,
        withheld=withheld,
        extras=table.extras,
        view=StepView(
            now_s=now_s,
            arrival_s=columns.arrival_s[shown],
            first_token_s=columns.first_token_s[shown],
            tokens=tokens[shown],
            tpot_slo_s=columns.tpot_slo_s[shown],
            ttft_slo_s=columns.ttft_slo_s[shown],
            priority=columns.priority[shown],
            request=request,
            context_tokens=context[branch],
            progress_tokens=progress[branch],
            prefill_tokens=prefill[branch],
            resident=resident[branch],
            ran_last=np.fromiter(map(ran_last.__contains__, columns.ids), np.bool_, len(requests))[branch],
            pinned=_pinned(seam, columns, resident, progress, can_run)[branch],
            kv_free_tokens=max(kv_free, 0),
            max_prefill_tokens=seam.max_step_tokens,
            tokens_per_row=tokens_per_row,
        ),
    )


def _can_run(
    seam: SchedulerSeam, columns: Columns, context: Ints, resident: Bools, remaining: Ints
) -> tuple[Bools, Bools]:
    """(branches that vLLM itself would consider in the coming step, those it would not as they are in flight)."""
    requests = columns.requests
    can_run = context < seam.last_position
    if seam.is_async:
        ahead = compat.placeholders(requests)
        can_run &= (ahead == 0) | (context + 2 - ahead < columns.end_tokens)
        remaining = remaining + ahead
    in_flight = resident & (remaining <= 0)
    if seam.is_staggered:
        in_flight |= compat.eligible_steps(requests) > seam.next_step
    can_run &= ~in_flight
    if len(seam.running) < len(requests):
        can_run &= ~compat.blocked(requests)
    return can_run, in_flight


def _groups(columns: Columns, branches: Bools) -> Bools:
    """Which groups have a branch among `branches`."""
    return np.bincount(columns.request[branches], minlength=len(columns.groups)) > 0


def _without_room(
    columns: Columns,
    *,
    starts: Ints,
    has_row: Bools,
    in_flight: Bools,
    kv_tokens: Ints,
    opening_kv_tokens: Ints,
    queue_kv_tokens: int,
    slots: int,
    reserve: int,
    kv_free_tokens: int,
    may_start: bool,
) -> tuple[Ints, Ints]:
    """Which of `starts`, the branches that could start, there is no slot or no KV for: (extra ones, openers).

    The first start of a request without a row opens it. All others are extra and share what every opener leaves, so
    none goes before a request that queues. Both in order of arrival. A request whose rows are all in flight (pipeline
    parallelism) has no turn in this step, and none of its branches starts.
    """
    owner = columns.request[starts]
    out_of_turn = (in_flight & ~has_row)[owner]
    is_first = ~has_row[owner] & np.append(True, owner[1:] != owner[:-1])[: len(starts)]
    extra = starts[~is_first & ~out_of_turn]
    first = starts[is_first & ~out_of_turn]
    opening_kv = opening_kv_tokens[first]
    # As vLLM has it, which keeps nothing back for rows that grow.
    opens = (np.arange(1, len(first) + 1) <= slots) & (np.cumsum(opening_kv) <= queue_kv_tokens)
    room = slots - len(first) - reserve
    kv = kv_free_tokens - int(opening_kv.sum())
    fits = (np.arange(1, len(extra) + 1) <= room) & (np.cumsum(kv_tokens[extra]) <= kv)
    if not may_start:
        fits &= ~has_row[columns.request[extra]]
    return np.concatenate([starts[out_of_turn], extra[~fits]]), first[~opens]


def _pinned(seam: SchedulerSeam, columns: Columns, resident: Bools, progress: Ints, can_run: Bools) -> Bools:
    """One running row per LoRA adapter, the least advanced.

    With none of an adapter's rows scheduled vLLM would let a foreign adapter in, and then find more adapters
    running than it has room for.
    """
    pinned = np.zeros(len(columns.requests), dtype=np.bool_)
    if seam.adapters:
        rows = np.flatnonzero(can_run & resident & (columns.adapter > 0))
        rows = rows[np.argsort(progress[rows], kind="stable")]
        _, least = np.unique(columns.adapter[rows], return_index=True)
        pinned[rows[least]] = True
    return pinned

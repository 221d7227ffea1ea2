"""The group table: which live branches belong to one logical request, and what the request has done so far.

A branch's group is, in this order: its `taper_group` tag; its n>1 parent; itself. vLLM names n>1 children
`{index}_{parent}`; a client may choose an id of that form too, so children are told by what only copies of
one request share: the parent's id *and* the exact arrival time. A serial request named "3_foo" is thus a
group of one.

A branch is *started* once it has been scheduled, and *extra* while it is unstarted and not the one that opens its
request. Only so many unstarted branches are in sight as there are row slots: a step cannot start more, so a queue of
ten thousand costs a step no more than a queue of a few hundred.

A group lives as long as it has a live branch. A tagged request that pauses between two stages (all its
branches over, the next not yet sent) starts anew with the next stage: its clock must not run while the
client thinks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np

from taper.claims import Claims
from taper.core.types import FinishedRequest, Floats, Ints, Slo
from taper.engines.vllm import compat


@dataclass(slots=True, eq=False)
class Branch:
    """One vLLM request."""

    request: Any
    group: Group
    output_tokens: list[int]  # vLLM's own list
    spared_tokens: int = 0  # prompt tokens whose KV a sibling can lend, at most
    settled_tokens: int = 0  # output tokens already in the group's accounts
    stage_tokens: int = 0  # output tokens since the parallel stage began
    number: int = 0  # counts the branches of its group


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The part of `Columns` that belongs to one group. With hundreds of branches waiting most groups keep theirs."""

    group: Group
    unstarted: int  # branches in sight that have not started
    branches: list[Branch]
    requests: list[Any]
    output_tokens: list[list[int]]
    ids: list[str]
    tokens: Ints  # (3, branches): of the prompt, at the certain end, spared by a sibling's KV

    @classmethod
    def of(cls, group: Group, unstarted: int) -> Block:
        """The started branches and the oldest `unstarted` others, in order of arrival."""
        waiting = islice(group.unstarted.values(), unstarted)
        branches = sorted(chain(group.started.values(), waiting), key=lambda branch: branch.number)
        requests = [branch.request for branch in branches]
        tokens = [
            [request.num_prompt_tokens for request in requests],
            [compat.end_tokens(request) for request in requests],
            [branch.spared_tokens for branch in branches],
        ]
        return cls(
            group=group,
            unstarted=unstarted,
            branches=branches,
            requests=requests,
            output_tokens=[branch.output_tokens for branch in branches],
            ids=[request.request_id for request in requests],
            tokens=np.array(tokens, dtype=np.int64),
        )


@dataclass(slots=True, eq=False)
class Group:
    """One logical request: its live branches and its accounts."""

    key: tuple[Hashable, ...]
    arrival_s: float
    claims: Claims
    extra_args: dict[str, Any] | None  # of the branch that opened the group; they bind all of it
    branches: dict[str, Branch] = field(default_factory=dict)  # live ones: those started and those not
    started: dict[str, Branch] = field(default_factory=dict)
    unstarted: dict[str, Branch] = field(default_factory=dict)
    first_token_s: float = math.nan
    ended_tokens: int = 0  # output tokens of ended branches
    ended_branches: int = 0
    number: int = 0  # counts the groups of this engine; names one where its key must not be shown
    is_branching: bool = False  # has had several live branches
    computed_tokens: int = 0  # longest KV an ended branch left in the prefix cache
    serial_tokens: int = 0
    critical_path_tokens: int = 0
    longest_ended_tokens: int = 0  # of this parallel stage
    externality_before_s: float = 0.0  # the table's externality clock at the first token
    is_whole: bool = True  # no branch was aborted
    _block: Block | None = None

    def block(self, unstarted: int) -> Block:
        """What does not change from step to step of the branches in sight; rebuilt after `stirred`."""
        if self._block is None or self._block.unstarted != unstarted:
            self._block = Block.of(self, unstarted)
        return self._block

    def stirred(self) -> None:
        """A branch came, went, or became another."""
        self._block = None

    def settle(self) -> None:
        """Book the tokens since the last call under the width the group has had meanwhile."""
        is_serial = len(self.branches) == 1
        for branch in self.started.values():
            tokens = len(branch.output_tokens) - branch.settled_tokens
            branch.settled_tokens += tokens
            if is_serial:
                self.serial_tokens += tokens
                self.critical_path_tokens += tokens
            else:
                branch.stage_tokens += tokens

    def close_stage(self) -> None:
        """A parallel stage ends when one branch is left; that branch goes on as a serial stage."""
        (last,) = self.branches.values()
        self.critical_path_tokens += max(self.longest_ended_tokens, last.stage_tokens)
        self.longest_ended_tokens = last.stage_tokens = 0


class GroupTable:
    """Live groups and branches, kept up to date by events: a request added, an update, a request over."""

    def __init__(self, *, block_tokens: int, hash_block_tokens: int, caches_prefixes: bool, max_rows: int) -> None:
        self.groups: dict[Hashable, Group] = {}
        self.branches: dict[str, Branch] = {}
        self.extras: set[Any] = set()  # the requests of all extra branches, in sight or not
        self.parallel_groups = 0  # groups with several live branches
        self.externality_s = 0.0  # sum of E over all steps so far
        self.opened = 0  # groups so far
        self.forks = 0  # times a group went from one live branch to two
        self.joins = 0  # ... and back
        self._block_tokens = block_tokens
        self._hash_block_tokens = hash_block_tokens
        self._caches_prefixes = caches_prefixes
        self._max_rows = max_rows
        self._running: dict[Hashable, Group] = {}  # has a started branch
        self._queued: OrderedDict[Hashable, Group] = OrderedDict()  # has none
        self._silent: dict[Hashable, Group] = {}  # no token yet
        self._columns: Columns | None = None

    def add(self, request: Any, claims: Claims, now_s: float) -> None:
        """A request entered the engine."""
        key = group_key(request, claims)
        group = self.groups.get(key)
        if group is None:
            self.opened += 1
            group = Group(
                key=key,
                arrival_s=now_s,
                claims=claims,
                extra_args=compat.extra_args(request),
                number=self.opened,
            )
            self.groups[key] = self._silent[key] = self._queued[key] = group
        if len(group.branches) == 1:
            group.settle()  # what it did as a serial request
        branch = Branch(
            request=request,
            group=group,
            output_tokens=compat.output_tokens(request),
            number=group.ended_branches + len(group.branches),
        )
        self._note_shared_prefix(group, branch)
        if group.branches:
            self.extras.add(request)
        for live in (self.branches, group.branches, group.unstarted):
            live[request.request_id] = branch
        if len(group.branches) == 2:
            self.parallel_groups += 1
            self.forks += 1
            group.is_branching = True
        self._stir(group)

    def end(self, request_id: str, now_s: float, *, is_whole: bool) -> FinishedRequest | None:
        """A request left the engine; the finished logical request if this was its last branch.

        None while siblings live, where a branch did not end well (`is_whole` False), and without any token.
        """
        branch = self.branches.pop(request_id, None)
        if branch is None:
            return None
        group = branch.group
        group.settle()
        del group.branches[request_id]
        self._leave(group, branch)
        group.is_whole &= is_whole
        group.ended_tokens += len(branch.output_tokens)
        group.ended_branches += 1
        group.computed_tokens = max(group.computed_tokens, branch.request.num_computed_tokens)
        self._stir(group)
        if not group.branches:
            return self._close(group, now_s)
        group.longest_ended_tokens = max(group.longest_ended_tokens, branch.stage_tokens)
        if len(group.branches) == 1:
            self.parallel_groups -= 1
            self.joins += 1
            group.close_stage()
        return None

    def note_starts(self, scheduled: Iterable[str]) -> None:
        """These requests have just been scheduled for the first time."""
        for name in scheduled:
            branch = self.branches.get(name)
            if branch is None or name in branch.group.started:
                continue
            group = branch.group
            del group.unstarted[name]
            self.extras.discard(branch.request)
            if not group.started:
                self._running[group.key] = self._queued.pop(group.key)
                # All others are extra now, also the one that was to open the request.
                self.extras.update(other.request for other in islice(group.unstarted.values(), 1))
            group.started[name] = branch
            self._stir(group)

    def note_first_tokens(self, updated: Iterable[str], now_s: float) -> None:
        """Start the clock of every group that has just received its first token.

        `updated` names the requests that an update brought something for: a long queue may hold far more.
        """
        if not self._silent:
            return
        for name in updated:
            branch = self.branches.get(name)
            if branch is not None and branch.output_tokens and math.isnan(branch.group.first_token_s):
                self._start(branch.group, now_s)

    def changed(self, request_id: str) -> None:
        """A known request has another prompt: the next chunk of a streaming-input session."""
        branch = self.branches.get(request_id)
        if branch is not None:
            self._stir(branch.group)

    def set_claims(self, group: Group, claims: Claims) -> None:
        group.claims = claims
        self._columns = None

    def clear(self) -> None:
        self.groups.clear()
        self.branches.clear()
        self._silent.clear()
        self._running.clear()
        self._queued.clear()
        self.extras.clear()
        self.parallel_groups = 0
        self._columns = None

    @property
    def in_service(self) -> int:
        """Groups with a started branch; the others queue."""
        return len(self._running)

    @property
    def columns(self) -> Columns:
        """What does not change from step to step; rebuilt when a branch comes, starts or goes."""
        if self._columns is None:
            self._columns = Columns(list(self.in_sight()))
        return self._columns

    def in_sight(self) -> Iterator[Block]:
        """Started branches, and of the others as many as row slots: as many extra ones, as many that open a request.

        A request out of sight queues as in stock vLLM.
        """
        room = self._max_rows
        for group in chain(self._running.values(), islice(self._queued.values(), self._max_rows)):
            opening = 0 if group.started else 1
            extra = min(len(group.unstarted) - opening, room)
            room -= extra
            yield group.block(opening + extra)

    def _leave(self, group: Group, branch: Branch) -> None:
        """A branch is over; where it was the last one started, the oldest of the others opens the request again."""
        name = branch.request.request_id
        if group.started.pop(name, None) is None:
            del group.unstarted[name]
            self.extras.discard(branch.request)
        if not group.started:
            self._running.pop(group.key, None)
            if group.key not in self._queued:
                self._queued[group.key] = group
                self._queued.move_to_end(group.key, last=False)  # it came before those that never ran
            self.extras.difference_update(other.request for other in islice(group.unstarted.values(), 1))

    def _stir(self, group: Group) -> None:
        group.stirred()
        self._columns = None

    def _start(self, group: Group, now_s: float) -> None:
        del self._silent[group.key]
        group.first_token_s = now_s
        group.externality_before_s = self.externality_s
        self._columns = None

    def _close(self, group: Group, now_s: float) -> FinishedRequest | None:
        self._silent.pop(group.key, None)
        del self.groups[group.key], self._queued[group.key]
        if not group.is_whole or not group.ended_tokens:
            return None
        return FinishedRequest(
            tokens=group.ended_tokens,
            serial_tokens=group.serial_tokens,
            critical_path_tokens=group.critical_path_tokens,
            residence_s=now_s - group.first_token_s,
            externality_s=self.externality_s - group.externality_before_s,
            tpot_slo_s=group.claims.slo.tpot_s,
        )

    def _note_shared_prefix(self, group: Group, branch: Branch) -> None:
        """How much of the prompt siblings can lend each other: whole blocks, and never the last token."""
        request = branch.request
        if not self._caches_prefixes or request.skip_reading_prefix_cache:
            return
        for sibling in group.branches.values():
            shared = compat.common_prefix_blocks(request, sibling.request) * self._hash_block_tokens
            for one in (branch, sibling):
                most = (one.request.num_prompt_tokens - 1) // self._block_tokens * self._block_tokens
                one.spared_tokens = max(one.spared_tokens, min(shared, most))
            break


def group_key(request: Any, claims: Claims) -> tuple[Hashable, ...]:
    if claims.group is not None:
        return ("tag", claims.group)
    parent = compat.parent_id(request)
    return ("id", request.request_id) if parent is None else ("n", parent, request.arrival_time)


class Columns:
    """Constants of the groups and branches in sight as numpy columns; branches ordered by group."""

    def __init__(self, blocks: list[Block]) -> None:
        self.groups = groups = [block.group for block in blocks]
        self.requests = list(chain.from_iterable(block.requests for block in blocks))
        self.output_tokens = list(chain.from_iterable(block.output_tokens for block in blocks))
        self.ids = list(chain.from_iterable(block.ids for block in blocks))
        self.live = _ints([len(block.branches) for block in blocks])
        self.request: Ints = np.repeat(np.arange(len(groups)), self.live)
        self.first: Ints = np.cumsum(self.live) - self.live
        self._blocks = blocks
        none = np.zeros((3, 0), dtype=np.int64)
        tokens = np.concatenate([none, *(block.tokens for block in blocks)], axis=1)
        self.prompt_tokens, self.end_tokens, self.spared_tokens = tokens
        self.arrival_s = np.array([group.arrival_s for group in groups])
        self.first_token_s = np.array([group.first_token_s for group in groups])
        self.ended_tokens = _ints([group.ended_tokens for group in groups])
        self.computed_tokens = _ints([group.computed_tokens for group in groups])
        slos: list[Slo] = [group.claims.slo for group in groups]
        self.tpot_slo_s: Floats = np.array([slo.tpot_s for slo in slos])
        self.ttft_slo_s: Floats = np.array([slo.ttft_s for slo in slos])
        self.priority: Floats = np.array([group.claims.priority for group in groups])

    @cached_property
    def position(self) -> dict[str, int]:
        """Request id -> index of its branch."""
        return {name: index for index, name in enumerate(self.ids)}

    @cached_property
    def numbers(self) -> tuple[Ints, Ints]:
        """(running number of each group, of each branch inside its group), for traces."""
        return _ints([group.number for group in self.groups]), _ints(
            [branch.number for block in self._blocks for branch in block.branches]
        )

    @cached_property
    def adapter(self) -> Ints:
        """LoRA adapter of each branch, 0 without."""
        return _ints([compat.adapter(request) for request in self.requests])


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)

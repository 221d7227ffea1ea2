"""Requests on their way into an engine: to come, waiting for a slot, or for KV."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from taper.core.types import ConfigError
from taper.sim.hardware import Hardware
from taper.workload import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request, and what the engine knows of it already."""

    spec: Request
    held_tokens: int
    continues: bool


class Queue:
    """First come, first served, at most `slots` in service; one that continues a request takes none and goes first."""

    def __init__(self, machine: Hardware, *, slots: int) -> None:
        self.slots_taken = 0
        self._slots = slots
        self._machine = machine
        self._submitted: list[Submitted] = []
        self._arrived = 0
        self._waiting: deque[Submitted] = deque()
        self._leaving_s: deque[float] = deque()  # when places of ended requests can be taken again

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def coming(self) -> int:
        """Requests yet to arrive."""
        return len(self._submitted) - self._arrived

    @property
    def next_arrival_s(self) -> float:
        return self._submitted[self._arrived].spec.arrival_s if self.coming else math.inf

    @property
    def next_event_s(self) -> float:
        """When somebody arrives, or a place comes free that somebody waits for."""
        free_s = self._leaving_s[0] if self._waiting and self._leaving_s else math.inf
        return min(self.next_arrival_s, free_s)

    @property
    def first(self) -> Submitted | None:
        """The one that enters next, if a slot is free for it."""
        if not self._waiting or not (self._waiting[0].continues or self.slots_taken < self._slots):
            return None
        return self._waiting[0]

    def submit(self, request: Request, *, held_tokens: int, continues: bool) -> None:
        """Raises `ConfigError` for a request that can never fit."""
        deepest = request.prompt_tokens
        for stage in request.stages:
            if deepest + max(stage) > self._machine.kv_tokens:
                raise ConfigError(
                    f"request {request.index} needs {deepest + max(stage)} tokens of KV for one branch, "
                    f"{self._machine.name} has {self._machine.kv_tokens}"
                )
            deepest += sum(stage)
        self._submitted.append(Submitted(spec=request, held_tokens=held_tokens, continues=continues))

    def arrive(self, now_s: float) -> bool:
        """Let in who has come by now, and free the places that can be taken again; whether anybody has come."""
        while self._leaving_s and self._leaving_s[0] <= now_s:
            self._leaving_s.popleft()
            self.slots_taken -= 1
        before = self._arrived
        while self.next_arrival_s <= now_s:
            self._line_up(self._submitted[self._arrived])
            self._arrived += 1
        return self._arrived > before

    def enter(self) -> None:
        """The first one goes into service."""
        self.slots_taken += not self._waiting.popleft().continues

    def leave(self, now_s: float) -> None:
        """A request has ended; the next one needs the machine's turnaround to take its place."""
        if self._machine.turnaround_s:
            self._leaving_s.append(now_s + self._machine.turnaround_s)
        else:
            self.slots_taken -= 1

    def withdraw(self, stays: Callable[[Request], bool] | None) -> int:
        """Forget those that wait, all of them or those that do not stay; returns how many."""
        kept = [one for one in self._waiting if stays is not None and stays(one.spec)]
        gone = len(self._waiting) - len(kept)
        self._waiting = deque(kept)
        return gone

    def _line_up(self, request: Submitted) -> None:
        at = len(self._waiting)
        while request.continues and at and not self._waiting[at - 1].continues:
            at -= 1
        self._waiting.insert(at, request)

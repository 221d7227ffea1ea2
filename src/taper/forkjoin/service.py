"""All programs of one server. Each has a task of its own: a client that leaves cannot cut its clean-up short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from taper.forkjoin.engine import Engine
from taper.forkjoin.events import Done, ProgramEvent, Usage
from taper.forkjoin.run import Program, Run

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Totals:
    """Counts since the server started; programs by how they ended."""

    started: int = 0
    complete: int = 0
    partial: int = 0
    failed: int = 0
    left: int = 0  # the client went away, or the server failed
    forked_branches: int = 0
    generated_tokens: int = 0
    join_tokens: int = 0
    fork_cached_tokens: int = 0
    fork_recomputed_tokens: int = 0
    join_cached_tokens: int = 0
    join_recomputed_tokens: int = 0
    malformed_tags: int = 0
    unterminated_branches: int = 0

    def add(self, usage: Usage) -> None:
        self.forked_branches += len(usage.forks)
        self.generated_tokens += usage.generated_tokens
        self.join_tokens += usage.join_tokens
        self.fork_cached_tokens += sum(prefill.cached_tokens for prefill in usage.forks)
        self.fork_recomputed_tokens += sum(prefill.recomputed_tokens for prefill in usage.forks)
        self.join_cached_tokens += sum(prefill.cached_tokens for prefill in usage.joins)
        self.join_recomputed_tokens += sum(prefill.recomputed_tokens for prefill in usage.joins)
        self.malformed_tags += usage.malformed_tags
        self.unterminated_branches += usage.unterminated_branches


class Service:
    """Starts programs and counts them. `clock`: monotonic seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.engine = engine
        self.totals = Totals()
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> int:
        """Programs that run, or still clean up."""
        return len(self._tasks)

    async def events(self, program: Program) -> AsyncGenerator[ProgramEvent, None]:
        """Run a program. Closing the generator, or cancelling who waits for it, ends the program at once."""
        inbox: asyncio.Queue[ProgramEvent | Exception | None] = asyncio.Queue()
        task = asyncio.get_running_loop().create_task(self._drive(program, inbox))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (event := await inbox.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            task.cancel()

    def next_replica(self) -> int | None:
        """The engine replica of the next program: all branches of a program share one, for its prefix cache."""
        replicas = self.engine.replicas
        return self.totals.started % replicas if replicas > 1 else None

    async def _drive(self, program: Program, inbox: asyncio.Queue[ProgramEvent | Exception | None]) -> None:
        run = Run(program, self.engine, self._clock)
        self.totals.started += 1
        done: Done | None = None
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    if isinstance(event, Done):
                        done = event
                    inbox.put_nowait(event)
        except Exception as error:
            log.exception("program %s failed", program.id)
            inbox.put_nowait(error)
        finally:
            self._count(done, run.usage)
            inbox.put_nowait(None)

    def _count(self, done: Done | None, usage: Usage) -> None:
        self.totals.add(usage)
        name = done.status.value if done else "left"
        setattr(self.totals, name, getattr(self.totals, name) + 1)

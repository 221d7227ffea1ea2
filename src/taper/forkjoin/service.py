"""All programs of one server. Each has a task of its own: a client that leaves cannot cut its clean-up short."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from taper.forkjoin.engine import Engine
from taper.forkjoin.events import Done, ProgramEvent, Usage
from taper.forkjoin.program import Program
from taper.forkjoin.run import Run

log = logging.getLogger(__name__)


Observer = Callable[[Mapping[str, int]], None]

# What is counted of every program once it is over, and what it means.
COUNTS: Mapping[str, str] = {
    "complete": "Programs that ended well.",
    "partial": "Programs in which a branch failed and the rest went on.",
    "failed": "Programs whose root failed.",
    "left": "Programs that ended because their client went away.",
    "forked_branches": "Branches forked.",
    "generated_tokens": "Tokens generated, over all branches.",
    "join_tokens": "Tokens of children handed to their parents at joins.",
    "fork_cached_tokens": "Prompt tokens of forked branches found in the prefix cache.",
    "fork_recomputed_tokens": "Prompt tokens of forked branches that had to be computed.",
    "join_cached_tokens": "Prompt tokens of joins found in the prefix cache.",
    "join_recomputed_tokens": "Prompt tokens of joins that had to be computed.",
    "malformed_tags": "Tags that did not fit their protocol's grammar and were left as text.",
    "unterminated_branches": "Runs that ended at a length limit.",
}


def counts(done: Done | None, usage: Usage) -> dict[str, int]:
    """One program's share of `COUNTS`; what is 0 is left out."""
    found = {
        done.status.value if done else "left": 1,
        "forked_branches": len(usage.forks),
        "generated_tokens": usage.generated_tokens,
        "join_tokens": usage.join_tokens,
        "fork_cached_tokens": sum(prefill.cached_tokens for prefill in usage.forks),
        "fork_recomputed_tokens": sum(prefill.recomputed_tokens for prefill in usage.forks),
        "join_cached_tokens": sum(prefill.cached_tokens for prefill in usage.joins),
        "join_recomputed_tokens": sum(prefill.recomputed_tokens for prefill in usage.joins),
        "malformed_tags": usage.malformed_tags,
        "unterminated_branches": usage.unterminated_branches,
    }
    return {name: count for name, count in found.items() if count}


class Service:
    """Starts programs and counts them. `clock`: monotonic seconds; `observe`: told of every program's counts."""

    def __init__(self, engine: Engine, clock: Callable[[], float], observe: Observer | None = None) -> None:
        self.engine = engine
        self.started = 0
        self.totals = dict.fromkeys(COUNTS, 0)
        self._clock = clock
        self._observe = observe
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = itertools.count()

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
        return next(self._turns) % replicas if replicas > 1 else None

    async def _drive(self, program: Program, inbox: asyncio.Queue[ProgramEvent | Exception | None]) -> None:
        run = Run(program, self.engine, self._clock)
        self.started += 1
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
        found = counts(done, usage)
        for name, count in found.items():
            self.totals[name] += count
        if self._observe is not None:
            self._observe(found)

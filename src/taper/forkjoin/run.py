"""Runs one program: the state machine decides, the engine generates, events come out in order."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

from taper.forkjoin.context import Context, missing_end, tokens_before
from taper.forkjoin.engine import Chunk, Engine
from taper.forkjoin.events import Done, Ended, Joined, ProgramEvent, Started, Status, Text, Usage
from taper.forkjoin.machine import ROOT, Action, Begin, BudgetExceeded, Machine, Over
from taper.forkjoin.plan import BranchSpec, End, Ending, Fork, Join
from taper.forkjoin.program import ContextFull, LiveBranch, Program, Silence

log = logging.getLogger(__name__)

TEXT_END_CHARS = 64  # of a branch's text are kept: closings are shorter

Events = Iterator[ProgramEvent]


class Run:
    """One program on one engine. Iterate `events` inside `aclosing`: leaving it aborts every branch."""

    def __init__(self, program: Program, engine: Engine, clock: Callable[[], float]) -> None:
        self._program = program
        self._engine = engine
        self._clock = clock
        self._machine = Machine(program.budget, on_error=program.on_error)
        self._branches: dict[str, LiveBranch] = {}
        self._specs: list[tuple[str, BranchSpec]] = []  # of the children about to begin
        self._inbox: asyncio.Queue[tuple[str, int, Chunk | Exception]] = asyncio.Queue()
        self._leftover: list[asyncio.Task[None]] = []  # cancelled, not yet awaited
        self.usage = Usage()

    async def events(self) -> AsyncGenerator[ProgramEvent, None]:
        try:
            self._specs = [("", self._program.root)]
            for event in self._apply(self._machine.start(self._clock())):
                yield event
            while not self._machine.is_over:
                for event in await self._next():
                    yield event
            yield self._done()
        finally:
            await self._stop()

    async def _next(self) -> list[ProgramEvent]:
        deadline_s, now_s = self._machine.next_deadline_s, self._clock()
        if now_s >= deadline_s:
            return list(self._apply(self._machine.tick(now_s)))
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets an item.
            async with asyncio.timeout(None if math.isinf(deadline_s) else deadline_s - now_s):
                name, run, item = await self._inbox.get()
        except TimeoutError:
            return []
        branch = self._branches[name]
        if run != branch.run or branch.task is None:
            return []
        if isinstance(item, Exception):
            return list(self._end(branch, Ending.ERROR, f"{type(item).__name__}: {item}"))
        return list(self._receive(branch, item))

    # --- a chunk of a running branch ----------------------------------------------------------------------

    def _receive(self, branch: LiveBranch, chunk: Chunk) -> Events:
        if not branch.has_begun:
            branch.has_begun = True
            self.usage.add_prefill(branch.kind, branch.name, len(branch.context.ids), chunk.cached_tokens)
        self.usage.add_generated(len(chunk.token_ids), is_root=branch.parent is None)
        branch.leg_tokens += len(chunk.token_ids)
        branch.context.grow(chunk.token_ids, chunk.text)
        said, before = branch.text_end, branch.context.chars - len(chunk.text)
        branch.text_end = (said + chunk.text)[-TEXT_END_CHARS:]
        over = self._machine.grew(branch.name, len(chunk.token_ids), self._clock())
        if over:
            yield self._text(branch, chunk.text, len(chunk.token_ids))
            yield from self._apply(over)
            return
        shown, counted = 0, len(chunk.token_ids)
        for event in self._parse(branch, chunk):
            upto = min(event.at - before, len(chunk.text))
            if upto > shown or counted:
                yield self._text(branch, chunk.text[shown:upto], counted)
            shown, counted = max(upto, shown), 0
            goes_on = isinstance(event, Fork) and event.parent_continues
            if not goes_on:  # what follows in this chunk is dropped
                branch.text_end = (said + chunk.text[:upto])[-TEXT_END_CHARS:]
            yield from self._follow(branch, event)
            if not goes_on or not self._machine.is_running(branch.name):
                return
        if shown < len(chunk.text) or counted:
            yield self._text(branch, chunk.text[shown:], counted)
        if chunk.stop in branch.leg.forks_at:  # no fork after all: it was text
            self._halt(branch)
            branch.kind = "onward"
            self._launch(branch)
        elif chunk.finish is not None:
            yield from self._finished(branch, chunk.finish)

    def _parse(self, branch: LiveBranch, chunk: Chunk) -> Iterator[Fork | End]:
        before = branch.parser.malformed
        found = branch.parser.feed(chunk.text)
        is_over = chunk.finish is not None and chunk.stop not in branch.leg.forks_at
        if is_over or any(isinstance(event, End) or not event.parent_continues for event in found):
            found = found + branch.parser.close()
        self.usage.malformed_tags += branch.parser.malformed - before
        yield from found

    def _finished(self, branch: LiveBranch, finish: str) -> Events:
        if finish == "length":
            self.usage.unterminated_branches += 1
            yield from self._end(branch, Ending.LENGTH)
        elif finish == "stop":
            yield from self._end(branch, Ending.STOP)
        else:
            yield from self._end(branch, Ending.ERROR, f"the engine ended it with {finish!r}")

    def _follow(self, branch: LiveBranch, event: Fork | End) -> Events:
        if isinstance(event, End):
            branch.context.cut(tokens_before(branch.context, event.at, self._decode))
            yield from self._end(branch, Ending.STOP)
        else:
            yield from self._fork(branch, event)

    def _end(self, branch: LiveBranch, ending: Ending, detail: str | None = None) -> Events:
        self._halt(branch)
        yield from self._apply(self._machine.end(branch.name, ending, self._clock(), detail))

    def _close_text(self, branch: LiveBranch) -> Events:
        missing = missing_end(branch.text_end, branch.spec.closing)
        if missing:
            branch.context.give(self._engine.encode(missing))
            yield Text(branch=branch.name, text=missing, is_given=True)

    def _fork(self, branch: LiveBranch, fork: Fork) -> Events:
        try:
            actions = self._machine.fork(
                branch.name,
                len(fork.branches),
                fork.join,
                self._clock(),
                parent_continues=fork.parent_continues,
            )
        except BudgetExceeded as error:
            self._halt(branch)
            yield from self._apply(self._machine.end(branch.name, Ending.BUDGET, self._clock(), str(error)))
            return
        cut = tokens_before(branch.context, fork.at, self._decode)
        if fork.parent_continues:
            branch.context.fork_at(cut)
        else:
            self._halt(branch)
            branch.context.cut(cut)
            if fork.lead:
                branch.context.give(self._engine.encode(fork.lead))
                yield Text(branch=branch.name, text=fork.lead, is_given=True)
            branch.context.fork_at(len(branch.context.ids))
        if fork.join is not Join.NONE:
            branch.resume = fork.resume
        self._specs = [(branch.name, spec) for spec in fork.branches]
        yield from self._apply(actions)

    # --- what the machine wants done ----------------------------------------------------------------------

    def _apply(self, actions: Sequence[Action]) -> Events:
        for action in actions:
            if isinstance(action, Begin):
                yield from self._begin(action.branch)
            elif isinstance(action, Over):
                branch = self._branches[action.branch]
                self._halt(branch)
                if not action.ending.is_failure:
                    yield from self._close_text(branch)
                yield Ended(branch=action.branch, ending=action.ending, detail=action.detail)
            else:
                yield from self._rejoin(self._branches[action.branch], action.children)

    def _begin(self, name: str) -> Events:
        parent_name, spec = self._specs.pop(0)
        parent = self._branches.get(parent_name)
        branch = LiveBranch(
            name=name,
            parent=parent_name or None,
            spec=spec,
            parser=self._program.front.parser(spec, is_root=parent is None),
            context=Context(),
            leg=spec.leg,
            kind="fork" if parent else "open",
        )
        self._branches[name] = branch
        yield Started(branch=name, parent=branch.parent, label=spec.label)
        if spec.header:
            yield Text(branch=name, text=spec.header, is_given=True, is_visible=spec.leg.is_visible)
        try:
            if parent is None:
                inherited = list(self._program.prompt_ids)
            elif spec.messages is not None:
                inherited = self._engine.render(spec.messages)
            else:
                inherited = parent.context.forked_ids()
            branch.context.open(inherited, self._engine.encode(spec.header) if spec.header else [])
        except ValueError as error:
            self._inbox.put_nowait((name, self._new_run(branch), error))
            branch.task = asyncio.get_running_loop().create_task(_nothing())
            return
        if parent is None:
            self.usage.prompt_tokens = len(branch.context.ids)
        self._launch(branch)

    def _rejoin(self, parent: LiveBranch, names: tuple[str, ...]) -> Events:
        children = [self._branches[name] for name in names]
        resume, parent.resume = parent.resume, None
        if resume is not None and resume.longest_first:
            children.sort(key=lambda child: -len(child.context.own_ids()))
        yield Joined(branch=parent.name, children=tuple(child.name for child in children))
        if resume is None:
            yield from self._end(parent, Ending.STOP)
            return
        gap = self._engine.encode(resume.separator) if resume.separator else []
        for child in children:
            handed = child.context.own_ids() + gap
            self.usage.join_tokens += len(handed)
            parent.context.give(handed)
        if resume.text:
            parent.context.give(self._engine.encode(resume.text))
            yield Text(branch=parent.name, text=resume.text, is_given=True)
        parent.leg, parent.leg_tokens, parent.kind = resume.leg, 0, "join"
        self._launch(parent)

    # --- runs on the engine -------------------------------------------------------------------------------

    def _launch(self, branch: LiveBranch) -> None:
        """Start a run. What cannot run is reported through the inbox, like an engine's refusal."""
        run = self._new_run(branch)
        room = self._engine.max_model_tokens - len(branch.context.ids)
        general = self._program.root_tokens if branch.parent is None else self._program.branch_tokens
        limit = general if branch.leg.max_tokens is None else branch.leg.max_tokens
        wanted = room if limit is None else limit - branch.leg_tokens
        if limit is not None and wanted == 0:
            self._inbox.put_nowait((branch.name, run, Silence()))
            branch.has_begun = True
            branch.task = asyncio.get_running_loop().create_task(_nothing())
            return
        # One token past the budget, so that the machine sees it met.
        most = min(wanted, room, max(self._machine.tokens_left, 0) + 1)
        branch.task = asyncio.get_running_loop().create_task(self._generate(branch, run, most))

    async def _generate(self, branch: LiveBranch, run: int, max_tokens: int) -> None:
        ids, engine, program = branch.context.ids, self._engine, self._program
        if max_tokens < 1:
            full = f"a context of {len(ids)} tokens leaves no room; this model's is {engine.max_model_tokens}"
            self._inbox.put_nowait((branch.name, run, ContextFull(full)))
            return
        stream = engine.generate(
            tuple(ids),
            {**program.sampling_of(branch.leg, is_opening=branch.kind == "open"), "max_tokens": max_tokens},
            kept_stops=branch.leg.kept_stops,
            request_id=program.id,
            extra_args=program.extra_args,
            replica=program.replica,
        )
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    self._inbox.put_nowait((branch.name, run, chunk))
                    if chunk.finish is not None:
                        return
            raise RuntimeError("the engine ended a run without a reason")
        except Exception as error:
            log.warning("branch %s of %s failed: %s", branch.name, program.id, error)
            self._inbox.put_nowait((branch.name, run, error))

    def _new_run(self, branch: LiveBranch) -> int:
        branch.run += 1
        branch.has_begun = False
        branch.context.begin_run()
        return branch.run

    def _halt(self, branch: LiveBranch) -> None:
        task, branch.task = branch.task, None
        if task is not None and not task.done():
            task.cancel()
            self._leftover = [*(old for old in self._leftover if not old.done()), task]

    async def _stop(self) -> None:
        """No task and no request of the program is left when this returns."""
        for branch in self._branches.values():
            self._halt(branch)
        try:
            await asyncio.gather(*self._leftover, return_exceptions=True)
        finally:
            # Always: a run that was cancelled while the engine took it in can have been left there.
            await self._engine.abort(self._program.id)

    # --- small things -------------------------------------------------------------------------------------

    def _text(self, branch: LiveBranch, text: str, tokens: int) -> Text:
        return Text(branch=branch.name, text=text, tokens=tokens, is_visible=branch.leg.is_visible)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._engine.decode(ids, keeps_special_tokens=self._program.front.keeps_special_tokens)

    def _done(self) -> Done:
        failures = self._machine.failures
        if not failures:
            return Done(status=Status.COMPLETE, error=None, usage=self.usage)
        first, root = failures[0], self._machine.ending(ROOT)
        error = f"branch {first.branch} ended with {first.ending.value}" + (f": {first.detail}" if first.detail else "")
        failed = root is None or root.is_failure
        return Done(status=Status.FAILED if failed else Status.PARTIAL, error=error, usage=self.usage)


async def _nothing() -> None:
    """Stands for a run that is over before it began."""

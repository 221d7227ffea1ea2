"""From a request to the program that runs: everything that can be refused is refused here, before anything runs."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from taper.claims import SEALED, parse_claims
from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.forkjoin.engine import Engine
from taper.forkjoin.plan import Budget, Join, Leg, Message
from taper.forkjoin.planned import Planned, Stage, StageFork, extent, refuse_unfit, texts
from taper.forkjoin.program import Program
from taper.forkjoin.protocol import resolve_protocol
from taper.forkjoin.protocols import BUILT_IN
from taper.forkjoin.wire import (
    BranchRequest,
    ChatRequest,
    ContinuationRequest,
    ForkRequest,
    JoinRequest,
    LeadRequest,
    ProgramRequest,
)

MAX_LEVELS = 32


def explicit_program(request: ProgramRequest, engine: Engine, config: ServerConfig, replica: int | None) -> Program:
    """Raises `ConfigError` for a program that is wrong or cannot fit."""
    messages = tuple(message.plain() for message in request.messages or ())
    ids = _rendered(engine, messages) if messages else engine.encode_prompt(request.prompt or "")
    if not ids:
        raise ConfigError("prompt must not be empty")
    root = _Compiler(engine, messages, request.seed).root(request)
    front = Planned(root=root)
    budget = request.budget.budget()
    _check_plan(root, len(ids), engine, budget)
    program_id = _new_id()
    return Program(
        id=program_id,
        front=front,
        root=front.opening(()),
        prompt_ids=tuple(ids),
        sampling=request.sampling(),
        budget=budget,
        on_error=request.on_branch_error,
        extra_args=_claims(request.vllm_xargs, config),
        replica=replica,
    )


def chat_program(request: ChatRequest, engine: Engine, config: ServerConfig, replica: int | None) -> Program:
    """Raises `ConfigError` for a request that the protocol cannot serve."""
    options = request.taper
    front = resolve_protocol(options.protocol, options.options, BUILT_IN)
    root = front.opening(tuple(message.plain() for message in request.messages))
    ids = _rendered(engine, root.messages or ())
    budget = options.budget.budget()
    if isinstance(front, Planned):
        _check_plan(front.root, len(ids), engine, budget)
    if len(ids) >= engine.max_model_tokens:
        raise ConfigError(f"the prompt has {len(ids)} tokens; this model's context is {engine.max_model_tokens}")
    program_id = _new_id()
    run_tokens = request.max_completion_tokens or request.max_tokens
    return Program(
        id=program_id,
        front=front,
        root=root,
        prompt_ids=tuple(ids),
        sampling=request.sampling(),
        opening_sampling={"structured_regex": options.opening_regex} if options.opening_regex else {},
        root_tokens=run_tokens,
        branch_tokens=options.branch_max_tokens or run_tokens,
        budget=budget,
        on_error=options.on_branch_error,
        extra_args=_claims(request.vllm_xargs, config),
        replica=replica,
    )


class _Compiler:
    """Stages of an explicit program. A branch without a seed of its own gets the program's plus its number."""

    def __init__(self, engine: Engine, messages: tuple[Message, ...], seed: int | None) -> None:
        self._engine = engine
        self._messages = messages
        self._seed = seed
        self._numbers = count()

    def root(self, request: ProgramRequest) -> Stage:
        lead = request.lead
        leg = self._leg(lead, lead.max_tokens) if lead else Leg(max_tokens=0)
        return Stage(label="", leg=leg, fork=self._fork(ForkRequest(branches=request.branches, join=request.join), 1))

    def _fork(self, request: ForkRequest | None, level: int) -> StageFork | None:
        if request is None:
            return None
        if level > MAX_LEVELS:
            raise ConfigError(f"branches: forks and continuations nest more than {MAX_LEVELS} deep")
        branches = tuple(self._branches(request.branches, level))
        for label, uses in Counter(branch.label for branch in branches).items():
            if uses > 1:
                raise ConfigError(f"branches: id {label!r} is given twice among siblings")
        join = request.join
        if join is None:
            return StageFork(branches=branches, join=Join.NONE)
        return StageFork(
            branches=branches,
            separator=join.separator,
            longest_first=join.order == "reuse",
            then=self._then(join, join.continuation, level),
        )

    def _branches(self, requests: list[BranchRequest], level: int) -> Iterator[Stage]:
        for number, request in enumerate(requests, start=1):
            messages, tokens = None, 0
            if request.messages is not None:
                if not self._messages:
                    raise ConfigError("branches: messages go only with a program that has messages")
                messages = (*self._messages, *(message.plain() for message in request.messages))
                tokens = len(_rendered(self._engine, messages))
            yield Stage(
                label=request.id or str(number),
                header=request.suffix,
                leg=self._leg(request, request.max_tokens),
                messages=messages,
                messages_tokens=tokens,
                fork=self._fork(request.fork, level + 1),
            )

    def _then(self, join: JoinRequest, continuation: ContinuationRequest | None, level: int) -> Stage | None:
        if continuation is None:
            if join.instruction:
                raise ConfigError("join.instruction goes only with a continuation")
            return None
        return Stage(
            label="",
            header=join.instruction,
            leg=self._leg(continuation, continuation.max_tokens),
            fork=self._fork(continuation.fork, level + 1),
        )

    def _leg(self, request: BranchRequest | ContinuationRequest | LeadRequest, max_tokens: int) -> Leg:
        number = next(self._numbers)
        sampling = request.sampling()
        if self._seed is not None:
            sampling.setdefault("seed", self._seed + number)
        return Leg(max_tokens=max_tokens, sampling=sampling)


def _check_plan(root: Stage, prompt_tokens: int, engine: Engine, budget: Budget) -> None:
    tokens = {text: len(engine.encode(text)) if text else 0 for text in set(texts(root))}
    need = extent(root, prompt_tokens, tokens)
    refuse_unfit(need, budget, max_rows=engine.max_rows, max_model_tokens=engine.max_model_tokens)


def _rendered(engine: Engine, messages: tuple[Message, ...]) -> list[int]:
    try:
        return engine.render(messages)
    except ValueError as error:
        raise ConfigError(f"messages: {error}") from error


def _claims(given: Mapping[str, Any], config: ServerConfig) -> dict[str, Any]:
    """What the scheduler reads: a program is one group, under a tag that no answer shows and no client can send."""
    if "taper_group" in given:
        raise ConfigError("taper_group does not go with a program: a program is a group of its own")
    parse_claims(given, config.limits, config.slo)
    return {**given, "taper_group": f"{SEALED}{uuid.uuid4().hex}"}


def _new_id() -> str:
    return f"taper-{uuid.uuid4().hex}"

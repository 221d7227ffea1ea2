"""HTTP routes of fork and join, for a FastAPI server that has an engine.

    POST /v1/taper/programs   an explicit program
    POST /v1/taper/chat       a chat completion whose body carries `taper`; the server's own chat route hands it over
    GET  /taper/programs      totals, as JSON

Errors are `HTTPException`s: the server gives them the form its clients expect.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from taper.config import ServerConfig
from taper.core.types import ConfigError, Slo
from taper.forkjoin.answers import ChatStream, Gathered, chat_json, event_json, failure_json, program_json
from taper.forkjoin.compile import chat_program, explicit_program
from taper.forkjoin.engine import Engine
from taper.forkjoin.events import Status
from taper.forkjoin.program import Program
from taper.forkjoin.service import Observer, Service
from taper.forkjoin.wire import ChatRequest, ProgramRequest, check_model

CHAT_PATH = "/v1/taper/chat"
REPLICA_HEADER = "X-data-parallel-rank"

RequestT = TypeVar("RequestT", ProgramRequest, ChatRequest)
Compile = Callable[[RequestT, Engine, ServerConfig, int | None], Program]


class ProgramRoutes:
    """`serve` gives it the engine once there is one; until then it answers 503."""

    def __init__(self, config: ServerConfig, slo: Callable[[], Awaitable[Slo]]) -> None:
        """slo: asked for what the server promises at the moment, where a request claims one of its own."""
        self._config = config
        self._slo = slo
        self._service: Service | None = None

    def serve(self, engine: Engine, observe: Observer | None = None) -> Service:
        self._service = Service(engine, time.monotonic, observe)
        return self._service

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/taper/programs", self.programs, methods=["POST"], response_model=None)
        app.add_api_route(CHAT_PATH, self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/taper/programs", self.totals, methods=["GET"], response_model=None)

    async def programs(self, body: ProgramRequest, request: Request) -> Response:
        service = self._running()
        model, program = await self._accept(body, request, service, explicit_program)
        created = int(time.time())
        if body.stream:
            return EventStream(_program_stream(service, program, model, created))
        gathered = await _unless_gone(request, _gather(service, program))
        return JSONResponse(program_json(program.id, model, created, gathered[0]))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        service = self._running()
        model, program = await self._accept(body, request, service, chat_program)
        created = int(time.time())
        if body.stream:
            stream = ChatStream(
                program_id=program.id,
                model=model,
                created=created,
                interleaved=body.taper.order == "interleaved",
                with_usage=body.stream_options.include_usage,
            )
            return EventStream(_chat_stream(service, program, stream))
        gathered, content = await _unless_gone(request, _gather(service, program))
        if gathered.done is not None and gathered.done.status is Status.FAILED:
            return JSONResponse(failure_json(gathered.done, gathered), status_code=422)
        return JSONResponse(chat_json(program.id, model, created, gathered, content))

    async def totals(self) -> JSONResponse:
        service = self._running()
        return JSONResponse({"live": service.live, "started": service.started, "totals": service.totals})

    def _running(self) -> Service:
        if self._service is None:
            raise HTTPException(503, "this server has no engine")
        return self._service

    async def _accept(
        self, body: RequestT, request: Request, service: Service, compile_: Compile[RequestT]
    ) -> tuple[str, Program]:
        """The model's name and the program; 404 for another model, 400 for what cannot run."""
        try:
            model = check_model(body.model, list(service.engine.models))
        except ConfigError as error:
            raise HTTPException(404, str(error)) from error
        try:
            replica = _replica(request.headers.get(REPLICA_HEADER), service)
            config = replace(self._config, slo=await self._slo()) if body.vllm_xargs else self._config
            return model, compile_(body, service.engine, config, replica)
        except ConfigError as error:
            raise HTTPException(400, str(error)) from error


def _replica(given: str | None, service: Service) -> int | None:
    if given is None:
        return service.next_replica()
    replicas = service.engine.replicas
    if not re.fullmatch("[0-9]{1,9}", given) or int(given) >= replicas:
        raise ConfigError(f"{REPLICA_HEADER} must be between 0 and {replicas - 1}, not {given!r}")
    return int(given)


async def _gather(service: Service, program: Program) -> tuple[Gathered, str]:
    gathered, content = Gathered(), []
    async with aclosing(service.events(program)) as events:
        async for event in events:
            content.append(gathered.feed(event))
    return gathered, "".join(content)


async def _program_stream(service: Service, program: Program, model: str, created: int) -> AsyncGenerator[str, None]:
    head = {"type": "program.started", "id": program.id, "model": model, "created": created}
    yield _sse(head)
    async with aclosing(service.events(program)) as events:
        async for event in events:
            data = event_json(event)
            if data is not None:
                yield _sse(data)
    yield "data: [DONE]\n\n"


async def _chat_stream(service: Service, program: Program, stream: ChatStream) -> AsyncGenerator[str, None]:
    async with aclosing(service.events(program)) as events:
        async for event in events:
            for chunk in stream.feed(event):
                yield _sse(chunk)
    yield "data: [DONE]\n\n"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; closes its generator however it ends, instead of leaving that to garbage collection."""

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


ResultT = TypeVar("ResultT")


async def _unless_gone(request: Request, work: Awaitable[ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

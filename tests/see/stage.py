"""TAPER's routes on a real HTTP server, over a real vLLM scheduler without an engine.

`Stage` steps the scheduler in a thread of its own, as an engine would, and answers the engine methods between
two steps. The chat route is the test's own: it streams numbered words, one per branch and round; where a request
names a protocol, the real routes answer over a toy engine.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from taper.config import ServerConfig
from taper.engines.vllm import control
from taper.engines.vllm.launch import free_port
from taper.engines.vllm.programs import ChatSwitch
from taper.engines.vllm.routes import TaperEndpoints, error_response
from taper.forkjoin.routes import CHAT_PATH, ProgramRoutes
from tests.forkjoin.toy import ToyEngine
from tests.vllm.harness import Driver

MODEL = "tiny-model"


class Core:
    """EngineCore's side of utility calls, for one replica or several."""

    def __init__(self, *drivers: Driver) -> None:
        class EngineCore(SimpleNamespace):
            pass

        control.install(EngineCore)
        self.lock = threading.Lock()
        self.core_engines = [EngineCore(scheduler=driver.scheduler) for driver in drivers]
        self.engine_ranks_managed = list(range(len(drivers)))
        self.calls: list[str] = []
        self.away = False

    async def _call_utility_async(self, method: str, *args: Any, engine: Any) -> Any:
        self.calls.append(method)
        if self.away:
            await asyncio.sleep(3600)
        with self.lock:
            return getattr(engine, method)(*args)


def client_of(core: Core) -> Any:
    """What vLLM hands to an endpoint plugin."""
    model = SimpleNamespace(served_model_name=MODEL)
    return SimpleNamespace(engine_core=core, errored=False, vllm_config=SimpleNamespace(model_config=model))


class Stage:
    """The server and the stepping thread, as a context manager. `port` is fixed so that it can come back."""

    def __init__(self, *drivers: Driver, port: int | None = None, api_key: str | None = None) -> None:
        self.drivers = drivers
        self.core = Core(*drivers)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._api_key = api_key
        self._stepping = True

    def __enter__(self) -> Self:
        config = uvicorn.Config(self._app(), host="127.0.0.1", port=self.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._server.run, self._step)]
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            assert self._threads[0].is_alive(), "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stepping = False
        self._server.should_exit = self._server.force_exit = True
        for thread in self._threads:
            thread.join(120)

    def _step(self) -> None:
        while self._stepping:
            with self.core.lock:
                for driver in self.drivers:
                    if driver.scheduler.has_requests():
                        driver.step()
            time.sleep(0.1)  # so that long requests outlast a slow browser

    def _app(self) -> FastAPI:
        plugin = TaperEndpoints()

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            args = SimpleNamespace(api_key=self._api_key and [self._api_key])
            await plugin.init_state(client_of(self.core), app.state, args)
            yield

        app = FastAPI(lifespan=lifespan)
        plugin.attach_router(app)
        app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
        programs = ProgramRoutes(ServerConfig(), plugin.terms.slo)
        programs.attach_router(app)
        programs.serve(ToyEngine(model_says, models=(MODEL,)))
        app.add_middleware(ChatSwitch, path=CHAT_PATH)
        app.add_exception_handler(HTTPException, refuse)
        if self._api_key:
            app.middleware("http")(self._authenticate)
        return app

    async def _authenticate(self, request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1") and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return await call_next(request)


async def chat(request: Request) -> StreamingResponse:
    body = await request.json()

    async def stream() -> AsyncIterator[str]:
        for word in range(body["max_tokens"]):
            finish = "length" if word + 1 == body["max_tokens"] else None
            for index in range(body["n"]):
                choice = {"index": index, "delta": {"content": f"b{index}w{word} "}, "finish_reason": finish}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0.01)
        usage = {"completion_tokens": body["max_tokens"] * body["n"]}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


def model_says(prompt: str) -> str:
    """An outline where it is asked for one, and something about its points; a question with a bang in it fails."""
    if "outline of an answer" in prompt:
        return "!out of luck" if "bang" in prompt else "1. Sun\n2. Moon\n3. Sky"
    if prompt.endswith("Moon:"):
        return "!no moon" if "eclipse" in prompt else " cold."
    return " hot." if prompt.endswith("Sun:") else " blue."


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """As vLLM's server puts it."""
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail))

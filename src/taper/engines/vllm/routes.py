"""HTTP routes of TAPER on vLLM's API server, as a vLLM endpoint plugin.

    GET  /taper              the live page, its files under /taper/static/
    GET  /taper/live         {"engines": [live state, ...], "age_s", "server"}; ?since=SECOND for less timeline
    GET  /taper/state        {"engines": [snapshot, ...]}
    GET  /metrics            vLLM's metrics and `taper:*`
    POST /v1/taper/control   a JSON patch; answers with the state after it
    GET  /v1/taper/steps     {"engines": [[step record, ...], ...]}, emptying the rings

The routes that change anything live under /v1/, which vLLM's `--api-key` guards, and on top of that need
`allow_control` or the control token (header X-Taper-Control).
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route

from taper.config import ServerConfig
from taper.engines.vllm import compat
from taper.engines.vllm.launch import CONTROL_HEADER
from taper.engines.vllm.metrics import CONTENT_TYPE, Exposition
from taper.engines.vllm.page import PAGE, StaticFiles
from taper.engines.vllm.terms import Terms
from taper.engines.vllm.watch import EnginesAway, LiveFeed, Poll, Shared

TERMS = "taper_terms"  # attribute of the application's state, for `ClaimsMiddleware`


class TaperEndpoints:
    """The endpoint plugin. Its state is the engine client that vLLM hands over once the engine is up."""

    name = "taper"
    required_tasks = None

    def __init__(self) -> None:
        self._config = ServerConfig.from_env()
        self.terms = Terms(self._config)
        self._engines: Any = None
        self._static = StaticFiles()
        self._feed = LiveFeed(self._call)
        self._snapshot = Shared(lambda: self._call("taper_snapshot"))
        self._server: dict[str, Any] = {}
        self._metrics = Exposition(compat.prometheus_registry())

    def attach_router(self, app: FastAPI) -> None:
        # A plain Route, and first: vLLM mounts its own /metrics, which would come before a route added later.
        app.router.routes.insert(0, Route("/metrics", self.metrics))
        app.add_api_route("/taper", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/taper/static/{name}", self.static, methods=["GET"], include_in_schema=False)
        app.add_api_route("/taper/live", self.live, methods=["GET"])
        app.add_api_route("/taper/state", self.state, methods=["GET"])
        app.add_api_route("/v1/taper/control", self.control, methods=["POST"])
        app.add_api_route("/v1/taper/steps", self.steps, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self._engines = engine_client
        if engine_client is not None:
            model, ranks = compat.served_model(engine_client), compat.engine_ranks(engine_client)
            self._server = {
                "model": model,
                "engines": ranks,
                "allows_control": self._config.allow_control,
                "needs_key": bool(api_keys(args)),
            }
            self.terms.follow(self._snapshot.latest)
            setattr(state, TERMS, self.terms)
            self._metrics.serve(Poll(self._snapshot.latest), model=model, ranks=ranks)

    async def metrics(self, request: Request) -> Response:
        return Response(await self._metrics.text(), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        return self._static.response(PAGE)

    async def static(self, name: str) -> Response:
        return self._static.response(name)

    async def live(self, since: int = 0) -> JSONResponse:
        if self._engines is None:
            return error_response(503, "this server has no engine")
        try:
            engines, age_s = await self._feed.latest(since)
        except EnginesAway as error:
            return error_response(503, str(error))
        return JSONResponse({"engines": engines, "age_s": age_s, "server": self._server})

    async def state(self) -> JSONResponse:
        return await self._answer(self._snapshot.latest)

    async def control(self, request: Request) -> JSONResponse:
        if not self._may_control(request):
            return _forbidden()
        try:
            patch = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            return error_response(400, f"the patch is not JSON: {error}")
        if not isinstance(patch, dict):
            return error_response(400, f"the patch must be a JSON object, not {type(patch).__name__}")
        return await self._ask("taper_configure", patch)

    async def steps(self, request: Request) -> JSONResponse:
        if not self._may_control(request):
            return _forbidden()
        return await self._ask("taper_drain_steps")

    async def _ask(self, method: str, *args: Any) -> JSONResponse:
        return await self._answer(lambda: self._call(method, *args))

    async def _answer(self, ask: Callable[[], Awaitable[list[Any]]]) -> JSONResponse:
        if self._engines is None:
            return error_response(503, "this server has no engine")
        answers = await ask()
        refusals = [answer["error"] for answer in answers if isinstance(answer, dict) and "error" in answer]
        if refusals:
            return error_response(400, refusals[0])
        self.terms.heard(answers)
        return JSONResponse({"engines": answers})

    async def _call(self, method: str, *args: Any) -> list[Any]:
        return await compat.call_engines(self._engines, method, *args)

    def _may_control(self, request: Request) -> bool:
        if self._config.allow_control and not _is_foreign(request):
            return True
        token, given = self._config.control_token, request.headers.get(CONTROL_HEADER)
        return bool(token and given and hmac.compare_digest(token.encode(), given.encode()))


def api_keys(args: Any) -> list[str]:
    """The keys that the server takes; none where it checks none. `args` is its command line, None where unknown."""
    given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or []
    return [key for key in ([given] if isinstance(given, str) else given) if key]


def _is_foreign(request: Request) -> bool:
    """Whether a page of another site has the visitor's browser send this; with a key it cannot."""
    origin = request.headers.get("Origin")
    if origin is None or "Authorization" in request.headers:
        return False
    return origin.partition("://")[2] != request.headers.get("Host")


def _forbidden() -> JSONResponse:
    return error_response(
        403, f"changing a running engine needs allow_control, or the control token in {CONTROL_HEADER}"
    )


def error_response(status: int, message: str) -> JSONResponse:
    """An error as OpenAI clients expect it."""
    return JSONResponse(error_body(status, message), status_code=status)


def error_body(status: int, message: str) -> dict[str, Any]:
    kinds = {400: "BadRequestError", 403: "PermissionDeniedError", 429: "RateLimitError"}
    kind = kinds.get(status, "APIError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}

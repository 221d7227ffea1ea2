"""HTTP 400 for bad `taper_*` claims, before vLLM sees the request.

vLLM hands `vllm_xargs` to the scheduler unread, where a bad claim can no longer be refused, only ignored.
Use as `--middleware taper.engines.vllm.middleware.ClaimsMiddleware`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from taper.claims import parse_claims
from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.engines.vllm.routes import error_response

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClaimsMiddleware:
    """Plain ASGI: looks into the body of the three generation routes and passes everything else through."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._config = ServerConfig.from_env()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        messages = await whole_body(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        error = self._refusal(body)
        if error is not None:
            await error_response(400, error)(scope, receive, send)
            return
        await self._app(scope, replay(messages, receive), send)

    def _refusal(self, body: bytes) -> str | None:
        """Why the claims in `body` are refused; None for none, or for a body that is vLLM's to refuse."""
        if b"taper_" not in body and b"\\u" not in body:  # a JSON string may spell a letter as an escape
            return None
        try:
            claims = json.loads(body).get("vllm_xargs")
        except (ValueError, AttributeError, RecursionError):
            return None
        if not isinstance(claims, dict):
            return None
        try:
            parse_claims(claims, self._config.limits, self._config.slo)
        except ConfigError as error:
            return str(error)
        return None


async def whole_body(receive: Receive) -> list[Message]:
    """Messages up to the end of the body, or up to the disconnect that cut it short."""
    messages = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


def replay(messages: list[Message], receive: Receive) -> Receive:
    """Hand out `messages` again, then whatever comes after them."""
    pending = iter(messages)

    async def again() -> Message:
        for message in pending:
            return message
        return await receive()

    return again

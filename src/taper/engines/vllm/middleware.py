"""Who may claim what, settled before vLLM sees the request: HTTP 400 for bad claims, tags sealed per tenant, and one
engine replica for all branches of a request.

vLLM hands `vllm_xargs` to the scheduler unread, where a bad claim can no longer be refused, only ignored, and
where nobody knows any more who sent it. Use as `--middleware taper.engines.vllm.middleware.ClaimsMiddleware`.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from taper.claims import TPOT_FIELD, TTFT_FIELD, Claims, check_branches, check_priority, parse_claims
from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.engines.vllm import compat
from taper.engines.vllm.placement import RANK_HEADER, Placement
from taper.engines.vllm.routes import TERMS, api_keys, error_response
from taper.engines.vllm.terms import Terms
from taper.tenancy import Tenant, seal, tenant

# Every route of vLLM's that hands a JSON body's `vllm_xargs`, or its `sampling_params.extra_args`, to the scheduler.
PATHS = (
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages",
    "/inference/v1/generate", "/invocations", "/generative_scoring", "/cohere/v2/chat", "/v1/taper/chat",
    "/v1/taper/programs",
)  # fmt: skip
# What a body without claims does not contain. A JSON string may spell a letter as an escape, and JSON may be UTF-16.
SIGNS = (b"taper_", b'"n"', b'"priority"', b"\\u", b"\0")
RANK = RANK_HEADER.lower().encode()
PRIORITY = b"x-vllm-priority"  # goes before the body's field
SLO_FIELDS = (TPOT_FIELD, TTFT_FIELD)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One request body: where its claims are, and how many branches it makes."""

    request: dict[str, Any]
    given: dict[str, Any]  # inside `request`, so that a change here is one there
    n: int
    tagged: int  # branches that one tag binds: n for every prompt

    @classmethod
    def of(cls, body: bytes) -> Demand | None:
        """None for a body without claims, and for one that is vLLM's to refuse."""
        if not any(sign in body for sign in SIGNS):
            return None
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(request, dict):
            return None
        params = request.get("sampling_params")
        params = params if isinstance(params, dict) else {}
        found = [at for at in (request.get("vllm_xargs"), params.get("extra_args")) if isinstance(at, dict)]
        given = next((at for at in found if _has_claims(at)), {})
        if sum(map(_has_claims, found)) > 1:
            raise ConfigError("taper_ fields go into vllm_xargs or sampling_params.extra_args, not both")
        n = max(int(_number(fields.get("n"), 1.0)) for fields in (request, params))
        prompts = max(_prompts(request.get(name)) for name in ("prompt", "messages"))
        return cls(request=request, given=given, n=n, tagged=max(n, 1) * prompts)


class ClaimsMiddleware:
    """Plain ASGI: looks into the bodies of the generation routes and passes everything else through."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._config = ServerConfig.from_env()
        self._terms = Terms(self._config)  # where the endpoint plugin is not loaded, and nothing changes the SLO
        secret = self._config.group_secret
        self._secret = secret.encode() if secret else secrets.token_bytes(32)
        self._in_flight: Counter[str] = Counter()  # branches by sealed tag
        self._placement = Placement()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_ours(scope):
            await self._app(scope, receive, send)
            return
        messages = await whole_body(receive)
        try:
            demand = Demand.of(b"".join(message.get("body", b"") for message in messages))
            self._check_priority(scope, demand)
            claims = await self._claims(scope, demand) if demand is not None else None
        except ConfigError as error:
            await error_response(400, str(error))(scope, receive, send)
            return
        if demand is None or claims is None:
            await self._app(scope, replay(messages, receive), send)
        elif claims.group is None:
            with self._placed(demand, None, scope) as placed:
                await self._app(placed, replay(messages, receive), send)
        else:
            await self._pass_sealed(demand, seal(self._secret, _tenant(scope), claims.group), scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        """Whether the body has to be looked at; one that vLLM will refuse for its key is not even read."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        path = scope["path"].removesuffix("\n")  # so do the routes' patterns: `$` lets one by
        if not path.endswith(PATHS):
            return False
        is_guarded = path.startswith("/v1/") and not scope.get("root_path") and api_keys(_args(scope))
        return not is_guarded or _is_checked(scope)

    def _check_priority(self, scope: Scope, demand: Demand | None) -> None:
        """Raises `ConfigError` where vLLM's own priority, of the header or the body, is out of bounds."""
        if getattr(_args(scope), "scheduling_policy", "fcfs") != "priority":
            return
        limits = _terms(scope, self._terms).limits
        given = [_number(demand.request.get("priority"), 0.0)] if demand is not None else []
        for value in (value for name, value in scope["headers"] if name.lower() == PRIORITY):
            with suppress(ValueError):  # then the body's field counts
                given.append(max(int(value.decode("latin-1")), -(2**63)))  # no message holds any number of digits
        for priority in given:
            check_priority(priority, limits)

    async def _pass_sealed(self, demand: Demand, tag: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The request goes on under `tag`, which counts its branches for as long as it runs."""
        running, most = self._in_flight[tag], self._config.limits.max_branches
        if running + demand.tagged > most:
            message = f"taper_group has {running} branches in flight; this server allows {most}"
            await error_response(429, message)(scope, receive, send)
            return
        demand.given["taper_group"] = tag
        self._in_flight[tag] += demand.tagged
        try:
            with self._placed(demand, tag, scope) as placed:
                await self._app(*_with_body(placed, receive, json.dumps(demand.request).encode()), send)
        finally:
            self._in_flight[tag] -= demand.tagged
            if not self._in_flight[tag]:
                del self._in_flight[tag]

    @contextmanager
    def _placed(self, demand: Demand, tag: str | None, scope: Scope) -> Iterator[Scope]:
        """The scope of a request with branches names an engine replica, where there are several and it names none."""
        replicas = compat.replicas(getattr(_state(scope), "engine_client", None))
        branches_out = tag is not None or demand.n > 1
        if replicas < 2 or not branches_out or any(name.lower() == RANK for name, _ in scope["headers"]):
            yield scope
            return
        with self._placement.place(tag, branches=demand.tagged, replicas=replicas) as rank:
            yield {**scope, "headers": [*scope["headers"], (RANK, str(rank).encode())]}

    async def _claims(self, scope: Scope, demand: Demand) -> Claims:
        """Raises `ConfigError` for a claim out of bounds, naming its field."""
        terms = _terms(scope, self._terms)
        slo = await terms.slo() if any(name in demand.given for name in SLO_FIELDS) else self._config.slo
        claims = parse_claims(demand.given, terms.limits, slo)
        check_branches("n", demand.n, terms.limits)
        if claims.group is not None:
            check_branches("taper_group", demand.tagged, terms.limits)
            if demand.request.get("background") not in (None, False):  # answered at once: it would count for nothing
                raise ConfigError("taper_group does not go with background: its branches could not be counted")
        return claims


def _has_claims(fields: dict[str, Any]) -> bool:
    return any(name.startswith("taper_") for name in fields)


def _prompts(value: Any) -> int:
    """A list of texts, of token lists or of conversations is many; token ids, or messages, are one."""
    is_many = isinstance(value, list) and len(value) > 0 and isinstance(value[0], (str, list))
    return len(value) if is_many else 1


def _number(value: Any, default: float) -> float:
    """What vLLM will read there, be it a string; `default` for what it will refuse or has a default for."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if abs(number) < 2**63 else default


def _state(scope: Scope) -> Any:
    return getattr(scope.get("app"), "state", None)


def _terms(scope: Scope, otherwise: Terms) -> Terms:
    terms: Terms = getattr(_state(scope), TERMS, otherwise)
    return terms


def _args(scope: Scope) -> Any:
    """vLLM's command line."""
    return getattr(_state(scope), "args", None)


def _tenant(scope: Scope) -> Tenant:
    """By the bearer token and the peer's address; a forwarded address only where uvicorn was told to trust it."""
    peer = scope.get("client")
    return tenant(key=_key(scope), origin=peer[0] if peer else None, is_checked=_is_checked(scope))


def _is_checked(scope: Scope) -> bool:
    """Whether its key is one of the server's: vLLM leaves some routes unguarded, where any word would do."""
    key = _key(scope)
    if key is None:
        return False
    return any(hmac.compare_digest(key.encode(), one.encode()) for one in api_keys(_args(scope)))


def _key(scope: Scope) -> str | None:
    """The bearer token."""
    authorization = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    scheme, _, token = authorization.decode("latin-1").partition(" ")
    return token if scheme.lower() == "bearer" else None


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The scope and the messages of the same request with another body; `receive` is past the first one."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    message = {"type": "http.request", "body": body, "more_body": False}
    return {**scope, "headers": headers}, replay([message], receive)


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

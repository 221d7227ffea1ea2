"""The server's TAPER side, over HTTP: read its state, switch its policy, drain its step records."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from taper.bench.client import NO_KEEP_ALIVE, is_loopback

STATE = "/taper/state"
CONTROL = "/v1/taper/control"
STEPS = "/v1/taper/steps"


class ControlError(RuntimeError):
    """The server refused or did not answer; the message is one line."""


class ControlClient:
    """Thin client of the endpoints above. `headers` carry the control token where one is needed."""

    def __init__(self, *, url: str, headers: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={**NO_KEEP_ALIVE, **(headers or {})},
            timeout=timeout_s,
            trust_env=not is_loopback(url),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def engines(self) -> list[dict[str, Any]]:
        """One snapshot per engine replica."""
        return _engines(await self._call("GET", STATE))

    async def configure(self, patch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Apply a patch (policy, tpot_slo_s, ...) to every engine; starts a new statistics window there."""
        return _engines(await self._call("POST", CONTROL, json=dict(patch)))

    async def steps(self) -> list[list[dict[str, Any]]]:
        """The step records since the last call, per engine."""
        engines = (await self._call("GET", STEPS))["engines"]
        if not isinstance(engines, list):
            raise ControlError(f"{STEPS}: 'engines' is not a list")
        return engines

    async def until_idle(self, *, timeout_s: float = 10.0) -> bool:
        """Wait until no request group is left in any engine; False when that takes longer than allowed."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if all(one.get("tables", {}).get("groups", 0) == 0 for one in await self.engines()):
                return True
            await asyncio.sleep(0.1)
        return False

    async def _call(self, method: str, path: str, json: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=json)
        except httpx.HTTPError as error:
            raise ControlError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise ControlError(f"{method} {path}: http {response.status_code}: {_message(response)}")
        body = response.json()
        if not isinstance(body, dict):
            raise ControlError(f"{method} {path}: not a JSON object")
        return body


def _engines(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    engines = body.get("engines")
    if not isinstance(engines, list) or not engines:
        raise ControlError("the server reports no engine: is it running with TAPER on?")
    return engines


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text.split())[:200]

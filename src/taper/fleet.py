"""The servers of a bench: started here one at a time, or one that runs already."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from taper.bench.client import LoadClient, Sending, is_loopback
from taper.bench.control import ControlClient, ControlError
from taper.bench.dialogue import DialogueName
from taper.bench.measure import Target
from taper.claims import ClaimLimits
from taper.config import ServerConfig
from taper.core.types import ConfigError, Slo
from taper.engines.vllm.launch import CONTROL_HEADER, Server
from taper.engines.vllm.supervise import AUTO, obtain_profile
from taper.model import embedded_model
from taper.profile import Profile
from taper.workload import Mix

STOCK = "stock"  # the policy name of plain vLLM, without any of TAPER
_SERVED_NAME = "bench"
# Server and client share the cores with a CPU model: a chunk per token and row would cost as much as the rows do. First
# and last tokens leave at once whatever the interval, so TTFT and effective TPOT do not see it.
_STREAMING = ("--stream-interval", "8")
# The servers are ours and so are their clients: whatever classes of SLO a mix has may be claimed.
_ANY_SLO = ClaimLimits(tightest_slo=1e-3, loosest_slo=1e3)
_WARM_REQUESTS = 8
_WARM_S = 120.0


class LocalFleet:
    """Serves the model as each policy needs it: with TAPER, or stock. One server at a time; the next policy that needs
    the other kind ends it, so a sweep with `stock` alternates servers."""

    context_tokens: int | None = None
    profile: Profile | None = None

    def __init__(
        self,
        *,
        model: str | None,
        vllm_args: Sequence[str],
        dialogue: DialogueName,
        profile: Profile | None,
        profile_path: Path | None,
        log: Path,
        say: Callable[[str], None],
    ) -> None:
        self.profile = profile
        self._model = model
        self._args = [*_STREAMING, *vllm_args, "--served-model-name", _SERVED_NAME]
        self._dialogue = dialogue
        self._choice = AUTO if profile_path is None else str(profile_path)
        self._log = log
        self._say = say
        self._stack = AsyncExitStack()
        self._target: Target | None = None
        self._stock: bool | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def target(self, policy: str) -> Target:
        stock = policy == STOCK
        if self._target is None or self._stock != stock:
            await self._stack.aclose()
            self._target, self._stock = None, stock
            self._target = await self._started(stock)
        return self._target

    async def _started(self, stock: bool) -> Target:
        kind = "stock vLLM" if stock else "vLLM with TAPER on"
        self._say(f"starting {kind} (its output: {self._log})")
        model = self._model or str(embedded_model(self._say))
        config = ServerConfig(limits=_ANY_SLO)
        server = Server(model, self._args, config=config, embedded=self._model is None, stock=stock, log=self._log)
        self._stack.callback(server.stop)  # also where the start itself is cut off
        await asyncio.to_thread(server.__enter__)
        if not stock:
            await asyncio.to_thread(self._give_profile, server)
        headers = server.control_headers
        client = await self._stack.enter_async_context(
            LoadClient(
                base_url=f"{server.url}/v1", model=_SERVED_NAME, api_key=_bearer(headers), dialogue=self._dialogue
            )
        )
        control = None
        if not stock:
            control = await self._stack.enter_async_context(ControlClient(url=server.url, headers=headers))
        self.context_tokens = (await _served_model(server.url, headers, None))[1]
        await _warm(client)
        return Target(client=client, control=control)

    def _give_profile(self, server: Server) -> None:
        if self.profile is not None:
            server.configure({"profile": self.profile.to_json()})
            return
        self.profile, origin = obtain_profile(server, self._choice, progress=self._say)
        self._say(f"profile: {origin}")


class RemoteFleet:
    """One running OpenAI-compatible server, for every policy. Without a control token it is asked for nothing of
    TAPER, and the policy's name is only a label."""

    profile: Profile | None = None
    context_tokens: int | None = None

    def __init__(
        self,
        *,
        url: str,
        model: str | None,
        api_key: str | None,
        control_token: str | None,
        dialogue: DialogueName,
        profile: Profile | None,
        roots: Sequence[int] = (),
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must begin with http:// or https://, not {url!r}")
        self.profile = profile
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._api_key = api_key
        self._token = control_token
        self._dialogue = dialogue
        self._roots = tuple(roots)
        self._stack = AsyncExitStack()
        self._target: Target | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def target(self, policy: str) -> Target:
        if self._target is None:
            self._target = await self._opened()
        return self._target

    async def _opened(self) -> Target:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        name, self.context_tokens = await _served_model(self._url, headers, self._model)
        client = await self._stack.enter_async_context(
            LoadClient(
                base_url=f"{self._url}/v1",
                model=name,
                api_key=self._api_key or "none",
                # A chat dialogue is what servers other than vLLM take; vLLM's own fields would be refused there.
                vllm_extensions=self._dialogue == "tokens",
                dialogue=self._dialogue,
            )
        )
        control = None
        if self._token is not None:
            control = await self._stack.enter_async_context(
                ControlClient(url=self._url, headers={**headers, CONTROL_HEADER: self._token})
            )
        await _warm(client)
        return Target(client=client, control=control, roots=self._roots)


def _bearer(headers: dict[str, str]) -> str:
    return headers.get("Authorization", "Bearer none").removeprefix("Bearer ")


async def _served_model(url: str, headers: dict[str, str], wanted: str | None) -> tuple[str, int | None]:
    """Name and context length of the model to ask for. Raises ControlError where the server lists no such model."""
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=not is_loopback(url), timeout=30.0) as http:
        try:
            response = await http.get("/v1/models")
            models: list[dict[str, Any]] = response.raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ControlError(f"GET {url}/v1/models: {type(error).__name__}: {error}") from error
    for one in models:
        if wanted is None or one.get("id") == wanted:
            return str(one["id"]), one.get("max_model_len")
    raise ControlError(f"{url} serves {', '.join(str(one.get('id')) for one in models) or 'no model'}, not {wanted}")


async def _warm(client: LoadClient) -> None:
    """A few requests at once, whose figures nobody sees. Raises ControlError when they all fail."""
    now_s = time.monotonic()
    sending = Sending(policy="warm", round=-1, slo=Slo(), scheduled_s=now_s, deadline_s=now_s + _WARM_S)
    requests = [Mix().request(seed=0, index=index) for index in range(_WARM_REQUESTS)]
    records = await asyncio.gather(*(client.run(request, sending) for request in requests))
    if all(record.error for record in records):
        raise ControlError(f"every warm-up request failed, the first with: {records[0].error}")

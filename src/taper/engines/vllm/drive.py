"""The HTTP side of a calibration: sends prompts that put a chosen load on the engine, and collects its step records."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from taper.core.calibration import Samples
from taper.core.types import ConfigError
from taper.engines.vllm.grid import PREFIXES, Visit
from taper.engines.vllm.launch import ServerError, answer_of
from taper.engines.vllm.placement import RANK_HEADER

PROMPTS_PER_VISIT = 2  # of a visit with prompts beside its rows
STEPS_BETWEEN_PROMPTS = 2
FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 4000  # ordinary tokens of any vocabulary
REQUEST_TIMEOUT_S = 120.0


@dataclass(slots=True)
class _Records:
    """Measured steps as they come in: load, seconds, and the visit they were meant for (-1: none)."""

    load: list[tuple[int, int, int]] = field(default_factory=list)
    measured_s: list[float] = field(default_factory=list)
    cell: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.cell)


class Driver:
    """HTTP side of a calibration. Keeps the prefixes it has sent, so that the engine has them cached."""

    def __init__(self, url: str, headers: Mapping[str, str], seed: int) -> None:
        self.seed = seed
        self.records = _Records()
        self._random = random.Random(seed)  # noqa: S311 - prompts to measure with, no secret
        self._prefixes: list[list[int]] = [[] for _ in range(PREFIXES)]
        self._cells: dict[tuple[int, int], int] = {}
        self._model: str | None = None
        self._step_s = 0.0  # of the last visit
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={
                **headers,
                RANK_HEADER: "0",  # one engine: vLLM would spread the rows of a visit over all
                "Connection": "close",  # a kept one may be closed by the server just when a visit takes it
            },
            timeout=REQUEST_TIMEOUT_S,
            trust_env=False,
            verify=False,  # noqa: S501 - our own server on this machine, under a name its certificate need not have
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def state(self) -> dict[str, Any]:
        return await self._call("GET", "/taper/state")

    async def configure(self, patch: Mapping[str, Any]) -> None:
        await self._call("POST", "/v1/taper/control", json=dict(patch))

    async def visit(self, visit: Visit) -> list[float]:
        """Run one visit; returns the seconds of its steps that carried exactly its load."""
        await self._cache_prefixes(visit.context_tokens)
        await self._drain(None)
        prompts = [
            [*self._prefixes[row % PREFIXES][: visit.context_tokens], self._token()] for row in range(visit.rows)
        ]
        decode = self._complete(prompts, visit.steps + 1)
        if visit.prefill_tokens:
            await asyncio.gather(decode, self._prefill_beside(visit))
        else:
            await decode
        return await self._drain(visit)

    async def prefill_rate(self, tokens: int) -> float:
        """Prompt tokens per second, from the second of two prompts of `tokens` tokens."""
        for _ in range(2):
            start_s = time.monotonic()
            await self._complete([self._prompt(tokens)], 1)
        return tokens / (time.monotonic() - start_s)

    async def _prefill_beside(self, visit: Visit) -> None:
        """Send new prompts into the decode: not into its first step, whose latency an engine cannot tell."""
        for _ in range(PROMPTS_PER_VISIT):
            await asyncio.sleep(STEPS_BETWEEN_PROMPTS * self._step_s)
            await self._complete([self._prompt(visit.prefill_tokens)], 1)

    def samples(self) -> Samples:
        """Everything measured so far. Raises `ConfigError` if there is nothing."""
        if not self.records.cell:
            raise ConfigError("calibration saw no clean step; was the server interrupted?")
        load = np.array(self.records.load, dtype=np.int64)
        return Samples(
            rows=load[:, 0],
            context_tokens=load[:, 1],
            prefill_tokens=load[:, 2],
            measured_s=np.array(self.records.measured_s),
            cell=np.array(self.records.cell, dtype=np.int64),
        )

    async def _cache_prefixes(self, tokens: int) -> None:
        """Make every prefix at least this long and prefill it, one after the other: whole chunks are samples too."""
        for prefix in self._prefixes:
            if len(prefix) < tokens:
                prefix.extend(self._prompt(tokens - len(prefix)))
                await self._complete([[*prefix, self._token()]], 1)

    async def _drain(self, visit: Visit | None) -> list[float]:
        """Take over the engine's step records; those with the visit's own load go into its cell."""
        cell = -1
        if visit is not None and not visit.prefill_tokens:
            cell = self._cells.setdefault((visit.rows, visit.context_tokens), len(self._cells))
        measured = []
        for engine in (await self._call("GET", "/v1/taper/steps"))["engines"]:
            for record in engine:
                seconds = record["measured_s"]
                if record["ending"] == "ignored" or seconds is None or seconds <= 0:
                    continue
                load = (record["rows"], record["context_tokens"], record["prefill_tokens"])
                meant = visit is not None and cell >= 0 and load[0] == visit.rows and load[2] == 0
                self.records.load.append(load)
                self.records.measured_s.append(seconds)
                self.records.cell.append(cell if meant else -1)
                if meant:
                    measured.append(seconds)
        if measured:
            self._step_s = float(np.median(measured))
        return measured

    async def _complete(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """One request per prompt, each generating exactly `tokens` tokens."""
        body = {
            "model": await self._served_model(),
            "prompt": list(prompts),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        await self._call("POST", "/v1/completions", json=body)

    async def _served_model(self) -> str:
        if self._model is None:
            self._model = str((await self._call("GET", "/v1/models"))["data"][0]["id"])
        return self._model

    async def _call(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            return answer_of(await self._http.request(method, path, **kwargs))
        except httpx.TransportError as error:
            raise ServerError(f"{method} {path}: {error or type(error).__name__}") from error

    def _prompt(self, tokens: int) -> list[int]:
        return [self._token() for _ in range(tokens)]

    def _token(self) -> int:
        return self._random.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID)

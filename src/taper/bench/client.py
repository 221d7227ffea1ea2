"""The open-loop client: the stock AsyncOpenAI client, streaming, one record per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import openai

from taper.bench.stream import StreamReader
from taper.core.types import Slo
from taper.records import RequestRecord
from taper.workload.mix import RequestSpec

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What a request needs besides its shape."""

    policy: str
    round: int
    slo: Slo
    judge_ttft: bool = False
    scheduled_s: float
    deadline_s: float  # on the client's clock; whatever is not finished by then is a time-out
    cache_salt: str | None = None  # keeps one window's prompts out of the next one's prefix cache


class LoadClient:
    """Sends requests and times what comes back. Never raises for a request: a failure is a record.

    `vllm_extensions` asks vLLM for token ids and exact lengths; without it any OpenAI-compatible server does.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str = "none",
        vllm_extensions: bool = True,
        temperature: float = 0.8,
        clock: Clock = time.monotonic,
    ) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            max_retries=0,
            timeout=3600.0,
            # A proxy of the environment is for the world outside, not for a server on this machine.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(base_url)),
        )
        self._model = model
        self._vllm = vllm_extensions
        self._temperature = temperature
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    @property
    def clock(self) -> Clock:
        return self._clock

    async def run(self, spec: RequestSpec, sending: Sending) -> RequestRecord:
        """Send one request and follow it to its last token, its failure or its deadline."""
        reader = StreamReader()
        sent_s = self._clock()
        error: str | None = None
        try:
            async with asyncio.timeout(max(0.0, sending.deadline_s - sent_s)):
                await self._stream(spec, sending, reader)
        except TimeoutError:
            error = f"time-out: not finished {sending.deadline_s - sent_s:.1f} s after it was sent"
        except openai.APIStatusError as failure:
            error = f"http {failure.status_code}: {_one_line(failure.message)}"
        except openai.APIError as failure:
            error = f"connection: {_one_line(str(failure))}"
        except Exception as failure:  # whatever the transport raises while the body is read
            error = f"connection: {type(failure).__name__}: {_one_line(str(failure))}"
        return self._record(spec, sending, reader, sent_s, error or _stream_error(spec, reader))

    async def _stream(self, spec: RequestSpec, sending: Sending, reader: StreamReader) -> None:
        async with self._openai.chat.completions.with_streaming_response.create(
            model=self._model,
            messages=[{"role": "user", "content": spec.prompt}],
            n=spec.branches,
            max_tokens=spec.max_tokens,
            temperature=self._temperature,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._extensions(spec, sending),
        ) as response:
            clock = self._clock
            async for data in response.iter_bytes():
                reader.feed(data, clock())

    def _extensions(self, spec: RequestSpec, sending: Sending) -> dict[str, Any]:
        if not self._vllm:
            return {}
        fields: dict[str, Any] = {"ignore_eos": True, "min_tokens": spec.max_tokens, "return_token_ids": True}
        if sending.cache_salt:
            fields["cache_salt"] = sending.cache_salt
        return fields

    def _record(
        self, spec: RequestSpec, sending: Sending, reader: StreamReader, sent_s: float, error: str | None
    ) -> RequestRecord:
        return RequestRecord(
            id=f"{sending.policy}-{sending.round}-{spec.index}",
            policy=sending.policy,
            round=sending.round,
            seed=spec.seed,
            index=spec.index,
            kind=spec.kind,
            branches=spec.branches,
            prompt_tokens=reader.prompt_tokens,
            scheduled_s=sending.scheduled_s,
            sent_s=sent_s,
            ended_s=self._clock(),
            tpot_slo_s=sending.slo.tpot_s,
            ttft_slo_s=sending.slo.ttft_s if sending.judge_ttft else None,
            choices=reader.choices(),
            error=error,
        )


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _stream_error(spec: RequestSpec, reader: StreamReader) -> str | None:
    """A stream that ended without an exception may still have failed."""
    if reader.error:
        return f"stream: {_one_line(reader.error)}"
    if reader.finished_branches() < spec.branches:
        return f"stream: ended with {reader.finished_branches()} of {spec.branches} branches finished"
    return None


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

"""The open-loop client: the stock AsyncOpenAI client, streaming, one record per request.

A request's stages are played one after the other. A serial stage is one call, an arrival fork one call with n > 1,
any other fork one call per branch; all calls of such a request carry one `taper_group`, so the server takes them for
branches of one request, and the client joins them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import openai

from taper.bench.dialogue import Call, ChatDialogue, Dialogue, DialogueName, TokenDialogue, calls_of
from taper.bench.stream import StreamReader
from taper.claims import MS_PER_S, TPOT_FIELD
from taper.core.types import Slo
from taper.records import ChoiceRecord, RequestRecord
from taper.workload.request import Request

Clock = Callable[[], float]
# A connection of its own for each call, as independent clients have it: a server closes what was idle for some seconds
# (vLLM: 5), and a call that takes a kept connection at that moment fails.
NO_KEEP_ALIVE = {"Connection": "close"}
_DIALOGUES: dict[DialogueName, Callable[[Request], Dialogue]] = {"chat": ChatDialogue, "tokens": TokenDialogue}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What a request needs besides its shape."""

    policy: str
    round: int
    slo: Slo
    judge_ttft: bool = False
    claim_slo: bool = False  # tell the server the request's own SLO: where not all have the same
    scheduled_s: float
    deadline_s: float  # on the client's clock; whatever is not finished by then is a time-out
    cache_salt: str | None = None  # keeps one window's prompts out of the next one's prefix cache
    window: str = ""  # of a sweep; goes into the record


@dataclass(slots=True)
class _Played:
    """What became of a request so far."""

    choices: list[ChoiceRecord] = field(default_factory=list)
    prompt_tokens: int = 0  # of the first stage, as the server counted
    error: str | None = None


class LoadClient:
    """Sends requests and times what comes back. Never raises for a request: a failure is a record.

    `vllm_extensions` asks vLLM for token ids and exact lengths; without it any OpenAI-compatible server does.
    `dialogue` is how prompts are put: "tokens" (exact lengths, vLLM's completions) or "chat" (any server).
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str = "none",
        vllm_extensions: bool = True,
        dialogue: DialogueName = "chat",
        temperature: float = 0.8,
        clock: Clock = time.monotonic,
    ) -> None:
        self._openai = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            max_retries=0,
            timeout=3600.0,
            default_headers=NO_KEEP_ALIVE,
            # A proxy of the environment is for the world outside, not for a server on this machine.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(base_url)),
        )
        self._model = model
        self._vllm = vllm_extensions
        self._dialogue = dialogue
        self._temperature = temperature
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    @property
    def base_url(self) -> str:
        return str(self._openai.base_url)

    @property
    def clock(self) -> Clock:
        return self._clock

    async def run(self, request: Request, sending: Sending) -> RequestRecord:
        """Play one request to its last token, its failure or its deadline."""
        played = _Played()
        readers: list[tuple[StreamReader, int, int]] = []  # with stage and first branch, of the stage under way
        sent_s = self._clock()
        try:
            async with asyncio.timeout(max(0.0, sending.deadline_s - sent_s)):
                await self._play(request, sending, played, readers)
        except TimeoutError:
            played.error = f"time-out: not finished {sending.deadline_s - sent_s:.1f} s after it was sent"
        for reader, stage, first in readers:
            played.choices += reader.choices(stage=stage, first=first)
        return self._record(request, sending, played, sent_s)

    def unsent(self, request: Request, sending: Sending, *, error: str) -> RequestRecord:
        """The record of a request that is given up now, before it is sent."""
        return self._record(request, sending, _Played(error=error), self._clock())

    async def _play(
        self, request: Request, sending: Sending, played: _Played, readers: list[tuple[StreamReader, int, int]]
    ) -> None:
        dialogue = _DIALOGUES[self._dialogue](request)
        last = len(request.stages) - 1
        first_branch = 0
        for number, stage in enumerate(request.stages):
            calls = calls_of(stage, is_first=number == 0)
            readers[:] = [(StreamReader(keep=number < last), number, first_branch + call.first) for call in calls]
            extensions = self._extensions(request, sending, grouped=last > 0 or len(calls) > 1)
            errors = await asyncio.gather(
                *(
                    self._call(dialogue, call, extensions, reader)
                    for call, (reader, _, _) in zip(calls, readers, strict=True)
                )
            )
            if number == 0:
                played.prompt_tokens = readers[0][0].prompt_tokens
            played.error = next((error for error in errors if error), None)
            if played.error or number == last:
                return
            said = [
                (call, reader.outputs[branch])
                for call, (reader, _, _) in zip(calls, readers, strict=True)
                for branch in range(call.branches)
            ]
            for reader, at, first in readers:
                played.choices += reader.choices(stage=at, first=first)
            readers.clear()
            if self._dialogue == "tokens" and not all(output.token_ids for _, output in said):
                played.error = "stream: the server sends no token ids to go on from; use the chat dialogue"
                return
            dialogue.join(said)
            first_branch += len(stage)

    async def _call(
        self, dialogue: Dialogue, call: Call, extensions: dict[str, Any], reader: StreamReader
    ) -> str | None:
        """One call to its end; returns what went wrong. A time-out is the caller's."""
        try:
            await self._stream(dialogue, call, extensions, reader)
        except openai.APIStatusError as failure:
            return f"http {failure.status_code}: {_one_line(failure.message)}"
        except openai.APIError as failure:
            return f"connection: {_one_line(f'{failure}{_cause(failure)}')}"
        except Exception as failure:  # whatever the transport raises while the body is read
            return f"connection: {type(failure).__name__}: {_one_line(str(failure))}"
        return _stream_error(call, reader)

    async def _stream(self, dialogue: Dialogue, call: Call, extensions: dict[str, Any], reader: StreamReader) -> None:
        endpoint: Any = self._openai.chat.completions if self._dialogue == "chat" else self._openai.completions
        exact = {"min_tokens": call.max_tokens} if self._vllm else {}
        async with endpoint.with_streaming_response.create(
            model=self._model,
            n=call.branches,
            max_tokens=call.max_tokens,
            temperature=self._temperature,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={**extensions, **exact},
            **dialogue.body(call),
        ) as response:
            clock = self._clock
            async for data in response.iter_bytes():
                reader.feed(data, clock())

    def _extensions(self, request: Request, sending: Sending, *, grouped: bool) -> dict[str, Any]:
        if not self._vllm:
            return {}
        fields: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        if sending.cache_salt:
            fields["cache_salt"] = sending.cache_salt
        claims: dict[str, Any] = {}
        if grouped:
            claims["taper_group"] = f"{sending.policy}-{sending.cache_salt or sending.round}-{request.index}"
        if sending.claim_slo:
            claims[TPOT_FIELD] = sending.slo.tpot_s * request.slo_factor * MS_PER_S
        if claims:
            fields["vllm_xargs"] = claims
        return fields

    def _record(self, request: Request, sending: Sending, played: _Played, sent_s: float) -> RequestRecord:
        return RequestRecord(
            id=f"{sending.policy}-{sending.round}-{request.index}",
            policy=sending.policy,
            round=sending.round,
            seed=request.seed,
            index=request.index,
            kind=request.kind,
            branches=request.branches,
            prompt_tokens=played.prompt_tokens,
            scheduled_s=sending.scheduled_s,
            sent_s=sent_s,
            ended_s=self._clock(),
            tpot_slo_s=sending.slo.tpot_s * request.slo_factor,
            ttft_slo_s=sending.slo.ttft_s if sending.judge_ttft else None,
            choices=tuple(played.choices),
            error=played.error,
            window=sending.window,
        )


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _stream_error(call: Call, reader: StreamReader) -> str | None:
    """A stream that ended without an exception may still have failed."""
    if reader.error:
        return f"stream: {_one_line(reader.error)}"
    if reader.finished_branches() < call.branches:
        return f"stream: ended with {reader.finished_branches()} of {call.branches} branches finished"
    return None


def _cause(failure: openai.APIError) -> str:
    """What the client's "Connection error." leaves out."""
    cause = failure.__cause__
    return f" {type(cause).__name__}: {cause}" if cause else ""


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"

"""`Taper` and `AsyncTaper`: programs over an `openai` client, with its address, key, retries and time-outs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from taper.client.types import EVENTS, Branch, Event, Join, Message, Program, ProgramFailed, to_json

_PATH = "/taper/programs"


def by_protocol(protocol: str, *, order: str = "outline", **fields: Any) -> dict[str, Any]:
    """`extra_body` for a chat completion that follows a protocol in the model's own output.

    order: "outline" for one ordered answer, "interleaved" for chunks as they come, each with its branch's id.
    fields: options, budget, on_branch_error, opening_regex (see docs/programs.md).
    """
    return {"taper": {"protocol": protocol, "order": order, **fields}}


class _Requests:
    """What both clients send."""

    @staticmethod
    def body(
        branches: Sequence[Branch | str], join: Join | None, stream: bool, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        parts = [Branch(suffix=branch) if isinstance(branch, str) else branch for branch in branches]
        fields = {"branches": parts, "join": join, "stream": stream, **given}
        body: dict[str, Any] = to_json({name: value for name, value in fields.items() if value is not None})
        return body

    @staticmethod
    def checked(answer: object) -> Program:
        program = Program.model_validate(answer)
        if program.status == "failed":
            raise ProgramFailed(program=program)
        return program


class Taper:
    """Fork and join over a client of a TAPER server.

        taper = Taper(openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"))
        program = taper.fork(prompt="...", branches=["\\nFirst:", "\\nSecond:"])

    Both calls take `messages` or `prompt`; `lead` (what to say before the fork); `model`; `budget`,
    `on_branch_error`, `vllm_xargs`; and sampling parameters that hold for all branches. A branch may be given as its
    suffix alone. Errors are `openai`'s for a program that the server refuses (BadRequestError), and `ProgramFailed`,
    with what there is, for one that fails on its way.
    """

    def __init__(self, client: OpenAI) -> None:
        self._client = client

    def fork(
        self,
        branches: Sequence[Branch | str],
        *,
        join: Join | None = None,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        **fields: Any,
    ) -> Program:
        """Run all branches, join them if told to, and return when all is said."""
        body = _Requests.body(branches, join, False, {"messages": messages, "prompt": prompt, **fields})
        return _Requests.checked(self._client.post(_PATH, body=body, cast_to=object))

    def stream(
        self,
        branches: Sequence[Branch | str],
        *,
        join: Join | None = None,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        **fields: Any,
    ) -> Iterator[Event]:
        """The same as typed events while it runs. Closing the iterator ends the program on the server."""
        body = _Requests.body(branches, join, True, {"messages": messages, "prompt": prompt, **fields})
        with self._client.post(_PATH, body=body, cast_to=object, stream=True, stream_cls=Stream[object]) as events:
            for event in events:
                yield EVENTS.validate_python(event)


class AsyncTaper:
    """`Taper` for `openai.AsyncOpenAI`; the same arguments and errors."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client

    async def fork(
        self,
        branches: Sequence[Branch | str],
        *,
        join: Join | None = None,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        **fields: Any,
    ) -> Program:
        body = _Requests.body(branches, join, False, {"messages": messages, "prompt": prompt, **fields})
        return _Requests.checked(await self._client.post(_PATH, body=body, cast_to=object))

    async def stream(
        self,
        branches: Sequence[Branch | str],
        *,
        join: Join | None = None,
        messages: Sequence[Message] | None = None,
        prompt: str | None = None,
        **fields: Any,
    ) -> AsyncIterator[Event]:
        body = _Requests.body(branches, join, True, {"messages": messages, "prompt": prompt, **fields})
        async with await self._client.post(
            _PATH, body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        ) as events:
            async for event in events:
                yield EVENTS.validate_python(event)

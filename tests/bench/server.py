"""A small HTTP server that streams like an OpenAI-compatible engine: real sockets, scripted tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
Script = Callable[[Body], AsyncIterator[bytes]]


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def token(index: int, ids: list[int], finish: str | None = None) -> bytes:
    return event({"choices": [{"index": index, "delta": {"content": "x"}, "finish_reason": finish, "token_ids": ids}]})


async def steady(body: Body) -> AsyncIterator[bytes]:
    """vLLM's shape: a role event per choice, then one token per choice and step, then usage."""
    n, length = body["n"], body["max_tokens"]
    for index in range(n):
        yield event({"choices": [{"index": index, "delta": {"role": "assistant", "content": ""}}]})
    for step in range(length):
        await asyncio.sleep(0.002)
        last = "length" if step == length - 1 else None
        yield b"".join(token(index, [step], last) for index in range(n))
    yield event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": n * length}})
    yield b"data: [DONE]\n\n"


@dataclass
class FakeEngine:
    """What the server was asked, and what it answers."""

    script: Script = steady
    status: int = 200
    message: str = "no room\nat all"  # of an error
    requests: list[Body] = field(default_factory=list)
    patches: list[Body] = field(default_factory=list)
    policy: str = "taper"
    tires: bool = False  # closes a kept connection just when the next request comes in, as idle timers do
    in_service: int = 0
    peak: int = 0

    def snapshot(self) -> Body:
        return {
            "policy": self.policy,
            "step": {"rows": 5, "protected": 3, "extra": 2, "deferred": 4, "held": 0, "slack_min_s": 0.004},
            "window": {"planner_p99_s": 0.0001, "predictor_mape": 0.03, "fallbacks": 0},
            "tables": {"groups": self.in_service},
        }

    async def control(self, method: str, path: str, body: Body) -> tuple[int, Body]:
        if path == "/v1/taper/control":
            if body.get("policy") == "nonsense":
                return 400, {"error": {"message": "policy 'nonsense' is unknown"}}
            self.patches.append(body)
            self.policy = body.get("policy", self.policy)
        if path == "/v1/taper/steps":
            now_s = asyncio.get_running_loop().time()
            step = {"time_s": now_s - 0.05, "rows": 4, "extra": 1, "deferred": 2, "measured_s": 0.02}
            return 200, {"engines": [[step, {**step, "time_s": now_s - 1e6}]]}
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "max_model_len": 512}]}
        return 200, {"engines": [self.snapshot()]}


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[str]:
    """Yield the base address of a running server."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await _exchange(engine, reader, writer):
                if engine.tires:
                    await reader.readuntil(b"\r\n\r\n")
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.close()


async def _exchange(engine: FakeEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, path, _ = head.split(" ", 2)
    length = next(
        (int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length:")),
        0,
    )
    body = json.loads(await reader.readexactly(length)) if length else {}
    if path not in ("/v1/chat/completions", "/v1/completions"):
        await _answer(writer, *await engine.control(method, path, body))
        return True
    engine.requests.append(body)
    if engine.status != 200:
        await _answer(writer, engine.status, {"error": {"message": engine.message}})
        return True
    engine.in_service += 1
    engine.peak = max(engine.peak, engine.in_service)
    try:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        async for data in engine.script(body):
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    finally:
        engine.in_service -= 1
    return True


async def _answer(writer: asyncio.StreamWriter, status: int, body: Body) -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()

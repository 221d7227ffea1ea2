"""The client against a real socket: what it sends, what it times, and how it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from taper.bench.client import LoadClient, Sending, is_loopback
from taper.core.types import Slo
from taper.records import RequestRecord
from taper.workload.mix import RequestSpec
from tests.bench.server import Body, FakeEngine, event, serving, token

SPEC = RequestSpec(seed=3, index=7, kind="branching", branches=3, max_tokens=4, prompt="Hello")


def run(engine: FakeEngine, *, timeout_s: float = 60.0, vllm: bool = True) -> RequestRecord:
    async def session() -> RequestRecord:
        async with (
            serving(engine) as url,
            LoadClient(base_url=f"{url}/v1", model="m", vllm_extensions=vllm) as client,
        ):
            now_s = time.monotonic()
            sending = Sending(
                policy="taper",
                round=2,
                slo=Slo(tpot_s=0.05),
                scheduled_s=now_s - 1.0,
                deadline_s=now_s + timeout_s,
                cache_salt="salt",
            )
            return await client.run(SPEC, sending)

    return asyncio.run(session())


def test_a_request_and_its_record() -> None:
    engine = FakeEngine()
    record = run(engine)
    assert record.error is None
    assert (record.id, record.policy, record.round, record.seed, record.index) == (
        "taper-2-7",
        "taper",
        2,
        3,
        7,
    )
    assert [choice.tokens for choice in record.choices] == [4, 4, 4]
    assert [len(choice.gaps_ms) for choice in record.choices] == [3, 3, 3]
    assert record.prompt_tokens == 11
    assert record.ttft_slo_s is None
    assert record.sent_s - record.scheduled_s == pytest.approx(1.0, abs=3.0)
    assert record.first_token_s is not None
    assert record.last_token_s is not None
    assert record.sent_s < record.first_token_s < record.last_token_s <= record.ended_s
    (body,) = engine.requests
    wanted = {
        "model": "m",
        "n": 3,
        "max_tokens": 4,
        "min_tokens": 4,
        "ignore_eos": True,
        "stream": True,
        "cache_salt": "salt",
        "messages": [{"role": "user", "content": "Hello"}],
    }
    assert {key: body[key] for key in wanted} == wanted


def test_without_vllm_extensions_nothing_foreign_is_sent() -> None:
    engine = FakeEngine()
    assert run(engine, vllm=False).error is None
    assert not {"ignore_eos", "min_tokens", "return_token_ids", "cache_salt"} & engine.requests[0].keys()


def test_a_refusal_is_a_record_with_its_cause_on_one_line() -> None:
    record = run(FakeEngine(status=503))
    assert record.error is not None
    assert record.error.startswith("http 503: ")
    assert "\n" not in record.error
    assert record.choices == ()


async def stalling(body: Body) -> AsyncIterator[bytes]:
    yield token(0, [1]) + token(1, [1])
    await asyncio.sleep(30)


def test_a_time_out_keeps_what_came() -> None:
    record = run(FakeEngine(script=stalling), timeout_s=3.0)
    assert record.error is not None
    assert record.error.startswith("time-out")
    assert record.tokens == 2


async def short(body: Body) -> AsyncIterator[bytes]:
    yield token(0, [1], "stop") + token(1, [1])
    yield b"data: [DONE]\n\n"


def test_a_stream_that_ends_early_is_a_failure() -> None:
    assert run(FakeEngine(script=short)).error == "stream: ended with 1 of 3 branches finished"


async def failing(body: Body) -> AsyncIterator[bytes]:
    yield token(0, [1])
    yield event({"error": {"message": "engine dead"}})


def test_an_error_event_is_a_failure() -> None:
    assert run(FakeEngine(script=failing)).error == "stream: engine dead"


async def breaking(body: Body) -> AsyncIterator[bytes]:
    yield token(0, [1])
    raise ConnectionResetError


def test_a_broken_connection_is_a_failure() -> None:
    record = run(FakeEngine(script=breaking))
    assert record.error is not None
    assert record.error.startswith("connection: ")
    assert record.tokens == 1


def test_nobody_listens() -> None:
    async def session() -> RequestRecord:
        async with LoadClient(base_url="http://127.0.0.1:9/v1", model="m") as client:
            now_s = time.monotonic()
            sending = Sending(policy="p", round=0, slo=Slo(), scheduled_s=now_s, deadline_s=now_s + 5)
            return await client.run(SPEC, sending)

    error = asyncio.run(session()).error
    assert error is not None
    assert error.startswith("connection: ")


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:1/", True),
        ("https://example.org/v1", False),
    ],
)
def test_loopback(url: str, local: bool) -> None:
    assert is_loopback(url) is local

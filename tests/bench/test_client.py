"""The client against a real socket: what it sends, what it times, and how it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from taper.bench.client import LoadClient, Sending, is_loopback
from taper.bench.dialogue import DialogueName
from taper.core.types import Slo
from taper.records import RequestRecord
from taper.workload import Request
from taper.workload.prompts import prompt_ids
from tests.bench.server import Body, FakeEngine, event, serving, steady, token

SPEC = Request(seed=3, index=7, arrival_s=0.0, prompt_tokens=20, stages=((4, 4, 4),))


def run(
    engine: FakeEngine,
    *,
    timeout_s: float = 60.0,
    vllm: bool = True,
    request: Request = SPEC,
    dialogue: DialogueName = "chat",
) -> RequestRecord:
    async def session() -> RequestRecord:
        async with (
            serving(engine) as url,
            LoadClient(base_url=f"{url}/v1", model="m", vllm_extensions=vllm, dialogue=dialogue) as client,
        ):
            now_s = time.monotonic()
            sending = Sending(
                policy="taper",
                round=2,
                slo=Slo(tpot_s=0.05),
                scheduled_s=now_s - 1.0,
                deadline_s=now_s + timeout_s,
                cache_salt="salt",
                claim_slo=request.slo_factor != 1.0,
            )
            return await client.run(request, sending)

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
    await asyncio.sleep(3600)


def test_a_time_out_keeps_what_came() -> None:
    record = run(FakeEngine(script=stalling), timeout_s=8.0)
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
            sending = Sending(policy="p", round=0, slo=Slo(), scheduled_s=now_s, deadline_s=now_s + 60)
            return await client.run(SPEC, sending)

    error = asyncio.run(session()).error
    assert error is not None
    assert error.startswith("connection: ")
    assert "ConnectError" in error


def test_a_server_that_closes_idle_connections_costs_no_request() -> None:
    """By its timer it does so at the very moment at which the next stage would take one."""
    engine = FakeEngine(tires=True)
    staged = Request(seed=3, index=7, arrival_s=0.0, prompt_tokens=20, stages=((4,),) * 3)
    assert run(engine, request=staged).error is None
    assert len(engine.requests) == 3


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


STAGED = Request(seed=3, index=7, arrival_s=0.0, prompt_tokens=20, stages=((2,), (3, 5), (4,)), slo_factor=2.0)


@pytest.mark.parametrize("dialogue", ["tokens", "chat"])
def test_stages_are_played_one_after_the_other_as_one_group(dialogue: DialogueName) -> None:
    engine = FakeEngine()
    record = run(engine, request=STAGED, dialogue=dialogue)
    assert record.error is None
    assert [(choice.index, choice.stage, choice.tokens) for choice in record.choices] == [
        (0, 0, 2),
        (1, 1, 3),
        (2, 1, 5),
        (3, 2, 4),
    ]
    assert (record.branches, record.kind, record.tpot_slo_s) == (2, "branching", 0.1)
    assert [(body["n"], body["max_tokens"]) for body in engine.requests] == [(1, 2), (1, 3), (1, 5), (1, 4)]
    (claims,) = {tuple(sorted(body["vllm_xargs"].items())) for body in engine.requests}
    assert claims == (("taper_group", "taper-salt-7"), ("taper_tpot_slo_ms", 100.0))


def test_a_fork_shares_its_prefix_and_a_join_takes_the_longest_branch_first() -> None:
    engine = FakeEngine()
    run(engine, request=STAGED, dialogue="tokens")
    first, short, long, last = (body["prompt"] for body in engine.requests)
    assert first == prompt_ids(STAGED)
    assert short == [*first, 0, 1, 1000]  # the fake engine says 0, 1, 2, ...; then the header of branch 0
    assert long == [*first, 0, 1, 1001]
    assert last == [*long, 0, 1, 2, 3, 4, 1000, 0, 1, 2]


def test_an_arrival_fork_of_unequal_branches_is_a_call_per_branch() -> None:
    engine = FakeEngine()
    request = Request(seed=3, index=7, arrival_s=0.0, prompt_tokens=5, stages=((2, 3),))
    assert run(engine, request=request, dialogue="tokens").tokens == 5
    assert [body["n"] for body in engine.requests] == [1, 1]
    assert {body["vllm_xargs"]["taper_group"] for body in engine.requests} == {"taper-salt-7"}


def test_a_fork_of_equal_branches_at_arrival_is_joined_too() -> None:
    engine = FakeEngine()
    request = Request(seed=3, index=7, arrival_s=0.0, prompt_tokens=5, stages=((2, 2), (1,)))
    assert run(engine, request=request, dialogue="tokens").error is None
    assert engine.requests[1]["prompt"] == [*prompt_ids(request), 0, 1, 0, 1]


async def second_call_fails(body: Body) -> AsyncIterator[bytes]:
    if len(body["prompt"]) > STAGED.prompt_tokens:
        yield event({"error": {"message": "engine dead"}})
        return
    async for data in steady(body):
        yield data


def test_a_stage_that_fails_ends_the_request_and_keeps_what_came() -> None:
    record = run(FakeEngine(script=second_call_fails), request=STAGED, dialogue="tokens")
    assert record.error == "stream: engine dead"
    assert [(choice.stage, choice.tokens) for choice in record.choices] == [(0, 2)]


async def without_ids(body: Body) -> AsyncIterator[bytes]:
    yield event({"choices": [{"index": 0, "text": "word", "finish_reason": "length"}]})


def test_a_token_dialogue_needs_token_ids() -> None:
    record = run(FakeEngine(script=without_ids), request=STAGED, dialogue="tokens")
    assert record.error == "stream: the server sends no token ids to go on from; use the chat dialogue"

"""Routes, the switch in front of the chat route, and the client, over ASGI with a stand-in engine."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from taper.client import (
    AsyncTaper,
    Branch,
    BranchDelta,
    BranchEnded,
    BranchJoined,
    BranchStarted,
    Continuation,
    Fork,
    Join,
    Lead,
    ProgramDone,
    ProgramFailed,
    ProgramStarted,
    Taper,
    by_protocol,
)
from taper.config import ServerConfig
from taper.engines.vllm.programs import ChatSwitch, ProgramMetrics
from taper.engines.vllm.terms import Terms
from taper.forkjoin.routes import CHAT_PATH, ProgramRoutes
from taper.forkjoin.service import COUNTS
from taper.forkjoin.wire import ASKS_NOTHING
from tests.forkjoin.test_run import multiverse
from tests.forkjoin.toy import ToyEngine

CHAT = [{"role": "user", "content": "Q"}]


def application(engine, *, is_served=True):
    app = FastAPI()
    routes = ProgramRoutes(ServerConfig(), Terms(ServerConfig()).slo)

    async def stock(body: dict):
        return {"stock": sorted(body)}

    app.add_api_route("/v1/chat/completions", stock, methods=["POST"])
    routes.attach_router(app)
    app.add_middleware(ChatSwitch, path=CHAT_PATH)
    if is_served:
        app.state.registry = CollectorRegistry()
        app.state.service = routes.serve(engine, ProgramMetrics(COUNTS, app.state.registry, model="toy").add)
    return app


def post(app, path, body):
    return TestClient(app).post(path, json=body)


def sync_client(app):
    return openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="none",
        max_retries=0,
        http_client=TestClient(app, base_url="http://testserver/v1"),
    )


def async_client(app):
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


ANSWER = (
    "So.<Goal><Outline> 1: a</Outline><Outline> 2: b</Outline></Goal>"
    "\n<Path>\n1: one</Path>\n<Path>\n2: second</Path>\n<Conclusion>\nDone."
)


def test_the_stock_client_follows_a_protocol():
    client = sync_client(application(ToyEngine(multiverse)))
    answer = client.chat.completions.create(model="toy", messages=CHAT, extra_body=by_protocol("multiverse"))
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == answer.usage.total_tokens - 4
    assert answer.usage.taper["branch_tokens"] == len(" one</Path> second")
    assert [branch["label"] for branch in answer.taper["branches"]] == ["", "1", "2"]


def test_the_stock_client_streams_one_ordered_answer():
    client = sync_client(application(ToyEngine(multiverse)))
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=CHAT,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=by_protocol("multiverse"),
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.taper["join_tokens"] > 0


def test_interleaved_chunks_carry_their_branch():
    client = sync_client(application(ToyEngine(multiverse)))
    texts: dict[str, str] = {}
    for chunk in client.chat.completions.create(
        model="toy", messages=CHAT, stream=True, extra_body=by_protocol("multiverse", order="interleaved")
    ):
        branch = (chunk.taper or {}).get("branch")
        texts[branch] = texts.get(branch, "") + (chunk.choices[0].delta.content or "")
    assert texts["0.1"] == "\n<Path>\n1: one</Path>"
    assert texts["0.2"] == "\n<Path>\n2: second</Path>"
    assert texts["0"].endswith("\n<Conclusion>\nDone.")


def test_an_interleaved_stream_tells_the_outline_apart_from_the_answer():
    client = sync_client(application(ToyEngine(lambda prompt: "1. a b\n2. c d" if "outline of" in prompt else " x")))
    extra = by_protocol("skeleton-of-thought", order="interleaved")
    chunks = list(client.chat.completions.create(model="toy", messages=CHAT, stream=True, extra_body=extra))
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert sorted(answer) == sorted("1. a b: x\n\n2. c d: x\n\n")
    outline = [chunk.taper["text"] for chunk in chunks if chunk.taper.get("type") == "branch.delta"]
    assert "".join(outline) == "1. a b\n2. c d"


def failing(prompt):
    return "!out of luck" if prompt.endswith("2:") else multiverse(prompt)


def test_a_failed_answer_is_an_error_that_holds_what_there_is():
    client = sync_client(application(ToyEngine(failing)))
    with pytest.raises(
        openai.UnprocessableEntityError, match=r"branch 0\.2 ended with error: RuntimeError: out of luck"
    ) as e:
        client.chat.completions.create(model="toy", messages=CHAT, extra_body=by_protocol("multiverse"))
    assert e.value.body["partial"]["branches"][0]["text"].startswith("So.<Goal>")
    with pytest.raises(openai.APIError, match="the answer is incomplete"):
        list(
            client.chat.completions.create(
                model="toy", messages=CHAT, stream=True, extra_body=by_protocol("multiverse")
            )
        )


@pytest.mark.parametrize("body", [{}, {"taper": None}, {"taper": {"protocol": "off"}}, {"taper_x": 1}])
def test_other_chat_completions_are_left_to_the_server(body):
    answer = post(application(ToyEngine(multiverse)), "/v1/chat/completions", {"messages": CHAT, **body})
    assert answer.json() == {"stock": sorted(["messages", *body])}


def test_an_escaped_name_is_ours_too():
    body = json.dumps({"messages": CHAT, "taper": {"protocol": "multiverse"}}).replace('"taper"', '"t\\u0061per"')
    client = TestClient(application(ToyEngine(multiverse)))
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"taper": {"protocol": "nope"}}, 400, "taper.protocol must be one of"),
        ({"taper": {"protocol": "multiverse", "speed": 1}}, 422, "Extra inputs are not permitted"),
        ({"taper": "multiverse"}, 422, "taper"),
        ({"taper": {"protocol": "multiverse"}, "tools": []}, 422, "tools"),
        ({"taper": {"protocol": "multiverse"}, "n": 2}, 422, "n"),
        ({"taper": {"protocol": "multiverse"}, "model": "other"}, 404, "model must be one of toy, not 'other'"),
        ({"taper": {"protocol": "multiverse"}, "vllm_xargs": {"taper_priority": 5}}, 400, "taper_priority"),
        ({"taper": {"protocol": "multiverse"}, "messages": [{"role": "clown", "content": "x"}]}, 400, "no clowns"),
        (
            {"taper": {"protocol": "multiverse"}, "messages": [{"role": "user", "content": "x" * 1000}]},
            400,
            "1003 tokens",
        ),
    ],
)
def test_bad_requests(body, status, words):
    engine = ToyEngine(multiverse)
    answer = post(application(engine), "/v1/chat/completions", {"messages": CHAT, **body})
    assert (answer.status_code, words in answer.text) == (status, True), answer.text
    assert engine.runs == []


class Guard:
    """Refuses everything under /v1, as a server does without its key."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            await PlainTextResponse("no key", status_code=401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


@pytest.mark.parametrize("is_outside", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/taper/chat", "/v1/taper/programs"])
def test_what_guards_v1_guards_all_of_it_on_either_side_of_the_switch(path, is_outside):
    engine = ToyEngine(multiverse)
    app = application(engine)
    app.user_middleware.insert(0 if is_outside else 1, Middleware(Guard))
    body = {"messages": CHAT, "taper": {"protocol": "multiverse"}}
    assert post(app, path, body).status_code == 401
    assert engine.runs == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-data-parallel-rank": "1"}, 200),
        ({"X-data-parallel-rank": "2"}, 400),
        ({"X-data-parallel-rank": "9" * 5000}, 400),
    ],
)
def test_a_program_can_be_pinned_to_a_replica(headers, status):
    engine = ToyEngine(lambda prompt: "x", replicas=2)
    body = {"prompt": "p", "branches": [{}, {}]}
    answer = TestClient(application(engine)).post("/v1/taper/programs", json=body, headers=headers)
    assert answer.status_code == status
    assert [run["replica"] for run in engine.runs] == ([1, 1] if status == 200 else [])


def test_what_a_router_adds_to_a_chat_completion_asks_for_nothing():
    body = {"messages": CHAT, "taper": {"protocol": "multiverse"}}
    app = application(ToyEngine(multiverse))
    assert post(app, "/v1/chat/completions", body | ASKS_NOTHING).status_code == 200
    for name, value in ASKS_NOTHING.items():
        answer = post(app, "/v1/chat/completions", body | {name: not value})
        assert (answer.status_code, name in answer.text) == (422, True)
    assert post(app, "/v1/chat/completions", body | {"logprobs": 0}).status_code == 422


def test_a_server_without_an_engine_says_so():
    app = application(None, is_served=False)
    assert post(app, "/v1/taper/programs", {"prompt": "p", "branches": [{}]}).status_code == 503


def test_totals_and_schema():
    app = application(ToyEngine(multiverse))
    post(app, "/v1/chat/completions", {"messages": CHAT, "taper": {"protocol": "multiverse"}})
    state = TestClient(app).get("/taper/programs").json()
    assert state["live"] == 0
    assert (state["totals"]["complete"], state["totals"]["forked_branches"]) == (1, 2)
    metrics = generate_latest(app.state.registry).decode()
    assert 'taper:program_forked_branches_total{model_name="toy"} 2.0' in metrics
    assert f'taper:program_join_tokens_total{{model_name="toy"}} {float(state["totals"]["join_tokens"])}' in metrics
    schemas = TestClient(app).get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ProgramRequest"]["additionalProperties"] is False
    assert {"ProgramRequest", "ChatRequest", "BranchRequest", "JoinRequest"} <= set(schemas)


def talk(prompt):
    return "!broken" if prompt.endswith("bad:") else f"<{prompt[-2]}>"


JOIN = Join(instruction=" sum:", separator="|", continuation=Continuation(max_tokens=9))


def test_fork_and_join_through_the_client():
    engine = ToyEngine(talk)
    taper = Taper(sync_client(application(engine)))
    program = taper.fork(
        ["a:", Branch(id="B", suffix="b:", max_tokens=2)], prompt="pp", join=JOIN, lead=Lead(max_tokens=1)
    )
    assert engine.runs[-1]["prompt"] == "pp<a:<a>|b:<b| sum:"
    assert (program.status, program.text) == ("complete", "<<m>")
    assert [(branch.label, branch.text) for branch in program.branches] == [("1", "<a>"), ("B", "<b")]
    assert program.usage["taper"]["joins"][0]["branch"] == "0"


def test_nested_forks_through_the_client():
    inner = Fork(
        branches=[Branch(suffix="x:"), Branch(suffix="y:")], join=Join(continuation=Continuation(max_tokens=3))
    )
    taper = Taper(sync_client(application(ToyEngine(talk))))
    program = taper.fork([Branch(max_tokens=0, suffix="in", fork=inner)], prompt="pp", join=Join())
    assert [branch.id for branch in program.branches] == ["0.1", "0.1.1", "0.1.2"]


def test_typed_events_sync_and_async():
    app = application(ToyEngine(talk))
    events = list(Taper(sync_client(app)).stream(["a:"], prompt="pp", join=JOIN))

    async def collect():
        return [event async for event in AsyncTaper(async_client(app)).stream(["a:"], prompt="pp", join=JOIN)]

    again = asyncio.run(collect())
    assert [type(event) for event in events] == [type(event) for event in again]
    kinds = {ProgramStarted, BranchStarted, BranchDelta, BranchJoined, BranchEnded, ProgramDone}
    assert {type(event) for event in events} == kinds
    assert "".join(e.text for e in events if isinstance(e, BranchDelta) and e.branch == "0.1") == "<a>"
    assert (type(events[0]), type(events[-1])) == (ProgramStarted, ProgramDone)


def test_client_errors():
    taper = Taper(sync_client(application(ToyEngine(talk))))
    with pytest.raises(openai.BadRequestError) as refusal:
        taper.fork([Branch(max_tokens=1)] * 17, prompt="pp")
    assert "17 branches at once" in refusal.value.response.text
    with pytest.raises(ProgramFailed, match=r"branch 0\.2 ended with error: RuntimeError: broken") as failure:
        taper.fork(["a:", "bad:"], prompt="pp", join=JOIN)
    assert failure.value.program.branches[0].label == "1"
    partial = taper.fork(["a:", "bad:"], prompt="pp", join=JOIN, on_branch_error="skip")
    assert (partial.status, partial.text) == ("partial", "<m>")

    async def refused():
        return await AsyncTaper(async_client(application(ToyEngine(talk)))).fork(["bad:"], prompt="pp", join=JOIN)

    with pytest.raises(ProgramFailed, match="broken"):
        asyncio.run(refused())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/taper/programs"])
def test_a_client_that_leaves_ends_its_program(path, stream):
    """Straight over ASGI: the body, and a disconnect once its runs speak."""
    engine = ToyEngine(lambda prompt: "~", max_model_tokens=10**6)
    app = application(engine)
    fields = {"prompt": "p", "branches": [{"max_tokens": 30000 // 3}] * 3}
    if "chat" in path:
        fields = {"messages": CHAT, "taper": {"protocol": "hpd"}}
    body = json.dumps({**fields, "stream": stream}).encode()

    async def leave():
        incoming = [{"type": "http.request", "body": body}]

        async def receive():
            if incoming:
                return incoming.pop()
            while not engine.live:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.sleep(0)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "query_string": b"",
            "root_path": "",
        }
        async with asyncio.timeout(60):
            await app(scope, receive, send)
        for _ in range(50):
            await asyncio.sleep(0)
        assert (engine.live, app.state.service.live) == ({}, 0)
        assert app.state.service.totals["left"] == 1
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())
    assert engine.aborted == [engine.runs[0]["id"]]

"""The claims middleware and the routes, over ASGI; engines answer through the client vLLM hands to plugins."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from taper.config import ENV_VAR, ServerConfig
from taper.engines.vllm.middleware import ClaimsMiddleware
from taper.engines.vllm.routes import TaperEndpoints


async def echo(scope, receive, send):
    """Answers with the messages it received: body parts, and whatever comes after the body."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
    scope["after"] = await receive()


def post(path, body, *, method="POST", parts=1):
    """(status, body, messages seen after the body) of one request through the middleware."""
    size = max(len(body) // parts, 1)
    chunks = [body[at : at + size] for at in range(0, max(len(body), 1), size)]
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
        for index, chunk in enumerate(chunks)
    ] + [{"type": "http.disconnect"}]
    sent, scope = [], {"type": "http", "method": method, "path": path, "headers": []}

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(ClaimsMiddleware(echo)(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), scope.get("after")


GOOD = {"taper_group": "g", "taper_tpot_slo_ms": 100, "taper_ttft_slo_ms": 9000, "taper_priority": -1}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("parts", [1, 5])
def test_good_bodies_pass_unchanged_with_the_disconnect_behind_them(path, parts):
    body = json.dumps({"model": "m", "vllm_xargs": GOOD}).encode()
    assert post(path, body, parts=parts) == (200, body, {"type": "http.disconnect"})


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"taper_bogus": 1}, "unknown field 'taper_bogus'"),
        ({"taper_tpot_slo_ms": "50"}, "taper_tpot_slo_ms must be a number"),
        ({"taper_tpot_slo_ms": True}, "taper_tpot_slo_ms must be a number"),
        ({"taper_tpot_slo_ms": 0}, "taper_tpot_slo_ms must be between"),
        ({"taper_ttft_slo_ms": float("nan")}, "taper_ttft_slo_ms must be between"),
        ({"taper_priority": 1e9}, "taper_priority must be between"),
        ({"taper_group": 5}, "taper_group must be a string"),
        ({"taper_group": ""}, "taper_group must be 1 to 128"),
        ({"taper_group": ["a"]}, "taper_group must be a string"),
    ],
)
def test_bad_claims_are_a_400_in_openai_form(xargs, words):
    status, body, after = post("/v1/completions", json.dumps({"model": "m", "vllm_xargs": xargs}).encode())
    error = json.loads(body)["error"]
    assert (status, after) == (400, None)
    assert words in error["message"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_escaped_names_do_not_slip_through():
    body = b'{"vllm_xargs": {"t\\u0061per_bogus": 1}}'
    assert post("/v1/completions", body)[0] == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"taper_x"', b'{"vllm_xargs": "taper_x"}', b'{"taper_bogus": 1}', b"\xff taper_"]
)
def test_what_is_vllms_to_refuse_goes_to_vllm(body):
    assert post("/v1/completions", body) == (200, body, {"type": "http.disconnect"})


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/completions")])
def test_other_routes_are_not_looked_into(method, path):
    body = b'{"vllm_xargs": {"taper_bogus": 1}}'
    assert post(path, body, method=method)[:2] == (200, body)


def test_a_client_that_leaves_in_mid_body_is_seen_leaving():
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])

    incoming = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return incoming.pop(0)

    asyncio.run(ClaimsMiddleware(app)({"type": "http", "method": "POST", "path": "/v1/completions"}, receive, None))
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


class Engines:
    """The engine client's side of a utility call, two engine replicas wide."""

    def __init__(self, answer):
        self.calls = []
        self.answer = answer
        self.core_engines = [0, 1]

    async def _call_utility_async(self, method, *args, engine):
        self.calls.append((engine, method, args))
        return self.answer


def ask(method, path, *, answer=None, config=None, monkeypatch=None, has_engine=True, **kwargs):
    monkeypatch.setenv(ENV_VAR, (config or ServerConfig()).to_json())
    plugin, app, engines = TaperEndpoints(), FastAPI(), Engines(answer)

    async def run():
        plugin.attach_router(app)
        vllm_config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
        engine = SimpleNamespace(engine_core=engines, vllm_config=vllm_config)
        await plugin.init_state(engine if has_engine else None, app.state, SimpleNamespace(api_key=None))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run()), engines.calls


OPEN = ServerConfig(allow_control=True)
TOKEN = ServerConfig(control_token="s3cret")


def test_state_is_open_and_covers_all_replicas(monkeypatch):
    response, calls = ask("GET", "/taper/state", answer={"policy": "taper"}, monkeypatch=monkeypatch)
    assert (response.status_code, response.json()) == (200, {"engines": [{"policy": "taper"}] * 2})
    assert calls == [(0, "taper_snapshot", ()), (1, "taper_snapshot", ())]


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/taper/control"), ("GET", "/v1/taper/steps")])
def test_control_needs_a_right(monkeypatch, method, path):
    for config, headers, status in (
        (None, {}, 403),
        (None, {"X-Taper-Control": ""}, 403),
        (TOKEN, {}, 403),
        (TOKEN, {"X-Taper-Control": "wrong"}, 403),
        (TOKEN, {"X-Taper-Control": "s3cret"}, 200),
        (OPEN, {}, 200),
    ):
        body = {"json": {"policy": "off"}} if method == "POST" else {}
        response, calls = ask(method, path, answer=[], config=config, monkeypatch=monkeypatch, headers=headers, **body)
        assert response.status_code == status
        assert bool(calls) is (status == 200)


def test_a_patch_reaches_every_replica(monkeypatch):
    patch = {"policy": "off", "tpot_slo_s": 0.1}
    response, calls = ask("POST", "/v1/taper/control", answer={}, config=OPEN, monkeypatch=monkeypatch, json=patch)
    assert response.status_code == 200
    assert calls == [(engine, "taper_configure", (patch,)) for engine in (0, 1)]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
def test_a_patch_that_is_no_object_is_a_400(monkeypatch, body):
    response, calls = ask("POST", "/v1/taper/control", config=OPEN, monkeypatch=monkeypatch, content=body)
    assert (response.status_code, calls) == (400, [])
    assert response.json()["error"]["message"].startswith("the patch ")


def test_a_refused_patch_is_a_400(monkeypatch):
    answer = {"error": "unknown policy 'x'"}
    response, _ = ask("POST", "/v1/taper/control", answer=answer, config=OPEN, monkeypatch=monkeypatch, json={})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "unknown policy 'x'")


def test_a_server_without_an_engine_says_so(monkeypatch):
    response, _ = ask("GET", "/taper/state", monkeypatch=monkeypatch, has_engine=False)
    assert response.status_code == 503

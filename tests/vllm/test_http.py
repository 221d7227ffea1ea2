"""The claims middleware and the routes, over ASGI; engines answer through the client vLLM hands to plugins."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from taper.claims import SEALED, ClaimLimits
from taper.config import ENV_VAR, ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.middleware import PATHS, ClaimsMiddleware
from taper.engines.vllm.routes import TERMS, TaperEndpoints
from taper.engines.vllm.terms import Terms
from taper.engines.vllm.watch import Shared


async def echo(scope, receive, send):
    """Answers with the messages it received: body parts, and whatever comes after the body."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
    scope["after"].append(await receive())


def post(path, body, *, method="POST", parts=1, headers=(), client=("10.0.0.1", 5), state=None, door=None):
    """(status, body, messages seen after the body) of one request through the middleware."""
    size = max(len(body) // parts, 1)
    chunks = [body[at : at + size] for at in range(0, max(len(body), 1), size)]
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
        for index, chunk in enumerate(chunks)
    ] + [{"type": "http.disconnect"}]
    sent = []
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "client": client, "after": []}
    scope["app"] = SimpleNamespace(state=state)

    async def receive():
        return incoming.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run((door or ClaimsMiddleware(echo))(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), next(iter(scope["after"]), None)


GOOD = {"taper_group": "g", "taper_tpot_slo_ms": 100, "taper_ttft_slo_ms": 9000, "taper_priority": -1}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parts", [1, 5])
def test_good_bodies_pass_with_their_tag_sealed_and_the_disconnect_behind_them(path, parts):
    sent = {"model": "m", "n": 3, "vllm_xargs": GOOD, "prompt": "\ud800"}
    status, body, after = post(path, json.dumps(sent).encode(), parts=parts)
    tag = json.loads(body)["vllm_xargs"]["taper_group"]
    assert (status, after) == (200, {"type": "http.disconnect"})
    assert tag.startswith(SEALED)
    assert json.loads(body) == {**sent, "vllm_xargs": {**GOOD, "taper_group": tag}}


def test_bodies_without_a_tag_pass_unchanged():
    body = b'{ "n":2, "vllm_xargs" :{"taper_priority":-1}}'
    assert post("/v1/completions", body) == (200, body, {"type": "http.disconnect"})


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


def test_a_line_end_that_the_routes_let_by_does_not_slip_through():
    assert post("/v1/completions\n", b'{"vllm_xargs": {"taper_bogus": 1}}')[0] == 400


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


def tag_of(group, *, key=None, door=None, path="/v1/completions", field="vllm_xargs", **kwargs):
    """What the scheduler gets for that tag."""
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    inner = {"taper_group": group}
    body = {"sampling_params": {"extra_args": inner}} if field == "extra_args" else {"vllm_xargs": inner}
    status, body, _ = post(path, json.dumps(body).encode(), headers=headers, door=door, **kwargs)
    assert status == 200
    found = json.loads(body)
    return (found["sampling_params"]["extra_args"] if field == "extra_args" else found["vllm_xargs"])["taper_group"]


def keyed(*keys, **kwargs):
    """The state of an application that checks API keys."""
    return SimpleNamespace(args=SimpleNamespace(api_key=list(keys), **kwargs))


def test_a_tag_is_its_tenants_own():
    door, checked = ClaimsMiddleware(echo), keyed("alice", "bob")
    mine = tag_of("job", door=door, key="alice", state=checked)
    assert tag_of("job", door=door, key="alice", state=checked, client=("10.9.9.9", 1)) == mine
    assert tag_of("job", door=door, key="alice", state=checked, path="/invocations", field="extra_args") == mine
    others = [
        tag_of("job", door=door, key="bob", state=checked),
        tag_of("job", door=door, state=checked, path="/invocations"),
        tag_of("jobb", door=door, key="alice", state=checked),
        tag_of(mine, door=door, key="alice", state=checked),  # a forged seal is a tag like any other
        tag_of(mine, door=door, key="bob", state=checked),
        tag_of("job", key="alice", state=checked),  # another server, or this one started again
    ]
    assert len({mine, *others}) == 7


def test_a_key_that_vllm_did_not_check_is_no_identity():
    """It guards /v1 and leaves other routes open; what it will refuse is not read, however long it is."""
    door, checked = ClaimsMiddleware(echo), keyed("alice")
    here, there = (
        tag_of("job", door=door, key="EMPTY", state=checked, path="/invocations", client=(host, 1))
        for host in ("10.0.0.1", "10.0.0.2")
    )
    assert here != there
    body = b'{"vllm_xargs": {"taper_bogus": 1}}'
    for headers in ([], [(b"authorization", b"Bearer EMPTY")], [(b"authorization", b"Basic alice")]):
        assert post("/v1/completions", body, headers=headers, state=checked)[:2] == (200, body)
        assert post("/invocations", body, headers=headers, state=checked)[0] == 400
    assert post("/v1/completions", body, headers=[(b"authorization", b"bearer alice")], state=checked)[0] == 400


def test_without_checked_keys_the_origin_is_the_tenant_and_a_key_divides_it():
    """Clients made for keyless servers all send the same word."""
    door = ClaimsMiddleware(echo)
    mine = tag_of("job", door=door, key="EMPTY", client=("10.0.0.1", 1))
    assert tag_of("job", door=door, key="EMPTY", client=("10.0.0.1", 2)) == mine
    others = [
        tag_of("job", door=door, key="EMPTY", client=("10.0.0.2", 1)),
        tag_of("job", door=door, key="other", client=("10.0.0.1", 1)),
        tag_of("job", door=door, client=("10.0.0.1", 1)),
        tag_of("job", door=door, client=None),
    ]
    assert len({mine, *others}) == 5


def test_headers_that_anyone_can_send_change_no_tenant():
    door = ClaimsMiddleware(echo)
    for name in (b"x-forwarded-for", b"forwarded", b"x-real-ip", b"x-request-id"):
        body = json.dumps({"vllm_xargs": {"taper_group": "job"}}).encode()
        _, forged, _ = post("/v1/completions", body, headers=[(name, b"10.0.0.2")], door=door)
        assert json.loads(forged)["vllm_xargs"]["taper_group"] == tag_of("job", door=door)


def test_api_processes_with_one_secret_make_one_tag(monkeypatch):
    monkeypatch.setenv(ENV_VAR, ServerConfig(group_secret="0123456789abcdef").to_json())
    assert tag_of("job") == tag_of("job")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_of_json_do_not_slip_through(encoding):
    assert post("/v1/completions", '{"vllm_xargs": {"taper_bogus": 1}}'.encode(encoding))[0] == 400


def test_claims_in_two_places_are_refused():
    claims = {"taper_group": "a"}
    body = json.dumps({"vllm_xargs": claims, "sampling_params": {"extra_args": claims}}).encode()
    status, body, _ = post("/inference/v1/generate", body)
    assert (status, "not both" in body.decode()) == (400, True)


@pytest.mark.parametrize("given", [-1, -1.0, "-1", " -1 ", -(2**62)])
def test_vllms_own_priority_is_bounded_where_vllm_heeds_it(monkeypatch, given):
    body = json.dumps({"priority": given}).encode()
    assert post("/v1/completions", body, state=keyed(scheduling_policy="fcfs"))[0] == 200
    status, answer, _ = post("/v1/completions", body, state=keyed(scheduling_policy="priority"))
    assert (status, "priority must be at least 0 on" in answer.decode()) == (400, True)
    monkeypatch.setenv(ENV_VAR, ServerConfig(limits=ClaimLimits(max_priority=1.0)).to_json())
    assert (post("/v1/completions", body, state=keyed(scheduling_policy="priority"))[0] == 200) is (given != -(2**62))


@pytest.mark.parametrize("given", ["-1", " -1", "-" + "9" * 400])
def test_so_is_the_priority_in_vllms_header(given):
    headers = [(b"x-vllm-priority", given.encode())]
    for state, status in ((keyed(scheduling_policy="fcfs"), 200), (keyed(scheduling_policy="priority"), 400)):
        assert post("/v1/completions", b"{}", headers=headers, state=state)[0] == status
    for fine in (b"1", b"high"):
        assert post("/v1/completions", b"{}", headers=[(b"x-vllm-priority", fine)], state=state)[0] == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 4}, 200),
        ({"n": 5}, 400),
        ({"n": "5"}, 400),
        ({"sampling_params": {"n": 5}}, 400),
        ({"n": 2, "prompt": ["a", "b", "c"]}, 200),  # three requests of two branches
        ({"n": 2, "prompt": ["a", "b", "c"], "vllm_xargs": {"taper_group": "g"}}, 400),
        ({"n": 2, "prompt": [1, 2, 3], "vllm_xargs": {"taper_group": "g"}}, 200),
        ({"n": 2, "messages": [[{}], [{}], [{}]], "vllm_xargs": {"taper_group": "g"}}, 400),
    ],
)
def test_branches_of_one_request_are_bounded(monkeypatch, fields, status):
    monkeypatch.setenv(ENV_VAR, ServerConfig(limits=ClaimLimits(max_branches=4)).to_json())
    assert post("/v1/completions", json.dumps(fields).encode())[0] == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"background": True}, 200),
        ({"background": True, "vllm_xargs": {"taper_group": "g"}}, 400),
        ({"background": "yes", "vllm_xargs": {"taper_group": "g"}}, 400),
        ({"background": False, "vllm_xargs": {"taper_group": "g"}}, 200),
    ],
)
def test_what_runs_in_the_background_cannot_be_counted_under_a_tag(fields, status):
    assert post("/v1/responses", json.dumps(fields).encode())[0] == status


def test_branches_in_flight_under_one_tag_are_bounded_and_come_free(monkeypatch):
    monkeypatch.setenv(ENV_VAR, ServerConfig(limits=ClaimLimits(max_branches=2)).to_json())
    gate, statuses = asyncio.Event(), []

    async def app(scope, receive, send):
        await gate.wait()
        await send({"type": "http.response.start", "status": 200})

    door = ClaimsMiddleware(app)

    async def one(group):
        incoming = [{"type": "http.request", "body": json.dumps({"vllm_xargs": {"taper_group": group}}).encode()}]

        async def receive():
            return incoming.pop(0)

        async def send(message):
            if "status" in message:
                statuses.append((group, message["status"]))

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "client": ("h", 1)}
        await door(scope, receive, send)

    async def crowd():
        tasks = [asyncio.create_task(one(group)) for group in ("a", "a", "a", "b")]
        while len(statuses) < 1:
            await asyncio.sleep(0)
        assert statuses == [("a", 429)]
        gate.set()
        await asyncio.gather(*tasks)
        await one("a")

    asyncio.run(crowd())
    assert sorted(statuses) == [("a", 200), ("a", 200), ("a", 200), ("a", 429), ("b", 200)]


class Floor:
    """The application behind the middleware: notes the rank of every request, and keeps it until told."""

    def __init__(self, replicas=2, *, local_only=False):
        parallel = SimpleNamespace(
            data_parallel_size=replicas, data_parallel_size_local=2, local_engines_only=local_only
        )
        client = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        self.state = SimpleNamespace(args=None, engine_client=client)
        self.ranks = []
        self.gate = asyncio.Event()

    async def __call__(self, scope, receive, send):
        ranks = [int(value) for name, value in scope["headers"] if name == b"x-data-parallel-rank"]
        self.ranks.append(ranks[0] if ranks else None)
        await self.gate.wait()

    def serve(self, *bodies, at_once=True, headers=(), door=None):
        """The rank of each."""
        door = door or ClaimsMiddleware(self)

        async def one(body):
            async def receive():
                return {"type": "http.request", "body": json.dumps(body).encode()}

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "client": ("h", 1)}
            await door({**scope, "headers": list(headers), "app": SimpleNamespace(state=self.state)}, receive, None)

        async def all_of_them():
            self.gate = asyncio.Event()
            calls = []
            for body in bodies:
                calls.append(asyncio.create_task(one(body)))
                await asyncio.sleep(0)
                if not at_once:
                    self.gate.set()
                    await calls[-1]
            self.gate.set()
            await asyncio.gather(*calls)

        asyncio.run(all_of_them())
        return self.ranks[-len(bodies) :]


def in_group(group, **fields):
    return {"vllm_xargs": {"taper_group": group}, **fields}


def test_a_group_goes_to_one_engine_and_groups_to_all(monkeypatch):
    monkeypatch.setenv(ENV_VAR, ServerConfig(group_secret="0123456789abcdef").to_json())
    groups = [in_group(f"job-{index}") for index in range(64)]
    ranks = Floor(4).serve(*groups)
    assert ranks == Floor(4).serve(*reversed(groups))[::-1]  # in another API process, in another order
    assert ranks == Floor(4).serve(*[{**group, "n": 3} for group in groups], at_once=False)
    assert set(ranks) == {0, 1, 2, 3}


def test_the_branches_of_a_request_go_where_fewest_are():
    floor = Floor(3)
    first, *rest = floor.serve({"n": 8}, {"n": 2}, {"n": 3}, {"n": 2}, {"n": 2})
    assert sorted([first, *rest[:2]]) == [0, 1, 2]
    assert rest[2] == rest[0]  # 2 branches there, 3 and 8 elsewhere
    assert rest[3] == rest[1]  # 4, 3, 8
    door = ClaimsMiddleware(floor)
    assert sorted(floor.serve({"n": 8}, {"n": 2}, {"n": 2}, at_once=False, door=door)) == [
        0,
        1,
        2,
    ]  # and they come free


def test_only_branches_are_placed_and_only_where_there_is_a_choice_that_nobody_made():
    serial = [{}, {"n": 1}, {"vllm_xargs": {"taper_priority": -1}}]
    assert Floor().serve(*serial) == [None] * 3
    assert Floor(1).serve({"n": 4}, in_group("g")) == [None] * 2
    for spelling in (b"X-data-parallel-rank", b"x-data-parallel-rank"):
        floor = Floor(8)
        floor.serve({"n": 4}, in_group("g"), headers=[(spelling, b"7")])
        assert floor.ranks == ([7] * 2 if spelling.islower() else [None] * 2)  # as it came
    alternating = [one for index in range(4) for one in (in_group(f"g{index}"), {"n": 2})]
    assert set(Floor().serve(*alternating, at_once=False)[1::2]) == {0, 1}  # tags take nobody's turn
    assert set(Floor(8, local_only=True).serve(*[{"n": 2}] * 8)) == {0, 1}


def test_bounds_follow_the_servers_slo(monkeypatch):
    """It starts at 50 ms and is 80 by the time of the request; engines that went away leave the last one known."""
    claim = json.dumps({"vllm_xargs": {"taper_tpot_slo_ms": 60}}).encode()
    answers = [{"tpot_slo_s": 0.08, "ttft_slo_s": 5.0}]

    async def ask():
        return answers

    async def gone():
        raise OSError("no engine")

    terms = Terms(ServerConfig())
    state = SimpleNamespace(args=None, **{TERMS: terms})
    assert post("/v1/completions", claim, state=state)[0] == 200
    terms.follow(ask)
    status, body, _ = post("/v1/completions", claim, state=state)
    assert (status, "taper_tpot_slo_ms must be between 80 and 8000 ms" in body.decode()) == (400, True)
    terms.follow(gone)
    assert post("/v1/completions", claim, state=state)[0] == 400


def test_an_answer_from_before_a_change_does_not_undo_it():
    asked = []

    async def ask():
        asked.append(1)
        return [{"tpot_slo_s": 0.05, "ttft_slo_s": 5.0}]

    async def run():
        terms = Terms(ServerConfig())
        terms.follow(ask)
        await terms.slo()
        terms.heard([{"tpot_slo_s": 0.08, "ttft_slo_s": 5.0}])
        return await terms.slo()

    assert asyncio.run(run()).tpot_s == 0.08
    assert len(asked) == 1


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


def test_readers_of_the_state_share_one_question():
    asked = []

    async def snapshot():
        asked.append(1)
        await asyncio.sleep(0)
        return [len(asked)]

    async def run():
        shared = Shared(snapshot)
        return await asyncio.gather(*[shared.latest() for _ in range(5)]), await shared.latest()

    assert asyncio.run(run()) == ([[1]] * 5, [2])


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


def test_a_new_slo_is_known_where_it_was_set(monkeypatch):
    monkeypatch.setenv(ENV_VAR, OPEN.to_json())
    plugin, app, state = TaperEndpoints(), FastAPI(), SimpleNamespace()
    engines = Engines({"tpot_slo_s": 0.08, "ttft_slo_s": 2.0})

    async def run():
        plugin.attach_router(app)
        vllm_config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
        engine = SimpleNamespace(engine_core=engines, vllm_config=vllm_config)
        await plugin.init_state(engine, state, SimpleNamespace(api_key=None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            await client.post("/v1/taper/control", json={"tpot_slo_s": 0.08})
        return await getattr(state, TERMS).slo()

    assert asyncio.run(run()) == Slo(tpot_s=0.08, ttft_s=2.0)
    assert [method for _, method, _ in engines.calls] == ["taper_configure"] * 2 + ["taper_snapshot"] * 2


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

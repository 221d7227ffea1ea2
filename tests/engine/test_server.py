"""The running server as its users meet it: stock client, bad input, clients that walk away."""

from __future__ import annotations

import asyncio
import random

import httpx
import openai
import pytest

from tests.waiting import eventually

pytestmark = pytest.mark.engine

CHAT = [{"role": "user", "content": "Name three fruits."}]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def engine_state(server):
    (state,) = server.state()["engines"]
    return state


def wait_empty(server):
    def is_empty(state):
        return not any(state["tables"].values()) and state["kv_usage"] == 0

    return eventually(lambda: engine_state(server), is_empty)


def test_the_stock_client_gets_its_branches(server, client, model):
    answer = client.chat.completions.create(model=model, messages=CHAT, n=6, max_tokens=24, temperature=0.9, seed=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert all(choice.message.content for choice in answer.choices)
    # Whichever way a near-tie between two first tokens falls on this machine, the sum is in the answer.
    question = [{"role": "user", "content": "What is 2+2?"}]
    greedy = client.chat.completions.create(model=model, messages=question, max_tokens=24, temperature=0.0)
    assert "4" in greedy.choices[0].message.content


def test_branches_are_regulated_and_counted(server, client, model):
    # Longer than a quantum: branches that start only when their sibling has ended are held, never deferred.
    shape = {"n": 8, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    server.configure({"policy": "off"})
    client.chat.completions.create(model=model, messages=CHAT, **shape)
    off = engine_state(server)
    server.configure({"policy": "eager"})
    client.chat.completions.create(model=model, messages=CHAT, **shape)
    eager = engine_state(server)
    server.configure({"policy": "taper"})
    assert off["window"]["deferred_row_steps"] > 0
    assert eager["window"]["deferred_row_steps"] == 0
    assert off["window"]["steps"] > 3 * eager["window"]["steps"]
    assert off["totals"]["fallbacks"] == 0


def test_tagged_requests_are_one_group(server, model):
    async def three_tagged() -> int:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as http:
            body = {"model": model, "messages": CHAT, "max_tokens": 150, "ignore_eos": True}
            calls = [
                asyncio.create_task(
                    http.post("/v1/chat/completions", json=body | {"vllm_xargs": {"taper_group": "story"}})
                )
                for _ in range(3)
            ]
            most_branches = 0
            while not all(call.done() for call in calls):
                tables = (await http.get("/taper/state")).json()["engines"][0]["tables"]
                if tables["groups"] == 1:
                    most_branches = max(most_branches, tables["branches"])
                await asyncio.sleep(0.05)
            assert [call.result().status_code for call in calls] == [200] * 3
            return most_branches

    assert asyncio.run(three_tagged()) == 3


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"taper_speed": 1}, "taper_speed"),
        ({"taper_tpot_slo_ms": -1}, "taper_tpot_slo_ms must be between"),
        ({"taper_tpot_slo_ms": "soon"}, "taper_tpot_slo_ms must be a number"),
        ({"taper_tpot_slo_ms": 0.5}, "taper_tpot_slo_ms must be between"),
        ({"taper_group": 7}, "taper_group must be a string"),
        ({"taper_group": ""}, "taper_group must be 1 to 128"),
        ({"taper_priority": 9}, "taper_priority must be between"),
    ],
)
def test_bad_claims_are_a_400_that_names_the_field(server, client, model, xargs, message):
    before = engine_state(server)["totals"]["rejected_claims"]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model=model, messages=CHAT, max_tokens=4, extra_body={"vllm_xargs": xargs})
    assert engine_state(server)["totals"]["rejected_claims"] == before  # it never reached the engine


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"policy": "fastest"}, "unknown policy 'fastest'"),
        ({"tpot_slo_s": 0}, "tpot_s must be between"),
        ({"knobs": {"speed": 1}}, "unknown key 'speed'"),
        ({"knobs": {"rho": 2}}, "rho must be between"),
        ({"profile": {"schema": "other"}}, "profile"),
        ({"color": "red"}, "unknown key 'color'"),
    ],
)
def test_bad_control_patches_change_nothing(server, patch, message):
    before = engine_state(server)
    with server.client() as http:
        answer = http.post("/v1/taper/control", json=patch)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    after = engine_state(server)
    assert [after[key] for key in ("policy", "tpot_slo_s")] == [before[key] for key in ("policy", "tpot_slo_s")]


def test_control_needs_the_right(server):
    answer = httpx.post(f"{server.url}/v1/taper/control", json={"policy": "eager"}, timeout=120, trust_env=False)
    assert answer.status_code == 403
    assert engine_state(server)["policy"] == "taper"


def test_500_clients_that_walk_away_leave_nothing_behind(server, model):
    """Cut the connection in any state: waiting, held, prefilling, running, deferred, between chunks."""
    rng = random.Random(11)

    async def walk_away(http: httpx.AsyncClient) -> None:
        body = {"model": model, "messages": CHAT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        body |= {"n": rng.choice([1, 1, 4, 8])}
        if rng.random() < 0.3:
            body |= {"n": 1, "vllm_xargs": {"taper_group": f"g{rng.randrange(4)}"}}
        try:
            async with (
                asyncio.timeout(rng.uniform(0.005, 0.8)),
                http.stream("POST", "/v1/chat/completions", json=body) as r,
            ):
                async for _ in r.aiter_lines():
                    pass
        except (TimeoutError, httpx.HTTPError):
            pass

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
            for _ in range(25):
                await asyncio.gather(*[walk_away(http) for _ in range(20)])

    asyncio.run(all_of_them())
    state = wait_empty(server)
    assert state["tables"] == {"groups": 0, "branches": 0, "pending_steps": 0}
    assert state["kv_usage"] == 0
    assert state["totals"]["fallbacks"] == 0
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": model, "messages": CHAT, "max_tokens": 4},
        trust_env=False,
        timeout=60,
    )
    assert answer.status_code == 200

"""What the routes of the page hand out, and to whom."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from taper.config import ENV_VAR, ServerConfig
from taper.engines.vllm import compat
from taper.engines.vllm.routes import TaperEndpoints
from tests.see.stage import MODEL, Core, client_of
from tests.vllm import harness
from tests.vllm.harness import fork, server_config

pytestmark = pytest.mark.vllm


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Send one request to TAPER's routes over one engine replica."""

    def send(method, path, *, config=None, has_engine=True, **kwargs):
        driver = harness.make(monkeypatch, tmp_path, is_async=False, config=config or server_config())
        driver.add(*fork("p", 3))
        driver.step()

        async def run():
            app, plugin = FastAPI(), TaperEndpoints()
            plugin.attach_router(app)
            engine = client_of(Core(driver)) if has_engine else None
            await plugin.init_state(engine, app.state, SimpleNamespace(api_key=["k"]))
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://host:8000") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(run())

    return send


def test_the_page_and_all_it_names_come_from_the_package(ask):
    page = ask("GET", "/taper")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://", page.text)
    named = re.findall(r'(?:href|src)="(taper/static/[^"]+)"', page.text)
    assert len(set(named)) == 3
    scripts = [name for name in named if name.endswith(".js")]
    for name in {*named, *(f"taper/static/{one}.js" for one in ("lanes", "charts", "playground"))}:
        answer = ask("GET", f"/{name}")
        assert answer.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    assert ask("GET", f"/{scripts[0]}").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("name", ["absent.js", "..%2f..%2fconfig.py", "__init__.py", ""])
def test_nothing_else_is_handed_out(ask, name):
    assert ask("GET", f"/taper/static/{name}").status_code == 404


def test_live_says_what_a_page_needs(ask):
    body = ask("GET", "/taper/live").json()
    assert body["server"] == {"model": MODEL, "engines": [0], "allows_control": False, "needs_key": True}
    (engine,) = body["engines"]
    assert (engine["groups"], engine["branches"], len(engine["lanes"])) == (1, 3, 1)
    assert 0 <= body["age_s"] < 5
    assert ask("GET", "/taper/live", params={"since": "soon"}).status_code == 422
    assert ask("GET", "/taper/live", has_engine=False).status_code == 503


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Origin": "http://host:8000"}, 200),
        ({"Origin": "http://elsewhere"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://proxy.example", "Authorization": "Bearer k"}, 200),
    ],
)
def test_another_sites_page_cannot_change_an_open_server(ask, headers, status):
    config = server_config(allow_control=True)
    answer = ask("POST", "/v1/taper/control", config=config, json={"policy": "off"}, headers=headers)
    assert answer.status_code == status


def test_a_question_to_an_engine_that_dies_ends_with_vllms_own_error(monkeypatch, tmp_path):
    """vLLM never settles it: the asker would wait for ever, and the server's shutdown with it."""
    driver = harness.make(monkeypatch, tmp_path, is_async=False, config=server_config())
    core = Core(driver)
    core.away = True
    client = client_of(core)

    async def ask_and_die():
        asking = asyncio.create_task(compat.call_engines(client, "taper_snapshot"))
        await asyncio.sleep(0.1)
        client.errored, client.dead_error = True, RuntimeError("EngineCore is dead")
        return await asyncio.wait_for(asking, 60)

    with pytest.raises(RuntimeError, match="EngineCore is dead"):
        asyncio.run(ask_and_die())


def test_one_trace_per_replica(monkeypatch, tmp_path):
    from taper.engines.vllm import seam

    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv(ENV_VAR, ServerConfig(trace=str(path)).to_json())
    config = harness.vllm_config(tmp_path / "model", is_async=False)
    config.parallel_config.data_parallel_index = 2
    scheduler = harness.build(config, harness.TaperScheduler)
    assert seam.SchedulerSeam(scheduler).replica == 2
    assert (tmp_path / "steps-2.jsonl").exists()
    assert not path.exists()

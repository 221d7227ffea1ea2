"""`/metrics`: vLLM's own beside ours, one labelled set per engine, whatever API process answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from taper.engines.vllm import compat
from taper.engines.vllm.metrics import families
from taper.engines.vllm.routes import TaperEndpoints
from taper.engines.vllm.watch import EnginesAway, LiveFeed, Poll
from tests.see.stage import MODEL, Core, client_of
from tests.vllm import harness
from tests.vllm.harness import fork, request, server_config

pytestmark = pytest.mark.vllm


@pytest.fixture
def drivers(monkeypatch, tmp_path):
    """Two engine replicas with different loads, in mid-flight."""
    made = []
    for width in (3, 5):
        driver = harness.make(monkeypatch, tmp_path, is_async=False, config=server_config(policy="cap:2"))
        driver.add(*fork("p", width, tokens=40), request("s", tokens=10))
        for _ in range(20):
            driver.step()
        made.append(driver)
    return made


def scrape(core, *, processes=1, headers=None):
    """The answers of `processes` API processes that serve the same engines."""

    async def one():
        app, plugin = FastAPI(), TaperEndpoints()
        app.get("/metrics")(lambda: "vLLM's own route, which must not be the one that answers")
        plugin.attach_router(app)
        await plugin.init_state(client_of(core), app.state, SimpleNamespace())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/metrics", headers=headers)

    async def run():
        return [await one() for _ in range(processes)]

    return asyncio.run(run())


def samples(response):
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def value(found, name, engine="0", **labels):
    return found[(name, *sorted({"model_name": MODEL, "engine": engine, **labels}.items()))]


def test_every_engine_is_a_labelled_set(drivers):
    (response,) = scrape(Core(*drivers))
    assert response.status_code == 200
    found = samples(response)
    assert value(found, "taper:num_branches", "0") == 3
    assert value(found, "taper:num_branches", "1") == 5
    assert value(found, "taper:num_rows", "1", role="protected") == 1
    assert value(found, "taper:num_rows", "1", role="extra") == 1
    assert sum(value(found, "taper:num_rows", "1", role=role) for role in ("deferred", "held")) == 3
    assert value(found, "taper:requests_total", "0", **{"class": "serial", "outcome": "met"}) == 1
    assert value(found, "taper:goodput_tokens_total", "0", **{"class": "serial"}) == 10
    assert value(found, "taper:slo_seconds", "0", kind="tpot") == 0.05
    assert value(found, "taper:policy_info", "0", policy="cap:2") == 1
    assert value(found, "taper:step_seconds_count", "0") == drivers[0].taper.steps == 20
    one, two = (value(found, "taper:request_width_bucket", le=bound) for bound in ("1.0", "2.0"))
    assert one < two == value(found, "taper:request_width_count")
    ours = {key[0] for key in found if key[0].startswith("taper:")}
    assert {name.removesuffix("_total") for name in ours} >= {
        "taper:num_rows", "taper:num_groups", "taper:step_predicted_seconds", "taper:step_measured_seconds",
        "taper:externality_seconds", "taper:predictor_error_ratio", "taper:calibration_scale",
        "taper:slo_attainment_ratio",
        "taper:request_misses", "taper:forks", "taper:joins", "taper:planner_seconds_count", "taper:fallbacks",
    }  # fmt: skip


def test_several_api_processes_give_the_same_figures(drivers):
    one, two, three = (samples(response) for response in scrape(Core(*drivers), processes=3))

    def steady(found):
        return {key: value for key, value in found.items() if key[0].startswith("taper:") and "age" not in key[0]}

    assert steady(one) == steady(two) == steady(three)


def test_vllms_own_metrics_stay_with_one_and_with_several_processes(drivers, monkeypatch, tmp_path):
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "as vLLM has it", registry=registry).set(7)
    monkeypatch.setattr(compat, "prometheus_registry", lambda: registry)
    found = samples(scrape(Core(*drivers))[0])
    assert found[("vllm:num_requests_running",)] == 7
    assert any(key[0].startswith("taper:") for key in found)


def test_the_registry_of_several_processes_is_vllms(monkeypatch, tmp_path):
    from prometheus_client import REGISTRY

    assert compat.prometheus_registry() is REGISTRY
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert compat.prometheus_registry() is not REGISTRY


def test_names_keep_their_colon_for_scrapers_that_prefer_openmetrics(drivers):
    (response,) = scrape(Core(*drivers), headers={"Accept": "application/openmetrics-text; version=1.0.0, text/plain"})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\ntaper:num_groups{" in response.text
    assert "taper_" not in response.text


def test_a_replica_without_tapers_scheduler_has_no_figures():
    assert families([{"error": "no"}], model="m", ranks=[0], age_s=0.0) == []


def test_an_engine_that_never_answered_leaves_vllms_metrics_alone(drivers):
    core = Core(*drivers)

    async def broken(*args, **kwargs):
        raise RuntimeError("engine core is dead")

    core._call_utility_async = broken
    (response,) = scrape(core)
    assert response.status_code == 200
    assert "taper:" not in response.text


def test_a_poll_is_shared_and_paced_by_what_it_costs():
    asked = 0

    async def ask():
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return [{"cost_s": 60.0, "n": asked}]

    async def run():
        poll = Poll(ask, period_s=0.0)
        return await asyncio.gather(*[poll.latest() for _ in range(50)]), await poll.latest()

    together, later = asyncio.run(run())
    assert asked == 1  # 50 readers at once, and one more while the price of the last answer is being paid off
    assert {answers[0]["n"] for answers, _ in [*together, later]} == {1}


def test_a_dead_engine_shows_as_age_not_as_an_error():
    alive = True

    async def ask():
        if not alive:
            raise RuntimeError("dead")
        return [{"n": 1}]

    async def run():
        nonlocal alive
        poll = Poll(ask, period_s=0.0)
        alive = False
        with pytest.raises(EnginesAway):
            await poll.latest()
        alive = True
        await poll.latest()
        alive = False
        await asyncio.sleep(0.05)
        return await poll.latest()

    answers, age_s = asyncio.run(run())
    assert answers == [{"n": 1}]
    assert age_s >= 0.05


def test_the_feed_keeps_the_timeline_and_asks_for_the_rest(drivers):
    core = Core(*drivers)
    questions = []

    async def ask(method, since):
        questions.append(since)
        answers = await compat.call_engines(client_of(core), method, since)
        return [answer | {"cost_s": 0.0} for answer in answers]  # as if in no time: no pause until the next question

    async def run():
        feed = LiveFeed(ask, period_s=0.0)
        first, _ = await feed.latest(0)
        for driver in drivers:
            driver.run(60)
        second, _ = await feed.latest(0)
        return first, second, await feed.latest(int(second[0]["timeline"][-1][0]))

    first, second, (third, _) = asyncio.run(run())
    assert questions[0] == 0
    assert questions[1] == first[0]["timeline"][-1][0]
    for at, driver in enumerate(drivers):
        assert second[at]["timeline"] == driver.taper.onlooker.tally.timeline(0)
    assert len(third[0]["timeline"]) == 1

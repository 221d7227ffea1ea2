"""One server with two engines: requests with branches stay whole, and everything that shows or steers knows both."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from taper.client import by_protocol
from taper.config import ServerConfig
from taper.engines.vllm.launch import Server
from taper.model import embedded_model
from tests.see import browsing
from tests.see.browsing import page, until
from tests.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.engine

ENGINES = 2
# Long enough to be seen while it runs. Given up instead, a request can stay in vLLM to its end (a cancellation in the
# moment in which its engine takes it in is lost), and the next test would see it.
CHAT = {"messages": [{"role": "user", "content": "Name three fruits."}], "ignore_eos": True, "max_tokens": 128}
RANK = "X-data-parallel-rank"
Tables = list[tuple[int, int]]  # of each engine: (groups, branches)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log: Path = tmp_path_factory.mktemp("two") / "vllm.log"
    # The secret decides which tags go where: not by chance all to one engine. Where is the question here, not when.
    config = ServerConfig(policy="eager", group_secret="two engines, one secret")
    flags = ["--data-parallel-size", str(ENGINES), "--max-num-seqs", "64"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(str(embedded_model()), flags, config=config, embedded=True, log=log, env=env) as running:
        yield running


def watched(server: Server, bodies: Sequence[dict[str, Any]], **headers: str) -> list[Tables]:
    """Send them at once; what the engines' tables held while they ran."""

    async def run() -> list[Tables]:
        seen: list[Tables] = []
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120, trust_env=False) as http:

            async def tables() -> Tables:
                await asyncio.sleep(0.02)
                engines = (await http.get("/taper/state")).json()["engines"]
                return [(one["tables"]["groups"], one["tables"]["branches"]) for one in engines]

            while any(branches for _, branches in await tables()):  # an answer is out before its engine's next state
                pass
            calls = [asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | body)) for body in bodies]
            while not all(call.done() for call in calls):
                seen.append(await tables())
            assert [call.result().status_code for call in calls] == [200] * len(calls)
        return seen

    return asyncio.run(run())


def most_branches(seen: list[Tables]) -> Tables:
    return max(seen, key=lambda tables: sum(branches for _, branches in tables))


def metric(server: Server, name: str, **labels: str) -> list[float]:
    """Its value for each engine, summed over the labels not named."""
    with server.client() as http:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [one for family in families for one in family.samples if one.name == name]
    found = dict.fromkeys(map(str, range(ENGINES)), 0.0)
    for one in samples:
        if labels.items() <= one.labels.items():
            found[one.labels["engine"]] += one.value
    return list(found.values())


def caught_up(server: Server) -> None:
    """From here on /metrics knows all that happened before, which at first it may not, or know nothing."""
    asked_s = time.monotonic()

    def is_later(ages_s: list[float]) -> bool:
        return all(0 < age_s < time.monotonic() - asked_s for age_s in ages_s)

    eventually(lambda: metric(server, "taper:snapshot_age_seconds"), is_later)


def test_the_children_of_n_share_an_engine_and_the_next_request_takes_the_other(two):
    first, second = (most_branches(watched(two, [{"n": 6}])) for _ in range(2))
    assert sorted([first, second]) == [[(0, 0), (1, 6)], [(1, 6), (0, 0)]]


def test_a_group_stays_whole_and_groups_use_both_engines(two):
    most = most_branches(watched(two, [{"vllm_xargs": {"taper_group": f"job-{number % 6}"}} for number in range(18)]))
    groups = [groups for groups, _ in most]
    assert sum(groups) == 6
    assert min(groups) > 0
    assert most == [(count, 3 * count) for count in groups]


@pytest.mark.parametrize("rank", range(ENGINES))
@pytest.mark.parametrize("body", [{"n": 4}, {"vllm_xargs": {"taper_group": "story"}}])
def test_a_client_may_choose_the_engine(two, body, rank):
    seen = watched(two, [body], **{RANK: str(rank)})
    branches = [branches for _, branches in most_branches(seen)]
    assert branches[rank] == body.get("n", 1)
    assert sum(branches) == branches[rank]


def test_a_program_runs_on_one_engine_from_fork_to_join(two):
    shape = {"lead_tokens": 4, "stages": [{"branches": 4, "tokens": 256, "then_tokens": 4}]}
    caught_up(two)
    joins = metric(two, "taper:joins_total")
    for _ in range(ENGINES):
        seen = watched(two, [by_protocol("scripted", options=shape)])
        assert all(min(tables) == (0, 0) for tables in seen)
        assert max(most_branches(seen)) == (1, 4)
    wanted = [before + 1 for before in joins]  # they take turns
    eventually(lambda: metric(two, "taper:joins_total"), lambda found: found == wanted)


def test_metrics_tell_the_engines_apart_and_add_up(two):
    names = {
        "taper:requests_total": {"class": "branching"},
        "vllm:request_success_total": {"finished_reason": "length"},
    }
    caught_up(two)
    before = {name: metric(two, name, **labels) for name, labels in names.items()}
    watched(two, [{"n": 4}, {"n": 2}, {"n": 3}])
    watched(two, [{"n": 5}], **{RANK: "1"})
    expected = {"taper:requests_total": 4, "vllm:request_success_total": 14}

    def more() -> dict[str, list[float]]:
        return {
            name: [now - then for now, then in zip(metric(two, name, **labels), before[name], strict=True)]
            for name, labels in names.items()
        }

    eventually(lambda: {name: sum(values) for name, values in more().items()}, lambda found: found == expected)
    assert all(min(values) > 0 for values in more().values())
    assert metric(two, "taper:policy_info") == [1.0] * ENGINES


def test_control_reaches_both_engines_and_each_decides_for_itself(two):
    state = two.configure({"policy": "off", "tpot_slo_s": 0.08})
    try:
        for engines in (state["engines"], two.state()["engines"]):
            assert [(one["policy"], one["tpot_slo_s"]) for one in engines] == [("off", 0.08)] * ENGINES
        two.drain_steps()
        watched(two, [{"n": 3}], **{RANK: "1"})
        idle, deciding = two.drain_steps()["engines"]
        assert idle == []
        assert max(step["deferred"] + step["held"] for step in deciding) == 2
    finally:
        two.configure({"policy": "eager", "tpot_slo_s": 0.05})


@pytest.fixture
def browser():
    yield from browsing.browser()


def test_the_page_shows_either_engine(two, browser):
    def engines() -> list[int] | None:
        with two.client() as http:
            return http.get("/taper/live").json().get("server", {}).get("engines")

    eventually(engines, lambda found: found == list(range(ENGINES)))
    with ThreadPoolExecutor() as pool, page(browser, f"{two.url}/taper") as tab:
        pool.submit(watched, two, [{"n": 3, "max_tokens": 300}], **{RANK: "1"})
        until(tab, "!document.getElementById('engine-box').hidden")
        assert tab.locator("#engine option").all_inner_texts() == ["0", "1"]
        until(tab, "document.getElementById('lanes-note').textContent.startsWith('0 requests')")
        tab.select_option("#engine", index=1)
        until(tab, "/^1 request, /.test(document.getElementById('lanes-note').textContent)")


def test_the_death_of_one_engine_ends_the_server_and_the_requests_of_the_other(two):
    """vLLM's own: it does not go on with the engines that are left, so a whole server is what a supervisor restarts."""
    (victim,) = [
        one for one in psutil.Process().children(recursive=True) if "EngineCore_DP1" in " ".join(one.cmdline())
    ]
    workers = victim.parent().children(recursive=True)

    async def stream(http: httpx.AsyncClient, rank: int, started: asyncio.Event) -> list[str]:
        lines = []
        body = CHAT | {"stream": True, "max_tokens": 1500}
        async with http.stream("POST", "/v1/chat/completions", json=body, headers={RANK: str(rank)}) as answer:
            async for line in answer.aiter_lines():
                lines.append(line)
                if '"content"' in line:
                    started.set()
        return [line for line in lines if line]

    async def run() -> list[list[str]]:
        async with httpx.AsyncClient(base_url=two.url, timeout=120, trust_env=False) as http:
            started = [asyncio.Event() for _ in range(ENGINES)]
            calls = [asyncio.create_task(stream(http, rank, started[rank])) for rank in range(ENGINES)]
            await asyncio.gather(*(one.wait() for one in started))
            victim.send_signal(signal.SIGKILL)
            return await asyncio.gather(*calls)

    for lines in asyncio.run(run()):
        assert '"error"' in lines[-2] or '"finish_reason":"abort"' in lines[-2]  # both were seen
        assert lines[-1] == "data: [DONE]"
    assert eventually(two.poll, lambda status: status is not None) == 0  # which `taper serve` makes a 1
    psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in workers)

"""Fork and join on the running server: the stock client, KV reuse, clients that walk away."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from taper.client import Branch, Continuation, Join, Lead, Taper, by_protocol
from tests.engine.test_server import engine_state, wait_empty
from tests.waiting import eventually

pytestmark = pytest.mark.engine

BLOCK = 32  # of the embedded model's server
QUESTION = [{"role": "user", "content": "What are the benefits of regular exercise?"}]
PROMPT = "Once upon a time " * 75  # 301 tokens
OPENING = r"Two sides\.\n<Goal>\n<Outline> 1: [a-z ]{5,30}</Outline>\n<Outline> 2: [a-z ]{5,30}</Outline>\n</Goal>"


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=900)


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def test_skeleton_of_thought_through_the_stock_client(client, model):
    """The outline's form is made sure of, so that no near-tie of the model's decides what is tested."""
    outline = r"1\. [a-z ]{8,24}\n2\. [a-z ]{8,24}\n3\. [a-z ]{8,24}"
    extra = by_protocol("skeleton-of-thought", opening_regex=outline, options={"point_tokens": 24})
    fields = {"model": model, "messages": QUESTION, "temperature": 0.0, "extra_body": extra}
    chunks = list(client.chat.completions.create(stream=True, **fields))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    answer = client.chat.completions.create(**fields)
    assert answer.taper["status"] == "complete"
    root, *points = answer.taper["branches"]
    assert [point["label"] for point in points] == ["1", "2", "3"]
    starts = [text.index(f"{line}:") for line in root["text"].split("\n")]
    assert starts == sorted(starts)
    forks = answer.usage.taper["forks"]
    assert min(fork["cached_tokens"] for fork in forks[1:]) >= BLOCK  # points share the question and the outline


def test_multiverse_follows_the_tags_of_an_opening_it_was_made_to_write(client, model):
    extra = by_protocol("multiverse", opening_regex=OPENING, branch_max_tokens=24)
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0.0, max_tokens=160, extra_body=extra
    )
    text = answer.choices[0].message.content
    tags = ("</Goal>", "\n<Path>\n1:", "</Path>", "\n<Path>\n2:", "</Path>\n<Conclusion>\n")
    assert [text.index(tag) for tag in tags] == sorted(text.index(tag) for tag in tags)
    assert [branch["label"] for branch in answer.taper["branches"]] == ["", "1", "2"]
    assert len(answer.usage.taper["joins"]) == 1


def test_a_plan_without_prompts_is_text_and_the_planner_goes_on(client, model):
    extra = by_protocol("sprint", opening_regex=r"<Plan_1>I think [a-z ]{4,20}</Plan_1>")
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0.0, max_tokens=60, extra_body=extra
    )
    assert answer.choices[0].message.content.startswith("<Plan_1>I think ")
    assert answer.usage.taper["prefilled_tokens"] > 2 * answer.usage.prompt_tokens  # two runs, one behind the other
    assert answer.usage.completion_tokens <= 60


def test_a_fork_and_a_join_recompute_no_more_than_a_block_and_what_is_new(client):
    """The table of docs/programs.md: 4 children after 301 prompt tokens and 200 generated, joined longest first."""
    lengths = (20, 30, 40, 50)
    branches = [
        Branch(suffix=f"\nPart {number}:", max_tokens=length, ignore_eos=True) for number, length in enumerate(lengths)
    ]
    program = Taper(client).fork(
        branches,
        prompt=PROMPT,
        temperature=0.0,
        lead=Lead(max_tokens=200, ignore_eos=True),
        join=Join(order="reuse", instruction="\nIn short:", continuation=Continuation(max_tokens=8)),
    )
    usage = program.usage["taper"]
    before, header = 301 + 200, 5
    assert [fork["prompt_tokens"] for fork in usage["forks"]] == [before + header] * 4
    for fork in usage["forks"]:
        assert fork["recomputed_tokens"] <= BLOCK + header
    (join,) = usage["joins"]
    assert join["prompt_tokens"] == 669
    assert join["recomputed_tokens"] <= 669 - (before + header + max(lengths)) + BLOCK


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"branches": [Branch(max_tokens=2048)]}, "tokens in one context; this model's context is 2048"),
        ({"branches": [Branch(max_tokens=4)] * 257, "budget": {"max_branches": 500}}, "this server holds are 256"),
        ({"branches": [Branch(max_tokens=9)] * 4, "budget": {"max_total_tokens": 35}}, "36 generated tokens"),
        ({"branches": [Branch()], "speed": 1}, "speed"),
        ({"branches": [Branch()], "vllm_xargs": {"taper_tpot_slo_ms": 1}}, "taper_tpot_slo_ms must be between"),
    ],
)
def test_a_program_that_cannot_fit_is_a_400_and_runs_nothing(server, client, fields, words):
    steps = engine_state(server)["totals"]["steps"]
    with pytest.raises(openai.BadRequestError, match=words):
        Taper(client).fork(prompt="p", **fields)
    assert engine_state(server)["totals"]["steps"] == steps


def test_200_programs_whose_clients_walk_away_leave_nothing_behind(server, model):
    """Cut in any state: opening, forking, prefilling, between chunks, joining, streaming or not."""
    rng = random.Random(23)
    scripted = {"lead_tokens": 8, "stages": [{"branches": 5, "tokens": 30, "then_tokens": 8}] * 2}
    explicit = {"prompt": PROMPT, "branches": [{"max_tokens": 60, "ignore_eos": True}] * 6}
    explicit |= {"join": {"continuation": {"max_tokens": 40, "ignore_eos": True}}}

    async def walk_away(http: httpx.AsyncClient) -> None:
        path, body = rng.choice(
            [
                (
                    "/v1/chat/completions",
                    {"messages": QUESTION, "taper": {"protocol": "scripted", "options": scripted}},
                ),
                (
                    "/v1/chat/completions",
                    {"messages": QUESTION, "max_tokens": 200, **by_protocol("skeleton-of-thought")},
                ),
                ("/v1/taper/programs", explicit),
            ]
        )
        try:
            async with asyncio.timeout(rng.uniform(0.005, 1.5)):
                async with http.stream("POST", path, json={**body, "stream": rng.random() < 0.7}) as answer:
                    async for _ in answer.aiter_lines():
                        pass
        except (TimeoutError, httpx.HTTPError):
            pass

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
            for _ in range(20):
                await asyncio.gather(*[walk_away(http) for _ in range(10)])

    asyncio.run(all_of_them())
    state = wait_empty(server)
    assert state["tables"] == {"groups": 0, "branches": 0, "pending_steps": 0}
    assert state["kv_usage"] == 0
    assert state["totals"]["fallbacks"] == 0

    def programs_of() -> dict[str, Any]:
        return httpx.get(f"{server.url}/taper/programs", timeout=120, trust_env=False).json()

    programs = eventually(programs_of, lambda programs: not programs["live"])
    assert programs["totals"]["left"] > 20


@pytest.mark.parametrize("name", ["best_of_n", "map_reduce", "skeleton", "tree_search"])
def test_examples_run(server, name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(path), "--url", server.url], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()

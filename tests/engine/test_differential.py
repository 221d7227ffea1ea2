"""The same requests to a stock server and to one under TAPER: what comes back is the same, field by field.

Both serve the embedded model in float32, where greedy and seeded output does not depend on which rows share a step,
and get the requests one after the other. TAPER runs with an SLO so tight that branches are deferred all the time.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from taper.config import ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.launch import Server
from taper.model import embedded_model

pytestmark = pytest.mark.engine

ARGS = ("--dtype", "float32", "--scheduling-policy", "priority", "--enable-auto-tool-choice")
PARSER = ("--tool-call-parser", "hermes", "--served-model-name", "m")
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}  # pause and resume
VOLATILE = {"id", "created", "created_at", "request_id", "system_fingerprint", "tool_call_id", "root"}
LOGPROB_TOLERANCE = 1e-3
STORY = "Once upon a time in a quiet village there lived"
CHAT = [{"role": "user", "content": "Name three fruits."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FRUIT = {
    "type": "object",
    "properties": {"fruit": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["fruit", "count"],
    "additionalProperties": False,
}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "m", "prompt": STORY, "max_tokens": 12, "temperature": 0} | fields


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "m", "messages": CHAT, "max_tokens": 12, "temperature": 0} | fields


USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SAMPLED = {"temperature": 0.8, "seed": 11}
REQUESTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "greedy": completion(),
    "greedy chat": chat(),
    "one token": completion(max_tokens=1),
    "no length given": chat(max_tokens=None, max_completion_tokens=9),
    "several prompts": completion(prompt=[STORY, "The sea was", "Two plus two"]),
    "token ids": completion(prompt=[504, 3575, 282, 253, 1099]),
    "system and history": chat(
        messages=[{"role": "system", "content": "Be brief."}, *CHAT, {"role": "assistant", "content": "Apple"}, *CHAT]
    ),
    "seeded": completion(**SAMPLED),
    "seeded, n": completion(n=4, **SAMPLED),
    "seeded chat, n": chat(n=5, max_tokens=24, **SAMPLED),
    "greedy, n": completion(n=3),  # refused: it would give the same thing three times
    "wide": completion(n=16, max_tokens=20, ignore_eos=True, **SAMPLED),
    "top p and k": completion(top_p=0.7, top_k=20, **SAMPLED),
    "min p": completion(min_p=0.1, **SAMPLED),
    "penalties": completion(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1),
    "logit bias": completion(logit_bias={"504": 5.0}),
    "allowed tokens": completion(allowed_token_ids=[504, 3575, 282]),
    "bad words": completion(bad_words=["village", "named"]),
    "stop string": completion(stop=["."], max_tokens=60),
    "stop string, n": completion(stop=[".", ","], max_tokens=60, n=4, **SAMPLED),
    "stop string kept": completion(stop=["."], include_stop_str_in_output=True, max_tokens=60),
    "stop token": completion(stop_token_ids=[28, 30], max_tokens=60),
    "least tokens": chat(min_tokens=10),
    "past the end": chat(ignore_eos=True, max_tokens=40),
    "echo": completion(echo=True),
    "logprobs": completion(logprobs=3),
    "logprobs, n": completion(logprobs=2, n=3, **SAMPLED),
    "chat logprobs": chat(logprobs=True, top_logprobs=3),
    "prompt logprobs": completion(prompt_logprobs=2),
    "ids back": completion(return_token_ids=True, n=2, **SAMPLED),
    "stream": completion(**USAGE),
    "stream, n": chat(n=4, **USAGE, **SAMPLED),
    "stream with logprobs": chat(logprobs=True, top_logprobs=2, **USAGE),
    "json schema": chat(
        max_tokens=60, response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": FRUIT}}
    ),
    "json schema, n": chat(
        max_tokens=60,
        n=3,
        response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": FRUIT}},
        **SAMPLED,
    ),
    "one of": chat(structured_outputs={"choice": ["apple", "pear"]}),
    "regex": chat(structured_outputs={"regex": "[0-9]{3}-[a-z]{2}"}),
    "forced tool": chat(
        max_tokens=40, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}
    ),
    "some tool": chat(max_tokens=60, tools=[WEATHER], tool_choice="required"),
    "any tool": chat(tools=[WEATHER], tool_choice="auto"),
    "streamed tool": chat(
        max_tokens=40, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}, **USAGE
    ),
    "priority": completion(priority=3),
    "cached prefix": completion(prompt=STORY * 20),
    "cached prefix again": completion(prompt=STORY * 20, n=3, **SAMPLED),
    "chunks": completion(prompt="word " * 900, max_tokens=4),
    "too long": completion(prompt="word " * 3000),
    "nonsense temperature": completion(temperature=-1),
    "no branches": completion(n=0),
    "no such model": completion(model="other"),
    "broken schema": chat(response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": {"type": 3}}}),
    "models": ("/v1/models", None),
    "tokenize": ("/tokenize", {"model": "m", "prompt": STORY}),
    "detokenize": ("/detokenize", {"model": "m", "tokens": [504, 3575]}),
    "pause": ("/pause", {}),
    "is paused": ("/is_paused", None),
    "resume": ("/resume", {}),
    "after the pause": completion(n=2, **SAMPLED),
}


def answer(http: httpx.Client, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Status and content; a stream as what its chunks add up to."""
    reply = http.get(path) if body is None else http.post(path, json=body)
    if body is None or not body.get("stream") or reply.status_code != 200:
        return {"status": reply.status_code, "body": plain(reply.json())}
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    return {"status": 200, "last": events[-1], "body": plain(added_up([json.loads(event) for event in events[:-1]]))}


def added_up(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What each choice comes to. How many tokens a chunk has is a matter of how fast the server's front end is."""
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return {"choices": functools.reduce(joined, [chunk["choices"] for chunk in chunks]), "usage": usage[-1:]}


def joined(before: Any, after: Any) -> Any:
    """A part of an answer and its next one: text and lists go on, and entries with an index each by itself."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before | {key: joined(before.get(key), value) for key, value in after.items()}
    if isinstance(before, list) and isinstance(after, list):
        if not all(isinstance(one, dict) and "index" in one for one in before + after):
            return before + after
        entries: dict[int, Any] = {}
        for one in before + after:
            entries[one["index"]] = joined(entries.get(one["index"]), one)
        return [entries[index] for index in sorted(entries)]
    if isinstance(before, str) and isinstance(after, str):
        return before + after
    return before if after is None else after


def plain(value: Any) -> Any:
    """Without what is different in every answer."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in VOLATILE}
    return [plain(one) for one in value] if isinstance(value, list) else value


def differences(stock: Any, ours: Any, where: str = "") -> Iterator[str]:
    """Paths at which two answers are not the same; log-probabilities may differ by rounding."""
    if isinstance(stock, dict) and isinstance(ours, dict):
        for key in stock.keys() | ours.keys():
            yield from differences(stock.get(key, "(absent)"), ours.get(key, "(absent)"), f"{where}.{key}")
    elif isinstance(stock, list) and isinstance(ours, list) and len(stock) == len(ours):
        for index, (one, other) in enumerate(zip(stock, ours, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif isinstance(stock, float) and isinstance(ours, float):
        if not math.isclose(stock, ours, rel_tol=LOGPROB_TOLERANCE, abs_tol=LOGPROB_TOLERANCE):
            yield f"{where}: {stock!r} became {ours!r}"
    elif stock != ours:
        yield f"{where}: {stock!r} became {ours!r}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the stock server says, what ours says, and our server's state afterwards."""
    folder: Path = tmp_path_factory.mktemp("differential")
    cpus = os.sched_getaffinity(0)  # each has one of its own: both run at once

    def ask(stock: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        with Server(
            str(embedded_model()),
            (*ARGS, *PARSER),
            config=None if stock else ServerConfig(slo=Slo(tpot_s=0.005)),
            stock=stock,
            embedded=True,
            env=DEVELOPER | {"VLLM_CPU_OMP_THREADS_BIND": str(min(cpus) if stock else max(cpus))},
            log=folder / f"{'stock' if stock else 'taper'}.log",
        ) as server:
            with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http:
                said = {name: answer(http, path, body) for name, (path, body) in REQUESTS.items()}
            return said, {} if stock else server.state()["engines"][0]

    with ThreadPoolExecutor() as pool:
        (stock, _), (ours, state) = pool.map(ask, (True, False))
    return stock, ours, state


def test_the_list_is_worth_its_name(answers: Any) -> None:
    stock, _, state = answers
    assert len(REQUESTS) >= 40
    refused = {name for name, one in stock.items() if one["status"] != 200}
    assert refused == {
        "greedy, n",
        "too long",
        "nonsense temperature",
        "no branches",
        "no such model",
        "broken schema",
    }
    assert state["window"]["deferred_row_steps"] > 0
    assert state["totals"]["fallbacks"] == 0


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_the_stock_server(answers: Any, name: str) -> None:
    stock, ours, _ = answers
    assert not list(differences(stock[name], ours[name]))

"""Skeleton-of-Thought answers beside serial chats: how long the answers take, and what the chats pay for it.

    python benchmarks/skeleton.py [--rounds N] [--answers N] [--chats N] [--json PATH]

Every round runs every policy, in an order that turns. `off` is the same work one row at a time, that is serially.
The outline's form is forced, so that every answer has as many points, of at most as many tokens.
The SLO lies half-way between the steps of `off` and of `eager` with all points running. Chats decode all the time;
their figures are over the gaps between tokens that lie inside the answers' time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai

from taper.client import by_protocol
from taper.engines.vllm.launch import Server, exit_on_sigterm
from taper.engines.vllm.supervise import obtain_profile
from taper.model import embedded_model

POLICIES = ("off", "eager", "taper")
POINTS, POINT_TOKENS = 8, 40
OUTLINE = r"\n".join(rf"{number}\. [a-z ]{{8,24}}" for number in range(1, POINTS + 1))
CONTEXT_TOKENS = 250  # of a row, about
QUESTIONS = (
    "What are the benefits of regular exercise?",
    "How can a city reduce its traffic?",
    "What makes a good teacher?",
    "Why should children read books?",
)


async def answer(client: openai.AsyncOpenAI, model: str, question: str) -> tuple[float, int]:
    """(seconds, tokens) of one answer."""
    start_s = time.monotonic()
    done: Any = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0.0,
        extra_body=by_protocol(
            "skeleton-of-thought",
            opening_regex=OUTLINE,
            options={"max_points": POINTS, "point_tokens": POINT_TOKENS, "outline_tokens": 200},
        ),
    )
    if len(done.usage.taper["forks"]) != POINTS:
        raise SystemExit(f"{len(done.usage.taper['forks'])} points instead of {POINTS}: the work is not the same")
    return time.monotonic() - start_s, done.usage.completion_tokens


async def chat(client: openai.AsyncOpenAI, model: str, number: int, arrivals_s: list[float]) -> None:
    """A serial request that decodes until it is cancelled; notes when its tokens came."""
    stream: Any = await client.completions.create(
        model=model,
        prompt=f"Diary of day {number}.",
        max_tokens=1900,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async with stream:
        async for _ in stream:
            arrivals_s.append(time.monotonic())


async def one_round(server: Server, model: str, answers: int, chats: int) -> dict[str, float]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        arrivals: list[list[float]] = [[] for _ in range(chats)]
        serial = [asyncio.create_task(chat(client, model, number, arrivals[number])) for number in range(chats)]
        while not all(len(times) > 5 for times in arrivals):
            await asyncio.sleep(0.05)
        start_s = time.monotonic()
        done = await asyncio.gather(*[answer(client, model, QUESTIONS[index]) for index in range(answers)])
        end_s = time.monotonic()
        for task in serial:
            task.cancel()
        await asyncio.gather(*serial, return_exceptions=True)
    inside = [[at for at in times if start_s <= at <= end_s] for times in arrivals]
    gaps = [after - before for times in inside for before, after in pairwise(times)]
    return {
        "answer_s": statistics.median(seconds for seconds, _ in done),
        "answer_tokens": sum(tokens for _, tokens in done),
        "chat_tpot_ms": 1e3 * statistics.mean(gaps),
        "chat_gap_p95_ms": 1e3 * statistics.quantiles(gaps, n=20)[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=len(QUESTIONS), choices=range(1, len(QUESTIONS) + 1))
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    exit_on_sigterm()
    log = Path(tempfile.mkdtemp(prefix="taper-skeleton-")) / "vllm.log"
    with Server(str(embedded_model()), ["--served-model-name", "m"], embedded=True, log=log) as server:
        profile, origin = obtain_profile(server, progress=print)
        if profile is None:
            raise SystemExit("the SLO is derived from a profile and none could be made")
        law, low, high = profile.latency(), options.chats + options.answers, options.chats + options.answers * POINTS
        slo_s = sum(law.predict(rows, rows * CONTEXT_TOKENS, 0) for rows in (low, high)) / 2
        print(f"profile: {origin}; TPOT SLO {1e3 * slo_s:.1f} ms")
        rounds: list[dict[str, Any]] = []
        for index in range(options.rounds):
            turn = index % len(POLICIES)
            for policy in POLICIES[turn:] + POLICIES[:turn]:
                server.configure({"policy": policy, "tpot_slo_s": slo_s})
                found = asyncio.run(one_round(server, "m", options.answers, options.chats))
                rounds.append({"round": index, "policy": policy, **found})
                print(policy, {name: round(value, 2) for name, value in found.items()}, flush=True)
    for policy in POLICIES:
        mine = [entry for entry in rounds if entry["policy"] == policy]
        line = {
            name: statistics.median(entry[name] for entry in mine)
            for name in mine[0]
            if name not in ("round", "policy")
        }
        print(f"median {policy:6s}", {name: round(value, 2) for name, value in line.items()})
    if options.json:
        options.json.write_text(json.dumps({"slo_s": slo_s, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()

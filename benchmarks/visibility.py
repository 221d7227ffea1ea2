"""What being watched costs: two TAPER servers under the same branching load, one of them watched.

    python benchmarks/visibility.py [--rounds N] [--json PATH]

Watched means: a step trace is written, `/metrics` is scraped every second, and a live page is open, that is,
`/taper/live` is asked for every half a second, as the page does. Every step of the load is planned. Rounds
alternate between the servers (ABBA, so that a drift of the machine cancels), the same requests each time. The
figure is the median over rounds of watched / unwatched throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from taper.config import ServerConfig
from taper.core.types import Slo
from taper.engines.vllm.launch import Server, exit_on_sigterm
from taper.model import embedded_model

CONCURRENCY = 4
REQUESTS = 12
BRANCHES = 6
TOKENS = 64
SCRAPE_S = 1.0
PAGE_S = 0.5
# Any law will do: with an SLO this wide every branch is admitted, so both servers run the same steps.
SLO = Slo(tpot_s=10.0)
PROFILE = {
    "schema": "taper.profile/1",
    "key": {"model": "any", "dtype": "any", "device": "any", "parallel": "any", "vllm": "any"},
    "coefficients": {"base_s": 0.014, "row_s": 5e-4, "context_s": 1.7e-6, "prefill_s": 3.6e-4},
    "capture_sizes": [],
    "fit": {},
    "created": "2026-01-01T00:00:00+00:00",
}


async def throughput_tok_s(server: Server, *, watched: bool) -> float:
    """Output tokens per second of `REQUESTS` branching requests, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, trust_env=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]

        async def one(index: int) -> int:
            body = {"model": model, "prompt": f"Story {index}: once upon a time", "max_tokens": TOKENS, "n": BRANCHES}
            async with gate:
                answer = await http.post("/v1/completions", json=body | {"ignore_eos": True})
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        watchers = [asyncio.create_task(each) for each in (scrape(http), look(http))] if watched else []
        start_s = time.monotonic()
        tokens = sum(await asyncio.gather(*[one(index) for index in range(REQUESTS)]))
        seconds = time.monotonic() - start_s
        for watcher in watchers:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        return tokens / seconds


async def scrape(http: httpx.AsyncClient) -> None:
    while True:
        (await http.get("/metrics")).raise_for_status()
        await asyncio.sleep(SCRAPE_S)


async def look(http: httpx.AsyncClient) -> None:
    since = 0
    while True:
        answer = await http.get("/taper/live", params={"since": since})
        answer.raise_for_status()
        timeline = answer.json()["engines"][0]["timeline"]
        since = int(timeline[-1][0]) if timeline else since
        await asyncio.sleep(PAGE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    exit_on_sigterm()
    model = str(embedded_model())
    folder = Path(tempfile.mkdtemp(prefix="taper-visibility-"))
    plain = ServerConfig(profile=PROFILE, slo=SLO)
    traced = ServerConfig(profile=PROFILE, slo=SLO, trace=str(folder / "trace.jsonl"))
    with (
        Server(model, embedded=True, config=plain, log=folder / "plain.log") as alone,
        Server(model, embedded=True, config=traced, log=folder / "watched.log") as seen,
    ):
        for server in (alone, seen):
            asyncio.run(throughput_tok_s(server, watched=server is seen))  # warm-up
        rounds = []
        for index in range(options.rounds):
            order = (alone, seen) if index % 2 == 0 else (seen, alone)
            found = {server is seen: asyncio.run(throughput_tok_s(server, watched=server is seen)) for server in order}
            rounds.append({"unwatched_tok_s": found[False], "watched_tok_s": found[True]})
            print(f"round {index + 1}: unwatched {found[False]:.0f} tok/s, watched {found[True]:.0f} tok/s", flush=True)
        (state,) = seen.state()["engines"]
    dropped, fallbacks = state["counters"]["trace_dropped"], state["totals"]["fallbacks"]
    ratios = sorted(entry["watched_tok_s"] / entry["unwatched_tok_s"] for entry in rounds)
    median = statistics.median(ratios)
    print(
        f"watched / unwatched: median {median:.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}; "
        f"decisions dropped {dropped}, fallbacks {fallbacks}"
    )
    if options.json:
        result = {"schema": "taper.visibility/1", "ratio_median": median, "rounds": rounds, "fallbacks": fallbacks}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

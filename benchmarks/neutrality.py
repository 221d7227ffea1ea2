"""What TAPER costs where it has nothing to do: serial traffic on a stock server and on one under `taper`.

    python benchmarks/neutrality.py [--rounds N] [--json PATH]

Both servers stay up; rounds alternate between them (ABBA, so that a drift of the machine cancels), the same
requests each time. The figure is the median over rounds of throughput under TAPER / stock throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from taper.engines.vllm.launch import Server, exit_on_sigterm
from taper.model import embedded_model

CONCURRENCY = 12
REQUESTS = 36
TOKENS = 96


async def throughput_tok_s(server: Server) -> float:
    """Output tokens per second of `REQUESTS` serial requests, `CONCURRENCY` at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, trust_env=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]

        async def one(index: int) -> int:
            body = {"model": model, "prompt": f"Story {index}: once upon a time", "max_tokens": TOKENS}
            async with gate:
                answer = await http.post("/v1/completions", json=body | {"ignore_eos": True, "temperature": 0})
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        start_s = time.monotonic()
        tokens = sum(await asyncio.gather(*[one(index) for index in range(REQUESTS)]))
        return tokens / (time.monotonic() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    exit_on_sigterm()
    model = str(embedded_model())
    logs = Path(tempfile.mkdtemp(prefix="taper-neutrality-"))
    with (
        Server(model, embedded=True, stock=True, log=logs / "stock.log") as stock,
        Server(model, embedded=True, log=logs / "taper.log") as regulated,
    ):
        for server in (stock, regulated):
            asyncio.run(throughput_tok_s(server))  # warm-up
        rounds = []
        for index in range(options.rounds):
            order = (stock, regulated) if index % 2 == 0 else (regulated, stock)
            found = {server.stock: asyncio.run(throughput_tok_s(server)) for server in order}
            rounds.append({"stock_tok_s": found[True], "taper_tok_s": found[False]})
            print(f"round {index + 1}: stock {found[True]:.0f} tok/s, taper {found[False]:.0f} tok/s", flush=True)
        fallbacks = sum(engine["totals"]["fallbacks"] for engine in regulated.state()["engines"])
    ratios = sorted(entry["taper_tok_s"] / entry["stock_tok_s"] for entry in rounds)
    median = statistics.median(ratios)
    print(f"taper / stock: median {median:.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}; fallbacks {fallbacks}")
    if options.json:
        result = {"schema": "taper.neutrality/1", "ratio_median": median, "rounds": rounds, "fallbacks": fallbacks}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

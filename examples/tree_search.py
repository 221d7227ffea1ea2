"""One level of a tree search: expand a node, look ahead from every child in a nested fork, keep the best child."""

from __future__ import annotations

import argparse
import asyncio

import openai

from taper.client import AsyncTaper, Branch, BranchResult, Fork, Program

PROBLEM = "A farmer has 3 fields with 12 trees each and plants 4 more trees. How many trees are there?"


def score(looks: list[BranchResult]) -> float:
    """Share of the looks ahead that come to the same number as the problem asks for; a real search has a judge."""
    return sum("40" in look.text for look in looks) / len(looks)


def best(program: Program) -> tuple[float, BranchResult]:
    steps = [branch for branch in program.branches if branch.parent == "0"]
    scored = [(score([look for look in program.branches if look.parent == step.id]), step) for step in steps]
    return max(scored, key=lambda pair: pair[0])


async def search(url: str, width: int, looks: int) -> None:
    taper = AsyncTaper(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))
    ahead = Fork(branches=[Branch(suffix="\nSo the answer is", max_tokens=12, stop=["\n"]) for _ in range(looks)])
    program = await taper.fork(
        [
            Branch(id=f"step {number}", suffix="Step 1:", max_tokens=40, stop=["\n"], fork=ahead)
            for number in range(width)
        ],
        messages=[{"role": "user", "content": PROBLEM}],
        temperature=0.9,
        seed=3,
    )
    value, step = best(program)
    print(f"{len(program.branches)} branches; best of {width} with {value:.2f}: {step.label}:{step.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--looks", type=int, default=3)
    args = parser.parse_args()
    asyncio.run(search(args.url, args.width, args.looks))


if __name__ == "__main__":
    main()

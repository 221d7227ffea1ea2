"""Best of n with a vote: one prompt, n branches, the answer that most of them give."""

from __future__ import annotations

import argparse
from collections import Counter

import openai

from taper.client import Branch, Program, Taper

QUESTION = "Which is larger, the sun or the moon? Answer with one word."


def vote(program: Program) -> Counter[str]:
    """Answers by their first word."""
    words = [branch.text.split() for branch in program.branches]
    return Counter(said[0].strip(".,!").lower() if said else "" for said in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--n", type=int, default=8)
    args = parser.parse_args()
    taper = Taper(openai.OpenAI(base_url=f"{args.url}/v1", api_key="none"))
    program = taper.fork(
        # The same suffix everywhere, so "The" is forced: branches differ in their seed only.
        [Branch(suffix="The", max_tokens=6, stop=["."]) for _ in range(args.n)],
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0.8,
        seed=1,
    )
    for answer, votes in vote(program).most_common():
        print(f"{votes:3d}  the {answer}")


if __name__ == "__main__":
    main()

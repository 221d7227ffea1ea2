"""Skeleton-of-Thought: an outline, then all its points at once, read as one ordered answer by the stock client."""

from __future__ import annotations

import argparse

import openai

from taper.client import by_protocol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--question", default="What are the benefits of regular exercise?")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=300,  # also of a plain answer, where the outline has no points
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=by_protocol("skeleton-of-thought", options={"point_tokens": 60}),
    )
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n[{chunk.usage.taper['branch_tokens']} tokens in {len(chunk.usage.taper['forks'])} branches]")


if __name__ == "__main__":
    main()

"""Map and reduce: every section is summed up in a branch of its own, and the join writes one line about all."""

from __future__ import annotations

import argparse

import openai

from taper.client import Branch, Continuation, Join, Taper

SECTIONS = {
    "Bees": "Bees visit flowers for nectar and carry pollen from one to the next. Without them there is no fruit.",
    "Rain": "Water rises from the sea, cools into clouds and falls as rain. Rivers bring it back to the sea.",
    "Bread": "Flour, water, salt and yeast make a dough. The yeast fills it with gas, and the oven sets its shape.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    taper = Taper(openai.OpenAI(base_url=f"{args.url}/v1", api_key="none"))
    program = taper.fork(
        [
            Branch(
                id=title,
                messages=[{"role": "user", "content": f"Sum up in one short sentence: {text}"}],
                suffix=f"{title}:",
                max_tokens=40,
                stop=["\n"],
            )
            for title, text in SECTIONS.items()
        ],
        messages=[{"role": "system", "content": "You sum up texts for children."}],
        join=Join(instruction="All three are about", continuation=Continuation(max_tokens=24, stop=["\n"])),
        temperature=0.0,
    )
    for branch in program.branches:
        print(f"{branch.label}:{branch.text}")
    print(f"All three are about{program.text}")
    print(f"tokens handed over at the join: {program.usage['taper']['join_tokens']}")


if __name__ == "__main__":
    main()

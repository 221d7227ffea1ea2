"""Generated outputs of models that speak a protocol, well-formed and mutated, from seeds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

WORDS = (
    "the", "sum", "of", "two", "is", "prime,", "so", "3", "<", "5;", "x", ">", "y", "<b>bold</b>", "1:", "maybe",
    "<Goal", "2.", "next\n\n", "é", "漢字", "🙂", "</",
)  # fmt: skip


def prose(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def outline(rng: random.Random, list_tag: str, branch_tag: str, prefix: str = "", depth: int = 0) -> str:
    """One parallel block as Multiverse and ThreadWeaver write it, with its branches; ids may nest."""
    ids = [f"{prefix}{number}" for number in range(1, rng.randint(1, 4) + 1)]
    items = "\n".join(f"<Outline> {name}: {prose(rng, 6)}</Outline>" for name in ids)
    branches = ""
    for name in ids:
        nested = outline(rng, list_tag, branch_tag, f"{name}.", depth + 1) if depth < 1 and rng.random() < 0.2 else ""
        branches += f"\n<{branch_tag}>\n{name}: {prose(rng)}{nested}</{branch_tag}>"
    return f"<{list_tag}>\n{items}\n</{list_tag}>{branches}\n<Conclusion>\n{prose(rng)}\n"


def multiverse(rng: random.Random) -> str:
    return "".join(prose(rng) + outline(rng, "Goal", "Path") for _ in range(rng.randint(1, 3)))


def threadweaver(rng: random.Random) -> str:
    return "".join(prose(rng) + outline(rng, "Outlines", "Thread") for _ in range(rng.randint(1, 3)))


def sprint(rng: random.Random) -> str:
    text = ""
    for stage in range(1, rng.randint(1, 4) + 1):
        ids = [f"{stage}.{number}" for number in range(1, rng.randint(0, 4) + 1)]
        prompts = "\n".join(f"<prompt_{name}> {prose(rng, 6)} </prompt_{name}>" for name in ids)
        runs = "".join(f"<execution_{name}>\n{prose(rng)}</execution_{name}>\n" for name in ids)
        text += f"<Plan_{stage}>\n{prose(rng)}\n{prompts}\n</Plan_{stage}>\n{runs}"
    return text


def hpd(rng: random.Random) -> str:
    return "".join(prose(rng, 5) + "<FORK>" for _ in range(rng.randint(1, 8))) + prose(rng)


def skeleton(rng: random.Random) -> str:
    points = range(1, rng.randint(3, 10) + 1)
    return prose(rng, 3) + "\n" + "\n".join(f"{number}. {rng.choice(WORDS)} {prose(rng, 3)}" for number in points)


GRAMMARS: dict[str, Callable[[random.Random], str]] = {
    "multiverse": multiverse,
    "threadweaver": threadweaver,
    "sprint": sprint,
    "hpd": hpd,
    "skeleton-of-thought": skeleton,
}
TAGS = (
    "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>", "</Path>", "<Outlines>", "</Outlines>", "</Thread>",
    "<Plan_1>", "</Plan_1>", "</Plan_2>", "<Plan_1.1>", "<prompt_1.1>", "<prompt>", "</prompt_1.2>", "</execution_1.1>",
    "<FORK>", "</FORK>", "<CHILD>", "<FORK_1>", "<", "</", ">", "<Goal_", "<Plan_" + "1" * 60 + ">", "1:", "\n2. ",
)  # fmt: skip


def mutate(rng: random.Random, text: str) -> str:
    """A few cuts, copies, swaps, stray tags and flipped characters."""
    for _ in range(rng.randint(1, 5)):
        low, high = sorted(rng.randint(0, len(text)) for _ in range(2))
        high = min(high, low + 40)
        at = rng.randint(0, len(text))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:low] + text[high:]
        elif kind == 1:
            text = text[:at] + text[low:high] + text[at:]
        elif kind == 2:
            text = text[:at] + rng.choice(TAGS) + text[at:]
        elif kind == 3:
            text = text[: max(at, 1)]
        elif kind == 4:
            text = re.sub(r"\d", lambda found: rng.choice("123") if rng.random() < 0.3 else found[0], text)
        else:
            text = text[:at] + rng.choice("<>/_\n1. ") + text[at + 1 :]
    return text


def pieces(rng: random.Random, text: str) -> Iterator[str]:
    """Cut as a tokenizer would, only worse: one to six characters at a time."""
    at = 0
    while at < len(text):
        size = rng.choice((1, 1, 2, 3, 4, 6))
        yield text[at : at + size]
        at += size

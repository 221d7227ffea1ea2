"""What a branch's whole text says, read all at once with regular expressions: (offset, what) in order.

`what` is the tuple of labels of a fork, or "end".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Found = list[tuple[int, tuple[str, ...] | str]]


def labels(items: Iterable[tuple[str | None, str]], prefix: str = "") -> tuple[str, ...]:
    """Items as (id or None, text): the first of an id stands, a missing one is its position."""
    kept: list[str] = []
    for position, (given, _) in enumerate(items, start=1):
        name = given if given is not None else f"{prefix}{position}"
        if name not in kept:
            kept.append(name)
    return tuple(kept)


def outline(text: str, list_tag: str, branch_tag: str, *, is_root: bool) -> Found:
    found: Found = []
    begins = None
    for tag in re.finditer(rf"<(/?)({list_tag}|{branch_tag})>", text):
        if tag[2] == branch_tag:
            if tag[1] and not is_root:
                found.append((tag.end(), "end"))
                begins = None
        elif not tag[1]:
            begins = tag.end()
        elif begins is not None:
            inner = re.findall(r"<Outline>(.*?)(?=</?Outline>|\Z)", text[begins : tag.start()], re.DOTALL)
            ids = [re.match(r"\s*(\d+(?:\.\d+)*)\s*:", item) for item in inner]
            if inner:
                found.append((tag.end(), labels([(name[1] if name else None, "") for name in ids])))
            begins = None
    return found


def sprint(text: str, *, is_root: bool) -> Found:
    if not is_root:
        ends = re.finditer(r"</execution(?:_\d[\d.]*)?>", text)
        return [(tag.end(), "end") for tag in ends if len(tag[0]) <= 48]
    found: Found = []
    plan = None
    for tag in re.finditer(r"<(/?)Plan_(\d+)>", text):
        if len(tag[0]) > 48:
            continue
        if not tag[1]:
            plan = (tag[2], tag.end())
        elif plan is not None and plan[0] == tag[2]:
            inner = re.findall(
                r"<prompt(?:_(\d[\d.]*))?>(.*?)(?=</?prompt(?:_\d[\d.]*)?>|\Z)", text[plan[1] : tag.start()], re.DOTALL
            )
            if inner:
                found.append((tag.end(), labels([(name or None, "") for name, _ in inner], f"{plan[0]}.")))
            plan = None
    return found


def hpd(text: str) -> Found:
    ends = [tag.end() for tag in re.finditer("<FORK>", text)]
    return [(end, (str(number),)) for number, end in enumerate(ends, start=1)]


def is_point(line: str) -> bool:
    """Number, dot or bracket, blank, words; the number may be bold."""
    head, *rest = line.split() or [""]
    bold = head.startswith("**") and head.endswith("**") and len(head) > 4
    number = head[2:-2] if bold else head
    return number[:-1].isascii() and number[:-1].isdigit() and len(number) <= 3 and number[-1] in ".)" and bool(rest)


def skeleton(text: str, *, is_root: bool, most: int = 10) -> Found:
    if not is_root:
        return []
    points = sum(is_point(line) for line in text.split("\n"))
    names = tuple(str(number) for number in range(1, min(points, most) + 1))
    return [(len(text), names if points > 1 else ("1",))]


def read(grammar: str, text: str, *, is_root: bool) -> Found:
    if grammar == "multiverse":
        return outline(text, "Goal", "Path", is_root=is_root)
    if grammar == "threadweaver":
        return outline(text, "Outlines", "Thread", is_root=is_root)
    if grammar == "sprint":
        return sprint(text, is_root=is_root)
    if grammar == "hpd":
        return hpd(text)
    return skeleton(text, is_root=is_root)

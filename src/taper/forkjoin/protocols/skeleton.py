"""Skeleton-of-Thought, for any instruct model: an outline first, then every point written out in parallel.

The outline call lists 3 to 10 numbered points. Each point is a branch whose prompt holds the question and the
outline and ends in the point; the answer is the points in order. Without a usable outline the question is
answered as it is, in one branch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from taper.core.types import ConfigError, check_range
from taper.forkjoin.plan import BranchSpec, Event, Fork, Leg, Message
from taper.forkjoin.protocol import Options

_POINT = re.compile(r"^[ \t]*(?:\*\*)?(\d{1,2})[.)](?:\*\*)?[ \t]+(\S.*)$", re.MULTILINE)
_LEAST = 2

_OUTLINE = (
    "Write only the outline of an answer to the question below: a numbered list of 3 to 10 points, "
    "each 3 to 5 words long. Do not write the answer itself.\n\nQuestion: {question}"
)
_WRITE = (
    "Question: {question}\n\nOutline of the answer:\n{outline}\n\n"
    "Write out one point of this outline in one or two sentences. Do not write about the other points."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    max_points: int = 10
    outline_tokens: int = 120
    point_tokens: int = 160
    name: str = "skeleton-of-thought"
    keeps_special_tokens: bool = False

    @classmethod
    def from_options(cls, options: Options) -> Skeleton:
        """Options: max_points (2-10; points beyond are left out), outline_tokens and point_tokens (1-100000).

        Raises `ConfigError`.
        """
        ranges = {"max_points": (_LEAST, 10), "outline_tokens": (1, 100_000), "point_tokens": (1, 100_000)}
        for name, value in options.items():
            if name not in ranges:
                raise ConfigError(f"taper.options: unknown {name!r} for {cls().name}; known: {', '.join(ranges)}")
            low, high = ranges[name]
            check_range(f"taper.options.{name}", value, low=low, high=high, unit="")
            if not isinstance(value, int):
                raise ConfigError(f"taper.options.{name} must be an integer, not {value!r}")
        return cls(**options)

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        question = _question(messages)
        ask = {"role": "user", "content": _OUTLINE.format(question=question)}
        return BranchSpec(
            label="",
            messages=(*messages[:-1], ask),
            leg=Leg(max_tokens=self.outline_tokens, is_visible=False),
            plan=tuple(messages),
        )

    def parser(self, spec: BranchSpec, *, is_root: bool) -> SkeletonParser:
        return SkeletonParser(self, spec.plan if is_root and isinstance(spec.plan, tuple) else None)

    def fork(self, at: int, points: Sequence[tuple[str, str]], messages: tuple[Message, ...]) -> Fork:
        outline = "\n".join(f"{label}. {text}" for label, text in points)
        ask = {"role": "user", "content": _WRITE.format(question=_question(messages), outline=outline)}
        leg = Leg(max_tokens=self.point_tokens, stop=("\n",))  # one paragraph: what follows is another point
        branches = tuple(
            BranchSpec(
                label=label,
                header=f"{label}. {text}:",
                messages=(*messages[:-1], ask),  # the same for all points, so that its KV is shared
                leg=leg,
                closing="\n\n",
            )
            for label, text in points
        )
        return Fork(at=at, branches=branches)


class SkeletonParser:
    """Points by the line; only the end of the outline tells that it is complete. Points write no forks."""

    def __init__(self, family: Skeleton, messages: tuple[Message, ...] | None) -> None:
        self.malformed = 0
        self._family = family
        self._messages = messages
        self._text: list[str] = []

    def feed(self, text: str) -> list[Event]:
        if self._messages is not None:
            self._text.append(text)
        return []

    def close(self) -> list[Event]:
        if self._messages is None:
            return []
        messages, self._messages = self._messages, None
        text = "".join(self._text)
        points = [match[2].rstrip() for match in _POINT.finditer(text)]
        if len(points) < _LEAST:
            self.malformed += 1
            whole = BranchSpec(label="1", messages=messages)
            return [Fork(at=len(text), branches=(whole,))]
        numbered = [(str(number), point) for number, point in enumerate(points[: self._family.max_points], start=1)]
        return [self._family.fork(len(text), numbered, messages)]


def _question(messages: Sequence[Message]) -> str:
    """Raises `ConfigError` unless the last message is a user's and plain text."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if last.get("role") != "user" or not isinstance(content, str):
        raise ConfigError("messages must end with a user message in plain text for skeleton-of-thought")
    return content

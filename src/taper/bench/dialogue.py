"""What is sent for each stage of a request: the prompt so far, and what its branches add to it.

A fork's calls have the prompt so far in common, so the server finds it in its prefix cache. After a join the
next prompt is the old one plus what every branch said, the longest branch first: of that one the cache holds
everything, and the others are computed again.

`TokenDialogue` speaks token ids, so lengths are exact and prefixes are hit to the token. `ChatDialogue` speaks
text and turns, which every OpenAI-compatible server takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from taper.bench.stream import Output
from taper.workload.prompts import TOKEN_IDS, prompt_ids, prompt_text
from taper.workload.request import Request, Stage

DialogueName = Literal["chat", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request of a stage."""

    first: int  # its first branch within the stage
    branches: int  # n
    max_tokens: int
    headed: bool  # a branch header follows the common prefix


def calls_of(stage: Stage, *, is_first: bool) -> tuple[Call, ...]:
    """A serial stage and a fork of equal branches at arrival are one call; any other fork is one call per branch."""
    if len(stage) == 1 or (is_first and len(set(stage)) == 1):
        return (Call(first=0, branches=len(stage), max_tokens=stage[0], headed=False),)
    return tuple(Call(first=at, branches=1, max_tokens=tokens, headed=True) for at, tokens in enumerate(stage))


class Dialogue(Protocol):
    def body(self, call: Call) -> Mapping[str, Any]:
        """The fields that say what to continue."""
        ...

    def join(self, said: Sequence[tuple[Call, Output]]) -> None:
        """Take up what the branches of a stage said: each branch's call and output, in their order."""
        ...


class TokenDialogue:
    """Prompts as token ids; a branch header is one id of its own."""

    def __init__(self, request: Request) -> None:
        self._prefix = prompt_ids(request)

    def body(self, call: Call) -> Mapping[str, Any]:
        return {"prompt": [*self._prefix, *self._header(call)]}

    def join(self, said: Sequence[tuple[Call, Output]]) -> None:
        parts = [[*self._header(call), *output.token_ids] for call, output in said]
        for part in sorted(parts, key=len, reverse=True):
            self._prefix += part

    def _header(self, call: Call) -> list[int]:
        return [TOKEN_IDS[0] + call.first] if call.headed else []


class ChatDialogue:
    """Prompts as chat messages; a branch header is a user's turn, and so is the word that goes on after a join."""

    def __init__(self, request: Request) -> None:
        self._messages: list[dict[str, str]] = [{"role": "user", "content": prompt_text(request)}]

    def body(self, call: Call) -> Mapping[str, Any]:
        messages = list(self._messages)
        if call.headed:
            messages[-1] = {"role": "user", "content": f"{messages[-1]['content']} Part {call.first + 1}:"}
        return {"messages": messages}

    def join(self, said: Sequence[tuple[Call, Output]]) -> None:
        texts = sorted((output.text for _, output in said), key=len, reverse=True)
        self._messages += [
            {"role": "assistant", "content": "\n".join(texts)},
            {"role": "user", "content": "Go on."},
        ]

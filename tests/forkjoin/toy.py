"""A stand-in for an engine: a token per character, replies from a function of the prompt, a prefix cache in blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BLOCK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyChunk:
    token_ids: Sequence[int]
    text: str
    finish: str | None
    stop: str | None
    cached_tokens: int


@dataclass(slots=True)
class ToyEngine:
    """`reply(prompt)` is what the model would say; it is cut at a stop string or at max_tokens.

    A reply that begins with "!" fails with the rest as its message; one that begins with "~" never ends.
    """

    reply: Callable[[str], str]
    max_model_tokens: int = 1000
    max_rows: int = 16
    replicas: int = 1
    chunk: int = 1  # tokens per chunk
    models: Sequence[str] = ("toy",)
    live: dict[int, str] = field(default_factory=dict)  # run -> request id
    most_live: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)  # prompt and arguments of every run
    aborted: list[str] = field(default_factory=list)
    _cache: set[str] = field(default_factory=set)

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int], *, keeps_special_tokens: bool) -> str:
        return "".join(map(chr, ids))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if any(message["role"] == "clown" for message in messages):
            raise ValueError("no clowns")
        return self.encode("".join(f"[{message['content']}]" for message in messages) + ">")

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Mapping[str, Any],
        *,
        kept_stops: Sequence[str],
        request_id: str,
        extra_args: Mapping[str, Any],
        replica: int | None,
    ) -> AsyncGenerator[ToyChunk, None]:
        prompt = self.decode(prompt_ids, keeps_special_tokens=True)
        number = len(self.runs)
        self.runs.append({"prompt": prompt, **sampling, "extra": extra_args, "replica": replica, "id": request_id})
        assert len(prompt_ids) + sampling["max_tokens"] <= self.max_model_tokens
        self.live[number] = request_id
        self.most_live = max(self.most_live, len(self.live))
        cached = self._cached(prompt)
        self._remember(prompt)
        try:
            text, finish = self._cut(self.reply(prompt), sampling)
            said = ""
            while finish != "never" or len(said) < sampling["max_tokens"]:
                await asyncio.sleep(0)
                piece = text[len(said) : len(said) + self.chunk] if finish != "never" else "~"
                said += piece
                is_last = finish != "never" and len(said) == len(text)
                self._remember(prompt + said, len(prompt + said) - 1)
                yield ToyChunk(
                    token_ids=self.encode(piece),
                    text=piece,
                    finish=finish if is_last else None,
                    stop=next((stop for stop in sampling["stop"] if is_last and text.endswith(stop)), None),
                    cached_tokens=cached,
                )
                if is_last:
                    return
            yield ToyChunk(token_ids=(), text="", finish="length", stop=None, cached_tokens=cached)
        finally:
            del self.live[number]

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def _cut(self, text: str, sampling: Mapping[str, Any]) -> tuple[str, str]:
        if text.startswith("!"):
            raise RuntimeError(text[1:])
        if text.startswith("~"):
            return "", "never"
        ends = [text.index(stop) + len(stop) for stop in sampling["stop"] if stop in text]
        text, most = text[: min(ends, default=len(text))], sampling["max_tokens"]
        if sampling.get("ignore_eos"):
            text = (text or ".") * most
        return (text, "stop") if len(text) <= most and not sampling.get("ignore_eos") else (text[:most], "length")

    def _cached(self, prompt: str) -> int:
        blocks = 0
        while (blocks + 1) * BLOCK < len(prompt) and prompt[: (blocks + 1) * BLOCK] in self._cache:
            blocks += 1
        return blocks * BLOCK

    def _remember(self, text: str, since: int = 0) -> None:
        """KV exists for all but the last token, in whole blocks; up to `since` they are known."""
        for end in range(max(since // BLOCK, 1) * BLOCK, len(text), BLOCK):
            self._cache.add(text[:end])

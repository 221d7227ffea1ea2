"""What fork and join needs of an engine. Token ids go in and come out: text that exists is never tokenised again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from taper.forkjoin.plan import Message


class Chunk(Protocol):
    """What a run has generated since the last chunk.

    text ends with the stop string that ended the run if that one is kept; token_ids hold no end-of-sequence token.
    finish: "stop", "length" or another word of the engine's for a run that did not end well; None while it runs.
    stop: the stop string that ended the run, if one did.
    cached_tokens: prompt tokens whose KV was there already; set on the first chunk at the latest.
    """

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def text(self) -> str: ...
    @property
    def finish(self) -> str | None: ...
    @property
    def stop(self) -> str | None: ...
    @property
    def cached_tokens(self) -> int: ...


class Engine(Protocol):
    @property
    def models(self) -> Sequence[str]:
        """Names the served model answers to."""

    @property
    def max_model_tokens(self) -> int: ...
    @property
    def max_rows(self) -> int:
        """Branches one engine replica holds at once."""

    @property
    def replicas(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, nothing added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of the beginning of a text, with what the model wants in front of it."""

    def decode(self, ids: Sequence[int], *, keeps_special_tokens: bool) -> str: ...

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat up to where the assistant speaks. Raises ValueError for messages it cannot render."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Mapping[str, Any],
        *,
        kept_stops: Sequence[str],
        request_id: str,
        extra_args: Mapping[str, Any],
        replica: int | None,
    ) -> AsyncGenerator[Chunk, None]:
        """One run. Closing the generator aborts it.

        sampling: OpenAI's and vLLM's names; `structured_regex` constrains the output; unset ones are the model's own.
        kept_stops: stop strings that are part of the text: a grammar's, not a client's.
        extra_args: what the scheduler reads (`vllm_xargs`).
        replica: which engine replica must run it; None where there is one.
        """

    async def abort(self, request_id: str) -> None:
        """End every run under this id."""

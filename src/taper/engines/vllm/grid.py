"""Which loads a calibration visits, and in which order. Pure: bounds of the engine in, visits out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from taper.core.types import ConfigError

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
CHUNK_SHARES = (0.25, 0.5, 1.0)  # of the largest prefill chunk
PREFILL_ROWS = (1, 8, 32)
PREFIXES = 32  # distinct prompts that rows share: the fewer, the more its caches flatter the processor, and the law
LEAST_CONTEXT_BLOCKS = 8  # the longest context spans at least so many, however slow the machine
MAX_PROMPT_TOKENS = 400_000  # per request body


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the engine can hold at once; see `facts.engine_facts`."""

    max_rows: int
    max_model_tokens: int
    max_step_tokens: int
    block_tokens: int
    kv_tokens: int
    max_context_tokens: int = CONTEXTS[-1]  # what there is time to prefill

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Bounds:
        names = ("max_rows", "max_model_tokens", "max_step_tokens", "block_tokens", "kv_tokens")
        return cls(**{name: int(facts[name]) for name in names})

    @property
    def chunk_tokens(self) -> int:
        """The longest prompt that one step prefills."""
        return min(self.max_step_tokens, self.max_model_tokens - 2)

    def within(self, prefill_tokens: float) -> Bounds:
        """The same, with contexts short enough to prefill every prefix with so many tokens in all."""
        shortest = LEAST_CONTEXT_BLOCKS * self.block_tokens
        return replace(self, max_context_tokens=max(int(prefill_tokens / PREFIXES), shortest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """`steps` steps of `rows` rows with `context_tokens` each, beside a new prompt of `prefill_tokens`."""

    rows: int
    context_tokens: int
    steps: int
    prefill_tokens: int = 0


def row_counts(bounds: Bounds) -> tuple[int, ...]:
    """Row counts worth visiting, ascending, up to what fits in one step."""
    most = min(bounds.max_rows, bounds.max_step_tokens)
    return tuple(rows for rows in ROWS if rows <= most)


def context_lengths(bounds: Bounds, steps: int) -> tuple[int, ...]:
    """Context lengths in whole cache blocks, so that a visit finds its prefix cached to the last token.

    Raises `ConfigError` if the engine has no room for two different ones.
    """
    most = min(bounds.max_context_tokens, bounds.max_model_tokens - steps - 2, bounds.kv_tokens // (2 * PREFIXES))
    block = bounds.block_tokens
    lengths = sorted({context // block * block for context in CONTEXTS if block <= context <= most})
    if len(lengths) < 2:
        raise ConfigError(
            f"no room to calibrate: {bounds.kv_tokens} tokens of KV cache and a model length of "
            f"{bounds.max_model_tokens} allow contexts up to {max(most, 0)} tokens"
        )
    return tuple(lengths)


def fits(rows: int, context_tokens: int, steps: int, bounds: Bounds) -> bool:
    """Whether the rows' own tokens and the shared prefixes fit into the KV cache, and the prompts into a request."""
    own = rows * (steps + 2 * bounds.block_tokens)
    shared = PREFIXES * context_tokens
    return own + shared <= 0.9 * bounds.kv_tokens and rows * context_tokens <= MAX_PROMPT_TOKENS


def decode_pass(rows: tuple[int, ...], bounds: Bounds, steps: int, rng: random.Random) -> list[Visit]:
    """Every cell of rows x context once. Corners first, so that a pass cut short still spans the range."""
    contexts = context_lengths(bounds, steps)
    cells = [(row, context) for row in rows for context in contexts if fits(row, context, steps, bounds)]
    low, high = (rows[0], contexts[0]), (rows[-1], contexts[-1])
    corners = [cell for cell in dict.fromkeys([low, high, (low[0], high[1]), (high[0], low[1])]) if cell in cells]
    others = [cell for cell in cells if cell not in corners]
    rng.shuffle(others)
    return [Visit(rows=row, context_tokens=context, steps=steps) for row, context in corners + others]


def prefill_pass(rows: tuple[int, ...], bounds: Bounds, steps: int) -> list[Visit]:
    """New prompts of several lengths beside a few decoding rows."""
    contexts = context_lengths(bounds, steps)
    context = contexts[len(contexts) // 2]
    counts = [count for count in PREFILL_ROWS if count <= rows[-1]]
    return [
        Visit(
            rows=count,
            context_tokens=context,
            steps=2 * steps,  # long enough for the prompts to come in
            prefill_tokens=max(int(share * (bounds.chunk_tokens - count)), 1),
        )
        for count in counts
        for share in CHUNK_SHARES
        if fits(count, context, steps, bounds)
    ]


def passes(rows: tuple[int, ...], bounds: Bounds, steps: int, seed: int) -> Iterator[Visit]:
    """Visits without end: decode and prefill passes, each in another order."""
    rng = random.Random(seed)  # noqa: S311 - an order to measure in, no secret
    while True:
        decode = decode_pass(rows, bounds, steps, rng)
        prefill = prefill_pass(rows, bounds, steps)
        rng.shuffle(prefill)
        # Prefill visits spread evenly over the pass: time may run out anywhere in it.
        every = max(len(decode) // max(len(prefill), 1), 1)
        for at, visit in enumerate(decode):
            yield visit
            if at % every == 0 and prefill:
                yield prefill.pop()
        yield from prefill

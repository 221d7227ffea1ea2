"""Prompts of a request: text from a bank of short questions, or token ids of an exact number.

Serial prompts ask one question; branching prompts ask for something worth several independent tries. No two
neighbours share a beginning: a prefix cache must not find one prompt inside another.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from taper.workload.request import Request

_STREAM = 3
_TOKENS_PER_WORD = 1.3  # of plain English, in the vocabularies of today's models
# Ids that every current vocabulary has and that stand for no control token.
TOKEN_IDS = (1000, 30_000)

_TOPICS = (
    "a lighthouse keeper on a rocky island",
    "the water cycle in a mountain valley",
    "a bakery that opens before sunrise",
    "the rules of badminton",
    "how bees find their way home",
    "a train journey through the night",
    "growing tomatoes on a small balcony",
    "the moons of Jupiter",
    "a violin that is two hundred years old",
    "why bread rises",
    "learning to swim as an adult",
    "the history of paper",
    "a robot that sorts library books",
    "keeping a bicycle in good shape",
    "volcanoes under the sea",
    "a market in a harbour town",
    "the first day at a new job",
    "how a refrigerator moves heat",
    "the migration of storks",
    "a garden on the roof of a school",
    "telling a good story to children",
    "the shadow of a sundial",
    "a clockmaker and his apprentice",
    "planning a week of simple dinners",
    "what makes a bridge stable",
    "a fox that lives in the city",
    "the sound of rain on a tin roof",
    "saving energy in an old house",
    "the invention of the zip fastener",
    "a letter found in a second-hand coat",
    "how tides follow the moon",
    "a chess game between two old friends",
    "the smell of a pine forest",
    "teaching a dog to wait",
    "the colours of autumn leaves",
    "an astronaut who misses the sea",
    "how glass is made from sand",
    "a choir rehearsal in winter",
    "packing light for a long walk",
    "the difference between weather and climate",
)

_AUDIENCES = (
    "for a curious ten-year-old",
    "for someone in a hurry",
    "for a visitor from abroad",
    "in the style of a museum guide",
    "as if it were a short radio piece",
    "for a reader who likes numbers",
    "in plain and friendly words",
    "for a class of beginners",
    "the way a patient teacher would",
    "for the notice board of a village",
)

_SERIAL = (
    "Explain {topic} {audience}. Begin with the most surprising fact.",
    "Write a short paragraph about {topic}, {audience}, and end with a question.",
    "What should one know about {topic}? Answer {audience} and avoid lists.",
    "My neighbour asked me about {topic}. Help me to answer {audience}.",
    "Describe {topic} {audience}. Mention one smell, one sound and one colour.",
    "Summarise what matters most about {topic} {audience}, in a few sentences.",
    "I have five minutes to speak about {topic}. Draft the opening {audience}.",
    "Tell me about {topic}. Keep it warm, write {audience}, and use an example.",
)

_BRANCHING = (
    "Suggest an original title and a first sentence for a piece about {topic}, written {audience}.",
    "Give one fresh idea that has to do with {topic}. Explain it {audience} and say why it could work.",
    "Solve this step by step: how would you organise an afternoon about {topic} {audience}?",
    "Propose a plan with three steps for a project about {topic}. Present it {audience}.",
    "Write a small scene around {topic} with two people who disagree. Tell it {audience}.",
    "Find an unusual comparison for {topic} and develop it {audience}.",
    "Draft a poster text about {topic} {audience}. It must fit on one page and invite people to join.",
    "Think about {topic} and argue for an opinion that few people share, {audience}.",
)

_NAMES = ("Ada", "Bruno", "Carla", "Deniz", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas", "Kaya", "Lena")


def prompt_text(request: Request) -> str:
    """About `prompt_tokens` tokens of plain English, at least one sentence; the same for the same (seed, index)."""
    rng = _rng(request)
    templates = _BRANCHING if request.branching else _SERIAL
    # A salutation with a number first makes the beginning its own.
    text = f"{_NAMES[int(rng.integers(len(_NAMES)))]} ({int(rng.integers(100, 1000))}) asks: {_fill(templates, rng)}"
    words = len(text.split())
    parts = [text]
    while (words + 10) * _TOKENS_PER_WORD < request.prompt_tokens:
        parts.append(_fill(templates, rng))
        words += len(parts[-1].split())
    return " ".join(parts)


def prompt_ids(request: Request) -> list[int]:
    """Exactly `prompt_tokens` ids drawn from `TOKEN_IDS`; the same for the same (seed, index)."""
    return [int(token) for token in _rng(request).integers(*TOKEN_IDS, request.prompt_tokens)]


def _rng(request: Request) -> Generator:
    return np.random.default_rng((request.seed, request.index, _STREAM))


def _fill(templates: tuple[str, ...], rng: Generator) -> str:
    template = templates[int(rng.integers(len(templates)))]
    return template.format(
        topic=_TOPICS[int(rng.integers(len(_TOPICS)))],
        audience=_AUDIENCES[int(rng.integers(len(_AUDIENCES)))],
    )

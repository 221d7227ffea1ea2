"""Scripted: a profile says where to fork and how wide, whatever the model says. For tests, benches and demos.

    {"lead_tokens": 20, "stages": [{"branches": 4, "tokens": 30, "header": "\\n- ", "join": "all", "then_tokens": 10}]}

`tokens` is one number, or one per branch. Every run is exactly as long as told. Stages follow each other; `join:
"none"` ends the parent, so it can only stand last.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from taper.core.types import ConfigError
from taper.forkjoin.plan import Join, Leg
from taper.forkjoin.planned import Planned, Stage, StageFork
from taper.forkjoin.protocol import Options

Tokens = Annotated[int, Field(ge=1, le=100_000)]


class ScriptedStage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    branches: int = Field(ge=1, le=4096)
    tokens: Tokens | list[Tokens]
    header: str = "\n"
    join: Join = Join.ALL
    then_tokens: int = Field(default=0, ge=0, le=100_000)


class ScriptedProfile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lead_tokens: int = Field(default=0, ge=0, le=100_000)
    stages: list[ScriptedStage] = Field(min_length=1, max_length=64)


def scripted(options: Options) -> Planned:
    """Options are the profile. Raises `ConfigError`."""
    try:
        profile = ScriptedProfile.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"taper.options.{where}: {first['msg']}") from None
    return Planned(root=Stage(label="", leg=_leg(profile.lead_tokens), fork=_fork(profile.stages)), name="scripted")


def _fork(stages: list[ScriptedStage]) -> StageFork | None:
    if not stages:
        return None
    stage, rest = stages[0], stages[1:]
    tokens = stage.tokens if isinstance(stage.tokens, list) else [stage.tokens] * stage.branches
    if len(tokens) != stage.branches:
        raise ConfigError(f"taper.options.stages: {stage.branches} branches need as many tokens, not {len(tokens)}")
    if stage.join is Join.SYNC:
        raise ConfigError("taper.options.stages: join must be 'all' or 'none', not 'sync'")
    goes_on = bool(rest) or stage.then_tokens > 0
    if stage.join is Join.NONE and goes_on:
        raise ConfigError("taper.options.stages: nothing can follow join 'none'")
    branches = tuple(
        Stage(label=str(number), header=stage.header, leg=_leg(length)) for number, length in enumerate(tokens, start=1)
    )
    then = Stage(label="", header="\n", leg=_leg(stage.then_tokens), fork=_fork(rest)) if goes_on else None
    return StageFork(branches=branches, join=stage.join, then=then)


def _leg(tokens: int) -> Leg:
    return Leg(max_tokens=tokens, sampling={"ignore_eos": True})

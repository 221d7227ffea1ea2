"""What a program is made of, what comes back, and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """OpenAI's and vLLM's sampling parameters; None leaves one to the program, and then to the model."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop: str | Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead(Sampling):
    """What the program says before it forks."""

    max_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch(Sampling):
    """One branch: the common prefix, `suffix`, what it generates, and its own fork.

    messages: the program's messages and these, as a chat of its own, instead of the common prefix.
    """

    id: str | None = None
    suffix: str = ""
    messages: Sequence[Message] | None = None
    max_tokens: int = 256
    fork: Fork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    branches: Sequence[Branch]
    join: Join | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation(Sampling):
    """What is said after a join."""

    max_tokens: int = 256
    fork: Fork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """All branches meet: their texts in order with `separator` after each, `instruction`, and the continuation.

    order: "reuse" puts the longest branch first, because its KV can be reused.
    """

    order: Literal["given", "reuse"] = "given"
    separator: str = "\n"
    instruction: str = ""
    continuation: Continuation | None = None


def to_json(value: Any) -> Any:
    """Plain data for the wire, without what is None."""
    if is_dataclass(value):
        items = ((spec.name, getattr(value, spec.name)) for spec in fields(value))
        return {name: to_json(item) for name, item in items if item is not None}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


class Answer(BaseModel):
    """Newer servers may say more than this client knows."""

    model_config = ConfigDict(extra="allow", frozen=True)


class BranchResult(Answer):
    id: str  # path in the tree: "0.2" is the second branch
    parent: str | None
    label: str  # the id that the request gave it
    text: str
    tokens: int
    finish_reason: str
    error: str | None = None


class Program(Answer):
    """A finished program. `text`: what was said at its root (lead and continuations)."""

    id: str
    model: str
    status: Literal["complete", "partial", "failed"]
    failure: str | None
    text: str
    branches: list[BranchResult]
    usage: dict[str, Any]

    def __getitem__(self, label: str) -> BranchResult:
        """The first branch with this label. Raises KeyError."""
        for branch in self.branches:
            if branch.label == label:
                return branch
        raise KeyError(label)


class ProgramStarted(Answer):
    type: Literal["program.started"]
    id: str
    model: str


class BranchStarted(Answer):
    type: Literal["branch.started"]
    branch: str
    parent: str | None
    label: str


class BranchDelta(Answer):
    type: Literal["branch.delta"]
    branch: str
    text: str


class BranchJoined(Answer):
    """`children` were handed to `branch`, in this order."""

    type: Literal["branch.joined"]
    branch: str
    children: list[str]


class BranchEnded(Answer):
    type: Literal["branch.ended"]
    branch: str
    finish_reason: str
    detail: str | None


class ProgramDone(Answer):
    type: Literal["program.done"]
    status: Literal["complete", "partial", "failed"]
    failure: str | None
    usage: dict[str, Any]


Event = ProgramStarted | BranchStarted | BranchDelta | BranchJoined | BranchEnded | ProgramDone
EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


@dataclass(slots=True, kw_only=True, eq=False)
class ProgramFailed(Exception):
    """The root of a program failed; `program` holds what was said until then."""

    program: Program

    def __str__(self) -> str:
        return self.program.failure or "the program failed"

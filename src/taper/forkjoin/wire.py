"""What goes over the wire, as strict models: unknown fields are refused.

POST /v1/taper/programs       ProgramRequest
POST /v1/chat/completions     ChatRequest, where the body carries `taper`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from taper.core.types import ConfigError
from taper.forkjoin.plan import Budget, Message, OnError

MAX_TEXT_CHARS = 4_000_000
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
_DEFAULT = Budget()
# What vllm-router writes into every chat completion that passes it. With these values it asks for nothing.
ASKS_NOTHING: Mapping[str, bool] = {
    "logprobs": False, "no_stop_trim": False, "continue_final_message": False, "skip_special_tokens": True,
    "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False, "include_reasoning": True,
}  # fmt: skip
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SamplingFields(Strict):
    """Sampling parameters with OpenAI's and vLLM's names; unset ones are the model's own defaults."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    ignore_eos: bool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    def sampling(self) -> dict[str, Any]:
        """What was set, as keyword arguments."""
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in SamplingFields.model_fields
            if name != "stop" and getattr(self, name) is not None
        }
        if self.stop is not None:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        return given


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: str = Field(min_length=1, max_length=64)
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> Message:
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class BudgetRequest(Strict):
    """Limits of one program; see the ranges in docs/programs.md."""

    max_branches: int = _DEFAULT.max_branches
    max_depth: int = _DEFAULT.max_depth
    max_total_tokens: int = _DEFAULT.max_total_tokens
    wall_s: float = _DEFAULT.wall_s
    branch_s: float | None = _DEFAULT.branch_s

    def budget(self) -> Budget:
        return Budget(**self.model_dump())


class JoinRequest(Strict):
    """All children meet again. Without a continuation the parent ends there."""

    order: Literal["given", "reuse"] = "given"  # reuse: the longest child first, because its KV can be reused
    separator: Text = "\n"  # after each child
    instruction: Text = ""  # follows the children
    continuation: ContinuationRequest | None = None


class ForkRequest(Strict):
    branches: list[BranchRequest] = Field(min_length=1, max_length=4096)
    join: JoinRequest | None = None


class BranchRequest(SamplingFields):
    """One branch: its parent's tokens, then `suffix`, then what it generates, then its own fork if any.

    messages: instead of the parent's tokens, the program's messages and then these, rendered as a chat.
    """

    id: str | None = Field(default=None, min_length=1, max_length=64)
    suffix: Text = ""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    max_tokens: int = Field(default=256, ge=0, le=1_000_000)
    fork: ForkRequest | None = None

    @model_validator(mode="after")
    def _says_something(self) -> BranchRequest:
        if self.max_tokens == 0 and self.fork is None:
            raise ValueError("max_tokens can be 0 only in a branch that forks")
        return self


class ContinuationRequest(SamplingFields):
    max_tokens: int = Field(default=256, ge=0, le=1_000_000)
    fork: ForkRequest | None = None


class LeadRequest(SamplingFields):
    """What the root generates before it forks."""

    max_tokens: int = Field(default=256, ge=1, le=1_000_000)


class ProgramRequest(SamplingFields):
    """An explicit program. Sampling parameters here hold for every branch that does not set its own."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    prompt: Text | None = None
    lead: LeadRequest | None = None
    branches: list[BranchRequest] = Field(min_length=1, max_length=4096)
    join: JoinRequest | None = None
    budget: BudgetRequest = Field(default_factory=BudgetRequest)
    on_branch_error: OnError = OnError.FAIL
    stream: bool = False
    vllm_xargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> ProgramRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        return self


class TaperOptions(Strict):
    """`taper` of a chat completion: the protocol to follow in the model's own output.

    branch_max_tokens: bounds every run of a forked branch, where the request's max_tokens is for the root.
    opening_regex: constrains the first run of the answer, for models that were not trained for the protocol.
    """

    protocol: str = Field(min_length=1, max_length=64)
    order: Literal["outline", "interleaved"] = "outline"
    options: dict[str, Any] = Field(default_factory=dict)
    budget: BudgetRequest = Field(default_factory=BudgetRequest)
    on_branch_error: OnError = OnError.FAIL
    branch_max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    opening_regex: str | None = Field(default=None, min_length=1, max_length=10_000)


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(SamplingFields):
    """The part of OpenAI's chat completions that a protocol can serve.

    max_tokens bounds every run of the root, and of a branch unless taper.branch_max_tokens does.
    """

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    taper: TaperOptions
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = None
    vllm_xargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not ASKS_NOTHING.get(name, data)}


def check_model(name: str | None, known: list[str]) -> str:
    """The name to answer with. Raises `ConfigError` for a model that is not served."""
    if name is None:
        return known[0]
    if name not in known:
        raise ConfigError(f"model must be one of {', '.join(known)}, not {name!r}")
    return name


for _model in (JoinRequest, ForkRequest, BranchRequest, ContinuationRequest, ProgramRequest):
    _model.model_rebuild()

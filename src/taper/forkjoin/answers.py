"""Events of a program -> what the client gets: JSON objects for a stream, or one answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from taper.forkjoin.events import Done, Ended, Joined, Prefill, ProgramEvent, Started, Status, Text, Usage
from taper.forkjoin.machine import ROOT
from taper.forkjoin.merge import OutlineOrder
from taper.forkjoin.plan import Ending


@dataclass(slots=True, kw_only=True)
class BranchResult:
    """One branch as the client sees it; `text` is what it generated."""

    id: str
    parent: str | None
    label: str
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Gathered:
    """All branches of a program, in the order they started, and the answer in outline order."""

    branches: dict[str, BranchResult] = field(default_factory=dict)
    done: Done | None = None
    _order: OutlineOrder = field(default_factory=OutlineOrder)

    def feed(self, event: ProgramEvent) -> str:
        """Text of the ordered answer that this event makes available."""
        if isinstance(event, Started):
            self.branches[event.branch] = BranchResult(id=event.branch, parent=event.parent, label=event.label)
        elif isinstance(event, Text) and not event.is_given:
            self.branches[event.branch].text += event.text
            self.branches[event.branch].tokens += event.tokens
        elif isinstance(event, Ended):
            branch = self.branches[event.branch]
            branch.finish_reason, branch.error = event.ending.value, event.detail
        elif isinstance(event, Done):
            self.done = event
        return self._order.feed(event)

    def results(self) -> list[dict[str, Any]]:
        return [asdict(branch) for branch in self.branches.values()]

    def finish_reason(self) -> str:
        """OpenAI's word for how the answer as a whole ended."""
        cut = Ending.LENGTH.value
        return "length" if any(branch.finish_reason == cut for branch in self.branches.values()) else "stop"


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object, with TAPER's own counts under `taper`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.root_cached_tokens},
        "taper": {
            "branch_tokens": usage.branch_tokens,
            "join_tokens": usage.join_tokens,
            "prefilled_tokens": usage.prefilled_tokens,
            "cached_tokens": usage.cached_tokens,
            "recomputed_tokens": usage.recomputed_tokens,
            "malformed_tags": usage.malformed_tags,
            "unterminated_branches": usage.unterminated_branches,
            "forks": [_prefill_json(prefill) for prefill in usage.forks],
            "joins": [_prefill_json(prefill) for prefill in usage.joins],
        },
    }


def event_json(event: ProgramEvent) -> dict[str, Any] | None:
    """One event of a program's stream; None for what the client does not get (text that was given, not generated).

    No key is called `error`: clients take that for a failure of the stream itself.
    """
    if isinstance(event, Started):
        return {"type": "branch.started", "branch": event.branch, "parent": event.parent, "label": event.label}
    if isinstance(event, Text):
        if event.is_given or not event.text:
            return None
        return {"type": "branch.delta", "branch": event.branch, "text": event.text}
    if isinstance(event, Joined):
        return {"type": "branch.joined", "branch": event.branch, "children": list(event.children)}
    if isinstance(event, Ended):
        ending = {"finish_reason": event.ending.value, "detail": event.detail}
        return {"type": "branch.ended", "branch": event.branch, **ending}
    done = {"status": event.status.value, "failure": event.error, "usage": usage_json(event.usage)}
    return {"type": "program.done", **done}


def program_json(program_id: str, model: str, created: int, gathered: Gathered) -> dict[str, Any]:
    """The one answer of a program that does not stream. `text`: what the root said over all its runs."""
    done = gathered.done
    assert done is not None  # noqa: S101 - narrows the type, checks no input
    return {
        "id": program_id,
        "object": "taper.program",
        "created": created,
        "model": model,
        "status": done.status.value,
        "failure": done.error,
        "text": gathered.branches[ROOT].text,
        "branches": [branch for branch in gathered.results() if branch["id"] != ROOT],
        "usage": usage_json(done.usage),
    }


def chat_json(program_id: str, model: str, created: int, gathered: Gathered, content: str) -> dict[str, Any]:
    """A chat completion with the answer in outline order, and the branches under `taper`."""
    done = gathered.done
    assert done is not None  # noqa: S101 - narrows the type, checks no input
    return {
        "id": program_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": gathered.finish_reason(),
                "logprobs": None,
            }
        ],
        "usage": usage_json(done.usage),
        "taper": {"status": done.status.value, "failure": done.error, "branches": gathered.results()},
    }


@dataclass(slots=True, kw_only=True)
class ChatStream:
    """Chat completion chunks: one ordered answer, or (`interleaved`) text as it comes with its branch's id.

    What is generated beside the answer (an outline) is then an event beside an empty delta, as in a program's stream.
    """

    program_id: str
    model: str
    created: int
    interleaved: bool
    with_usage: bool
    gathered: Gathered = field(default_factory=Gathered)
    _has_begun: bool = False

    def feed(self, event: ProgramEvent) -> list[dict[str, Any]]:
        ordered = self.gathered.feed(event)
        if isinstance(event, Done):
            return self._last(event)
        if not self.interleaved:
            return [self._chunk({"content": ordered})] if ordered else []
        if isinstance(event, Text) and event.is_visible:
            return [self._chunk({"content": event.text}, {"branch": event.branch})] if event.text else []
        shown = event_json(event)
        return [self._chunk({}, shown)] if shown else []

    def _last(self, done: Done) -> list[dict[str, Any]]:
        if done.status is Status.FAILED:
            return [failure_json(done, self.gathered)]
        taper = {"status": done.status.value, "failure": done.error}
        chunks = [self._chunk({}, taper, self.gathered.finish_reason())]
        if self.with_usage:
            chunks.append({**self._chunk({}), "choices": [], "usage": usage_json(done.usage)})
        return chunks

    def _chunk(
        self, delta: dict[str, Any], taper: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        if not self._has_begun:
            self._has_begun = True
            delta = {"role": "assistant", **delta}
        chunk: dict[str, Any] = {
            "id": self.program_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}],
        }
        return chunk if taper is None else {**chunk, "taper": taper}


def failure_json(done: Done, gathered: Gathered) -> dict[str, Any]:
    """A chat answer whose root failed, as an error that holds what there is."""
    return {
        "error": {
            "message": f"the answer is incomplete: {done.error}",
            "type": "ProgramFailed",
            "param": None,
            "code": 422,
            "partial": {"branches": gathered.results(), "usage": usage_json(done.usage)},
        }
    }


def _prefill_json(prefill: Prefill) -> dict[str, Any]:
    return {
        "branch": prefill.branch,
        "prompt_tokens": prefill.prompt_tokens,
        "cached_tokens": prefill.cached_tokens,
        "recomputed_tokens": prefill.recomputed_tokens,
    }

"""What fork and join needs of vLLM: runs on token ids, through the engine client that plugins are handed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from taper.engines.vllm import compat
from taper.engines.vllm.middleware import App, Receive, Scope, Send, replay, whole_body


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """What a run has generated since the last chunk; `finish` is vLLM's word for why it ended."""

    token_ids: Sequence[int]
    text: str
    finish: str | None
    stop: str | None
    cached_tokens: int


class VllmEngine:
    """One engine client. args: the API server's command line, for the chat template and the model's names."""

    def __init__(self, engine_client: Any, args: Any) -> None:
        config = engine_client.vllm_config
        self._client = engine_client
        self._tokenizer = engine_client.get_tokenizer()
        self._defaults: Mapping[str, Any] = config.model_config.get_diff_sampling_param()
        self._template = _template(getattr(args, "chat_template", None))
        self.models: Sequence[str] = tuple(args.served_model_name or [args.model])
        self.max_model_tokens = int(config.model_config.max_model_len)
        self.max_rows = int(config.scheduler_config.max_num_seqs)
        self.replicas = compat.replicas(engine_client)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int], *, keeps_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not keeps_special_tokens))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Raises ValueError where the chat template refuses the messages."""
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template refuses them: {error}") from error
        return self.encode(text)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Mapping[str, Any],
        *,
        kept_stops: Sequence[str],
        request_id: str,
        extra_args: Mapping[str, Any],
        replica: int | None,
    ) -> AsyncGenerator[TokenChunk, None]:
        """Runs of one program share `request_id`: vLLM keeps them apart itself, and one abort ends them all."""
        params = self._sampling_params(sampling, extra_args)
        outputs = self._client.generate(
            compat.token_prompt(prompt_ids), params, request_id=request_id, data_parallel_rank=replica
        )
        cached_tokens = 0
        async with aclosing(outputs) as stream:
            async for output in stream:
                cached_tokens = max(cached_tokens, output.num_cached_tokens or 0)
                yield _chunk(output.outputs[0], cached_tokens, kept_stops)

    async def abort(self, request_id: str) -> None:
        await self._client.abort(request_id)

    def _sampling_params(self, sampling: Mapping[str, Any], extra_args: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        asked = {**self._defaults, **sampling}
        regex = asked.pop("structured_regex", None)
        structured = StructuredOutputsParams(regex=regex) if regex else None
        return SamplingParams(
            **asked,
            structured_outputs=structured,
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=dict(extra_args),
        )


class ProgramMetrics:
    """Counters `taper:program_*` on the server's own /metrics; right with several API processes, like vLLM's own.

    Labelled with the model and no engine: programs are the API server's, and it counts them.
    """

    def __init__(self, counts: Mapping[str, str], registry: CollectorRegistry, *, model: str) -> None:
        """counts: name -> what it means. All are there from the start, as 0."""
        self._counters = {
            name: Counter(f"taper:program_{name}", meaning, ["model_name"], registry=registry).labels(model)
            for name, meaning in counts.items()
        }

    def add(self, found: Mapping[str, int]) -> None:
        for name, count in found.items():
            self._counters[name].inc(count)


class ChatSwitch:
    """Plain ASGI: hands a chat completion whose body carries `taper` to TAPER's own route, `path`.

    The new path is under /v1 like the old one, so the server's authentication holds on either side of this.
    """

    def __init__(self, app: App, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/v1/chat/completions"):
            await self._app(scope, receive, send)
            return
        messages = await whole_body(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        if _is_ours(body):
            root = scope["path"].removesuffix("/v1/chat/completions")
            scope = {**scope, "path": root + self._path, "raw_path": (root + self._path).encode()}
        await self._app(scope, replay(messages, receive), send)


def _is_ours(body: bytes) -> bool:
    if b"taper" not in body and b"\\u" not in body:  # a JSON string may spell a letter as an escape
        return False
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return False
    options = request.get("taper") if isinstance(request, dict) else None
    return options is not None and options != {"protocol": "off"}


def _chunk(output: Any, cached_tokens: int, kept_stops: Sequence[str]) -> TokenChunk:
    """The text ends with its stop string where that is kept. End-of-sequence and stop tokens are in no context."""
    ids, text, finish = list(output.token_ids), output.text, output.finish_reason
    stop = output.stop_reason if isinstance(output.stop_reason, str) else None
    if stop in kept_stops:
        text += stop
    elif finish == "stop" and stop is None:
        ids = ids[:-1]
    return TokenChunk(token_ids=ids, text=text, finish=finish, stop=stop, cached_tokens=cached_tokens)


def _template(given: str | None) -> str | None:
    """`--chat-template`: a file, or the template itself."""
    if given is None or "\n" in given or "{" in given:
        return given
    return Path(given).read_text(encoding="utf-8")

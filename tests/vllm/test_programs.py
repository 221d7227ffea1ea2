"""Fork and join's side of vLLM's engine client: what is asked of it, and what its outputs become."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from taper.engines.vllm.programs import TokenChunk, VllmEngine


class Tokenizer:
    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(char) for char in text]

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(one) for one in ids if one != 1 or not skip_special_tokens)

    def apply_chat_template(self, messages, *, chat_template, tokenize, add_generation_prompt):
        if not messages[0]["content"]:
            raise TypeError("empty")
        return f"{chat_template or '-'}{messages[0]['content']}>"


def output(ids, text, *, finish=None, stop=None, cached=None):
    part = SimpleNamespace(token_ids=ids, text=text, finish_reason=finish, stop_reason=stop)
    return SimpleNamespace(outputs=[part], num_cached_tokens=cached)


class Client:
    """vLLM's engine client as far as it is used."""

    def __init__(self, outputs=(), *, local_only=False):
        self.outputs, self.calls, self.closed = outputs, [], False
        model = SimpleNamespace(max_model_len=99, get_diff_sampling_param=lambda: {"temperature": 0.6, "top_p": 0.9})
        parallel = SimpleNamespace(data_parallel_size=8, data_parallel_size_local=2, local_engines_only=local_only)
        scheduler = SimpleNamespace(max_num_seqs=7)
        self.vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel, scheduler_config=scheduler)

    def get_tokenizer(self):
        return Tokenizer()

    async def generate(self, prompt, params, *, request_id, data_parallel_rank):
        self.calls.append((prompt, params, request_id, data_parallel_rank))
        try:
            for one in self.outputs:
                yield one
        finally:
            self.closed = True


def engine(client, **args):
    return VllmEngine(
        client, SimpleNamespace(**{"model": "m", "served_model_name": None, "chat_template": None, **args})
    )


def generate(client, sampling, *, leave_after=None):
    async def collect():
        chunks = []
        stream = engine(client).generate(
            (5, 6), sampling, kept_stops=("</Path>",), request_id="p", extra_args={"taper_group": "p"}, replica=3
        )
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == leave_after:
                await stream.aclose()
                break
        return chunks

    return asyncio.run(collect())


def test_a_run_is_asked_for_with_token_ids_under_the_programs_id():
    client = Client([output([7], "a", finish="length", cached=32)])
    (chunk,) = generate(client, {"max_tokens": 4, "stop": ["x"], "skip_special_tokens": False, "temperature": 0.2})
    ((prompt, params, request_id, rank),) = client.calls
    assert (prompt["prompt_token_ids"], request_id, rank) == ([5, 6], "p", 3)
    assert (params.max_tokens, params.stop, params.temperature, params.top_p) == (4, ["x"], 0.2, 0.9)
    assert (params.extra_args, params.skip_special_tokens) == ({"taper_group": "p"}, False)
    assert chunk == TokenChunk(token_ids=[7], text="a", finish="length", stop=None, cached_tokens=32)


def test_a_regex_becomes_a_structured_output():
    client = Client([output([7], "a", finish="stop")])
    generate(client, {"max_tokens": 4, "structured_regex": "a+"})
    assert client.calls[0][1].structured_outputs.regex == "a+"


@pytest.mark.parametrize(
    ("stop", "ids", "text"),
    [
        ("</Path>", [7, 8], "ab</Path>"),  # a stop string is part of the text and of the context
        ("mine", [7, 8], "ab"),  # a client's stop string is not part of the text
        (None, [7], "ab"),  # the end-of-sequence token is not
        (42, [7], "ab"),  # nor is a stop token
    ],
)
def test_what_ends_a_run(stop, ids, text):
    (chunk,) = generate(Client([output([7, 8], "ab", finish="stop", stop=stop)]), {"max_tokens": 4})
    assert (list(chunk.token_ids), chunk.text, chunk.finish) == (ids, text, "stop")


def test_leaving_a_run_closes_it():
    client = Client([output([7], "a"), output([8], "b")])
    generate(client, {"max_tokens": 4}, leave_after=1)
    assert client.closed


@pytest.mark.parametrize(("local_only", "replicas"), [(False, 8), (True, 2)])
def test_facts(local_only, replicas):
    one = engine(Client(local_only=local_only), served_model_name=["a", "b"])
    assert (one.models, one.max_model_tokens, one.max_rows, one.replicas) == (("a", "b"), 99, 7, replicas)
    assert engine(Client()).models == ("m",)


def test_tokens_and_templates(tmp_path):
    one = engine(Client())
    assert (one.encode("a"), one.encode_prompt("a")) == ([97], [1, 97])
    assert one.decode([1, 97], keeps_special_tokens=False) == "a"
    assert one.render([{"content": "x"}]) == one.encode("-x>")
    path = tmp_path / "template.jinja"
    path.write_text("T")
    assert engine(Client(), chat_template=str(path)).render([{"content": "x"}]) == one.encode("Tx>")
    assert engine(Client(), chat_template="{{t}}").render([{"content": "x"}]) == one.encode("{{t}}x>")
    with pytest.raises(ValueError, match="the chat template refuses them: empty"):
        one.render([{"content": ""}])

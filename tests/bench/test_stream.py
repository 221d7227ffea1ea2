"""Bytes to tokens and times, however the network cuts them."""

from __future__ import annotations

import pytest

from taper.bench.stream import StreamReader
from tests.bench.server import event, token

ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})


def test_times_and_tokens_per_branch() -> None:
    reader = StreamReader()
    reader.feed(ROLE, 0.5)  # says hello, carries no token
    reader.feed(token(0, [1]) + token(1, [1]), 1.0)
    reader.feed(token(1, [2, 3]), 1.25)  # two tokens in one chunk
    reader.feed(token(0, [2], "length") + token(1, [4], "length"), 1.5)
    first, second = reader.choices()
    assert (first.index, first.tokens, first.first_token_s, first.last_token_s) == (0, 2, 1.0, 1.5)
    assert (second.index, second.tokens, second.first_token_s, second.last_token_s) == (1, 4, 1.0, 1.5)
    assert first.gaps_ms == (500.0,)
    assert second.gaps_ms == (250.0, 250.0)
    assert second.finish_reason == "length"
    assert reader.finished_branches() == 2
    assert not reader.done


@pytest.mark.parametrize("cut", [1, 7, 50, 1000])
def test_cuts_anywhere_give_the_same_tokens(cut: int) -> None:
    data = ROLE + token(0, [1]) + token(0, [2], "stop") + b": comment\r\n\r\ndata: [DONE]\n\n"
    reader = StreamReader()
    for start in range(0, len(data), cut):
        reader.feed(data[start : start + cut], 1.0)
    assert [choice.tokens for choice in reader.choices()] == [2]
    assert reader.done
    assert reader.error is None


def test_windows_line_ends() -> None:
    reader = StreamReader()
    reader.feed(token(0, [1], "stop").replace(b"\n", b"\r\n"), 1.0)
    assert reader.choices()[0].tokens == 1


def test_a_server_without_token_ids_is_counted_by_chunks_and_corrected_by_usage() -> None:
    reader = StreamReader()
    for text in ("He", "llo", ""):
        reader.feed(event({"choices": [{"index": 0, "delta": {"content": text}}]}), 1.0)
    assert reader.choices()[0].tokens == 2
    reader.feed(event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}), 2.0)
    assert reader.choices()[0].tokens == 5
    assert reader.prompt_tokens == 9


def test_usage_does_not_overrule_the_count_of_several_branches() -> None:
    reader = StreamReader()
    for index in (0, 1):
        reader.feed(event({"choices": [{"index": index, "text": "a"}]}), 1.0)
    reader.feed(event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}), 2.0)
    assert [choice.tokens for choice in reader.choices()] == [1, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (event({"error": {"message": "engine died", "code": 500}}), "engine died"),
        (event({"error": "plain"}), "plain"),
        (b"data: {nonsense\n\n", "unreadable event"),
        (event([1, 2]), "unreadable event"),
        (event({"usage": 5}), "unreadable event"),
        (event({"choices": 5}), "unreadable event"),
        (event({"choices": [{"index": "a", "text": "b"}]}), "unreadable event"),
        (event({"choices": [{"token_ids": 5}]}), "unreadable event"),
        (b"data: " + b"[" * 5000 + b"\n", "unreadable event"),
    ],
)
def test_errors_inside_the_stream(data: bytes, message: str) -> None:
    reader = StreamReader()
    reader.feed(data, 1.0)
    assert reader.error is not None
    assert message in reader.error

"""Public trace formats: read line by line, and every bad line named."""

from __future__ import annotations

from pathlib import Path

import pytest

from taper.workload import TraceError, TraceRow, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def rows_of(tmp_path: Path, text: str) -> list[TraceRow]:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    return list(read_trace(path))


def row(at_s: float, prompt_tokens: int, output_tokens: int) -> TraceRow:
    return TraceRow(at_s=pytest.approx(at_s, abs=1e-6), prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def test_azure_2023(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.2500000,396,109\n"
    assert rows_of(tmp_path, text) == [row(0.0, 374, 44), row(1.75, 396, 109)]


def test_azure_2024_has_a_zone(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01.009930+02:00,2399,6\n"
    assert rows_of(tmp_path, text) == [row(0.0, 2162, 5), row(1.0, 2399, 6)]


def test_burstgpt_leaves_failed_requests_out(tmp_path: Path) -> None:
    text = BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,9,0,9,API log\n118,ChatGPT,0,7,7,API log\n"
    assert rows_of(tmp_path, text) == [row(0.0, 472, 18), row(113.0, 1, 7)]


def test_mooncake(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}\n'
    )
    assert rows_of(tmp_path, text) == [row(0.0, 6955, 52), row(3.053, 6472, 26)]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE + "2023-11-16 18:00:00.0,1,2\nnonsense,1,2\n", encoding="utf-8")
    rows = read_trace(path)
    assert next(rows) == row(0.0, 1, 2)
    with pytest.raises(TraceError, match=":3: TIMESTAMP is no time: 'nonsense'"):
        next(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", r"trace:1: header 'a,b,c' is none of"),
        ("", r"trace:1: header ''"),
        (AZURE, "holds no request"),
        (AZURE + "2023-11-16 18:00:00,-4,2\n", r"trace:2: ContextTokens must be a whole number.*'-4'"),
        (AZURE + "2023-11-16 18:00:00,4,2.5\n", r"trace:2: GeneratedTokens must be a whole number.*'2.5'"),
        (AZURE + "2023-11-16 18:00:00,4\n", r"trace:2: GeneratedTokens must be a whole number.*None"),
        (AZURE + "2023-11-16 18:00:00,4,2,9\n", r"trace:2: more fields than the header"),
        (AZURE + "2023-11-16 18:00:09,4,2\n2023-11-16 18:00:07,4,2\n", r"trace:3: TIMESTAMP lies 2 s before"),
        (BURSTGPT + "nan,GPT-4,9,1,10,API log\n", r"trace:2: Timestamp is no time: 'nan'"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}\n', r"trace:1: timestamp is no time: True"),
        ('{"timestamp": 1, "input_length": 1}\n', r"trace:1: output_length must be a whole number"),
        ('{"timestamp": 1, \n', r"trace:1: not JSON"),
        ('{"timestamp":' * 5000, r"trace:1: not JSON: maximum recursion"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[]\n', r"trace:2: not a JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        rows_of(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        next(read_trace(tmp_path / "none.csv"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81\n")
    with pytest.raises(TraceError, match="not UTF-8"):
        next(read_trace(tmp_path / "binary"))

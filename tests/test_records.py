"""Records survive the trip through a file, and bad files are refused with line and field."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from taper.records import ChoiceRecord, RecordError, RequestRecord, StepRecord, request_file, step_file

CHOICE = ChoiceRecord(
    index=1, tokens=3, first_token_s=10.5, last_token_s=11.0, gaps_ms=(200.0, 300.0), finish_reason="length"
)
REQUEST = RequestRecord(
    id="taper-0-7",
    policy="taper",
    round=0,
    seed=3,
    index=7,
    kind="branching",
    branches=2,
    prompt_tokens=41,
    scheduled_s=9.0,
    sent_s=9.25,
    ended_s=11.5,
    tpot_slo_s=0.05,
    choices=(
        ChoiceRecord(index=0, tokens=2, first_token_s=10.0, last_token_s=10.25, gaps_ms=(250.0,)),
        CHOICE,
    ),
)
STEP = StepRecord(
    step=12,
    time_s=100.5,
    policy="taper",
    rows=8,
    context_tokens=512,
    prefill_tokens=0,
    groups=5,
    protected=5,
    extra=3,
    deferred=9,
    held=1,
    baseline_s=0.0165,
    predicted_s=0.018,
    budget_s=None,
    slack_min_s=None,
    measured_s=0.0185,
    ending="clean",
    planner_s=0.00008,
)


def test_derived_numbers() -> None:
    assert REQUEST.tokens == 5
    assert REQUEST.first_token_s == 10.0
    assert REQUEST.last_token_s == 11.0
    assert REQUEST.ttft_s == 1.0  # from the planned arrival, not from the sending
    assert REQUEST.tpot_s == 0.25  # one second, four gaps, both branches together
    assert CHOICE.itl_max_s == 0.3
    assert CHOICE.itl_p99_s == pytest.approx(0.299)


def test_a_request_without_tokens_has_no_times() -> None:
    empty = RequestRecord(
        id="x",
        policy="off",
        round=0,
        seed=0,
        index=0,
        kind="serial",
        branches=1,
        prompt_tokens=0,
        scheduled_s=0.0,
        sent_s=0.0,
        ended_s=1.0,
        tpot_slo_s=0.05,
        error="http 500: no",
    )
    assert (empty.tokens, empty.first_token_s, empty.ttft_s, empty.tpot_s) == (0, None, None, None)
    assert request_file().parse(request_file().dump(empty)) == empty


def test_a_single_chunk_has_no_gap() -> None:
    one = ChoiceRecord(index=0, tokens=1, first_token_s=1.0, last_token_s=1.0)
    assert one.itl_p99_s is None
    assert one.itl_max_s is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_requests_round_trip_through_a_file(tmp_path: Path, count: int) -> None:
    path = tmp_path / "requests.jsonl"
    request_file().append(path, [REQUEST] * count)
    assert list(request_file().read(path)) == [REQUEST] * count


def test_steps_round_trip_and_carry_their_schema() -> None:
    line = step_file().dump(STEP)
    assert json.loads(line)["schema"] == "taper.step/1"
    assert step_file().parse(line) == STEP


def test_append_adds(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    request_file().append(path, [REQUEST])
    request_file().append(path, [REQUEST])
    assert len(list(request_file().read(path))) == 2


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(request_file().dump(REQUEST)), **fields})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed(surprise=1), "surprise: "),
        (changed(tpot_slo_s="fast"), "tpot_slo_s: "),
        (changed(branches=2.5), "branches: "),
        (changed(kind="tree"), "kind: "),
        (changed(schema="taper.request/9"), "schema: "),
        (changed(sent_s=None), "sent_s: "),
        (changed(choices=[{"index": 0}]), "choices.0.tokens: "),
        (changed().replace("9.25", "NaN"), "sent_s: "),
        ("[]", "line: "),
        ("not json", "line: "),
    ],
)
def test_a_bad_line_is_refused_with_its_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(request_file().dump(REQUEST) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        list(request_file().read(path))
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value)


def test_a_torn_last_line_is_reported_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "requests.jsonl"
    whole = request_file().dump(REQUEST)
    path.write_text(f"{whole}\n{whole[:100]}", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert list(request_file().read(path)) == [REQUEST]
    assert f"{path}:2: torn last line skipped (100 bytes)" in caplog.text


def test_a_whole_last_line_without_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(request_file().dump(REQUEST), encoding="utf-8")
    assert list(request_file().read(path)) == [REQUEST]


def test_step_and_request_files_do_not_mix() -> None:
    with pytest.raises(RecordError, match=r"record: step: "):
        step_file().parse(request_file().dump(REQUEST))

"""`taper top` on a terminal of any size, with a server that is there, is not, and comes back."""

from __future__ import annotations

import io

import httpx
import pytest
from click.testing import CliRunner
from rich.console import Console

from taper.cli import cli
from taper.top import Watch, frame, spark

COLUMNS = ["second", "steps", "step_s", "step_max_s", "predicted_s", "budget_s", "slack_min_s", "rows", "width",
           "deferred", "held", "tokens", "met_serial", "met_branching", "missed_serial", "missed_branching",
           "goodput_tokens"]  # fmt: skip
RECENT = {"seconds": 60.0, "attainment": 0.97, "attainment_serial": 1.0, "attainment_branching": 0.9, "judged": 30,
          "goodput_tok_s": 612.4, "raw_tok_s": 660.0, "ttft_p50_s": 0.12, "ttft_p95_s": 0.31}  # fmt: skip


def row(second, step_s):
    return [second, 30, step_s, 2 * step_s, step_s, 0.05, 0.05, 12.0, 2.5, 4.0, 1.0, 360, 1, 0, 0, 0, 20]


def body(*, age_s=0.1, now_s=103.0, seconds=(101, 102, 103), lanes=2, policy="taper"):
    lane = {"kind": "n", "age_s": 3.0, "tokens": 120, "tpot_slo_s": 0.05, "finished": 1, "branches": 4}
    engine = {
        "now_s": now_s, "policy": policy, "learning": False, "tpot_slo_s": 0.05, "ttft_slo_s": 5.0,
        "recent": RECENT,
        "columns": COLUMNS, "timeline": [row(second, 0.04) for second in seconds], "groups": lanes,
        "branches": 4 * lanes,
        "step": {"rows": 12, "protected": 2, "extra": 10, "deferred": 4, "held": 1, "measured_s": 0.041,
                 "budget_s": None},
        "lanes": [
            lane | {"number": n, "roles": "PEDH", "progress": [9, 9, 5, 0], "credit_s": 1.5 - n} for n in range(lanes)
        ],
    }  # fmt: skip
    return {"engines": [engine], "age_s": age_s, "server": {"model": "m", "engines": [0]}}


def picture(watch, *, width=130, height=40):
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(frame(watch, width=width, height=height))
    return console.file.getvalue()


def taken(answer):
    watch = Watch("http://x")
    watch.take(answer)
    return watch


def test_a_picture_says_what_the_page_says():
    text = picture(taken(body()))
    for words in (
        "● live", "policy taper, SLO 50 ms per token", "attainment 97 % (serial 100 %, branching 90 %)",
        "goodput 612 tok/s, raw 660", "first token 0.12 s, 95 % 0.31 s", "2 protected, 10 extra; 4 deferred, 1 held",
        "2 requests, 8 branches", "✓█▓░·", "+1.5 s",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_any_terminal(width):
    text = picture(taken(body(lanes=1000)), width=width, height=30)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 36
    assert "and " in text


def test_finished_branches_do_not_hide_those_that_run():
    answer = body(lanes=1)
    answer["engines"][0]["lanes"][0]["finished"] = 500
    assert "✓✓█▓░·" in picture(taken(answer), width=80)


def test_the_timeline_is_put_together():
    watch = taken(body())
    later = body(now_s=105.0, seconds=(103, 104, 105))
    watch.take(later)
    assert [line[0] for line in watch.timelines[0]] == [101, 102, 103, 104, 105]
    watch.take(body(now_s=3.0, seconds=(2, 3)))  # the server started anew, and so did its clock
    assert [line[0] for line in watch.timelines[0]] == [2, 3]


def test_it_outlives_its_server():
    answers = [httpx.Response(200, json=body()), httpx.ConnectError("refused"), httpx.ConnectError("refused")]
    answers.append(httpx.Response(200, json=body(now_s=104.0, seconds=(103, 104), policy="off")))

    def handler(request):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = Watch("http://x")
    with httpx.Client(transport=httpx.MockTransport(handler), base_url="http://x") as http:
        watch.poll(http)
        waits = [watch.wait_s]
        for _ in range(2):
            watch.poll(http)
            waits.append(watch.wait_s)
        assert waits == [0.5, 1.0, 2.0]
        text = picture(watch)
        assert "refused (trying again; what follows is old)" in text
        assert "policy taper" in text
        watch.poll(http)
    assert watch.trouble is None
    assert watch.wait_s == 0.5
    assert "policy off" in picture(watch)


def test_a_silent_engine_and_a_server_without_taper_are_named():
    assert "the engine has not answered for 9 s" in picture(taken(body(age_s=9.0)))
    watch = Watch("http://x")
    with httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(404)), base_url="http://x") as http:
        watch.poll(http)
    assert "no TAPER on this server" in picture(watch)
    stock = {
        "engines": [{"error": "this engine does not run TAPER's scheduler"}],
        "age_s": 0,
        "server": {"model": "m", "engines": [0]},
    }
    assert "does not run TAPER's scheduler" in picture(taken(stock))


def test_sparks():
    assert spark([0.0, 0.5, 1.0, None], 1.0).plain == "▁▅█ "
    assert spark([], None).plain == ""
    assert spark([None, 0.0], None).plain == " ▁"


def test_the_command_ends_with_status_1_where_nobody_answers():
    result = CliRunner().invoke(cli, ["top", "http://127.0.0.1:9", "--once"])
    assert result.exit_code == 1
    assert "trying again" in result.stdout
    refused = CliRunner().invoke(cli, ["top", "localhost:8000"])
    assert refused.exit_code == 2
    assert "URL must begin with http" in refused.stderr

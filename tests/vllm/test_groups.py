"""Which requests are branches of one, and the accounts of a logical request."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from taper.claims import ClaimLimits
from taper.core.types import FinishedRequest
from taper.engines.vllm.groups import Columns
from tests.vllm.harness import fork, request, server_config

OFF = server_config(policy="off")


def groups(driver):
    return sorted(sorted(group.branches) for group in driver.taper.table.groups.values())


def test_children_of_one_request_are_one_group(make):
    driver = make()
    driver.add(*fork("cmpl-a-12ab34cd", 3), request("cmpl-b-12ab34cd"), *fork("cmpl-c-0-ffffffff", 2, arrival=1.0))
    assert groups(driver) == [
        ["0_cmpl-a-12ab34cd", "1_cmpl-a-12ab34cd", "2_cmpl-a-12ab34cd"],
        ["0_cmpl-c-0-ffffffff", "1_cmpl-c-0-ffffffff"],
        ["cmpl-b-12ab34cd"],
    ]


def test_clients_ids_of_the_same_form_are_not_children(make):
    driver = make()
    driver.add(
        *(request(name, arrival=float(i)) for i, name in enumerate(["3_foo", "4_foo", "foo", "03_foo", "x_foo"]))
    )
    assert groups(driver) == [["03_foo"], ["3_foo"], ["4_foo"], ["foo"], ["x_foo"]]


def test_an_id_that_begins_with_a_number_beyond_pythons_limit_is_no_fault(make):
    """int() refuses more than 4300 digits; a request that is in the engine must be in the table."""
    driver = make()
    name = "9" * 5000 + "_foo"
    driver.add(request(name))
    assert groups(driver) == [[name]]
    assert driver.taper.fallbacks == 0


def test_a_tag_binds_whoever_sends_it(make):
    driver = make()
    tag = {"taper_group": "g"}
    driver.add(request("a", xargs=tag), request("b", xargs=tag, arrival=5.0), *fork("p", 2, xargs=tag), request("c"))
    assert groups(driver) == [["0_p", "1_p", "a", "b"], ["c"]]


def test_claims_reach_the_view(make):
    driver = make(config=server_config(limits=ClaimLimits(tightest_slo=0.1, max_priority=5.0)))
    driver.add(request("a", xargs={"taper_tpot_slo_ms": 30, "taper_ttft_slo_ms": 700, "taper_priority": 2}))
    columns = driver.taper.table.columns
    assert columns.tpot_slo_s.tolist() == [0.03]
    assert columns.ttft_slo_s.tolist() == [0.7]
    assert columns.priority.tolist() == [2.0]


@pytest.mark.parametrize(
    "xargs", [{"taper_nope": 1}, {"taper_priority": 1e9}, {"taper_group": 3}, {"taper_tpot_slo_ms": -1}]
)
def test_bad_claims_fall_back_to_the_defaults_and_count(make, caplog, xargs):
    driver = make()
    with caplog.at_level(logging.WARNING, logger="taper"):
        driver.add(request("a", xargs=xargs), request("b", xargs=xargs))
    assert driver.taper.rejected_claims == 2
    ours = [record.message for record in caplog.records if record.name.startswith("taper")]
    assert [message.startswith("claims of a refused") for message in ours] == [True]
    assert driver.taper.table.columns.tpot_slo_s.tolist() == [0.05, 0.05]
    driver.run()
    assert driver.finished == {"a", "b"}


def test_tags_without_the_seal_are_refused_where_there_is_a_secret(make):
    driver = make(config=server_config(group_secret="0123456789abcdef"))
    for name, tag in (("a", "g"), ("b", "g"), ("c", "sealed:0"), ("d", "sealed:0")):
        driver.add(request(name, xargs={"taper_group": tag}))
    assert groups(driver) == [["a"], ["b"], ["c", "d"]]
    assert driver.taper.rejected_claims == 2


def test_so_many_unstarted_branches_are_in_sight_as_there_are_row_slots(make):
    """64 slots: of 3 requests with 100 branches each their openers, and 64 extra ones of the oldest."""
    driver = make(config=OFF)
    for at, name in enumerate("abc"):
        driver.add(*fork(name, 100, arrival=float(at)))
    table = driver.taper.table
    assert table.columns.live.tolist() == [65, 1, 1]
    assert len(table.extras) == 297
    driver.step()  # each starts one; the two younger ones are no openers any more
    assert table.columns.live.tolist() == [65, 1, 1]
    assert len(table.extras) == 297
    driver.abort(*[branch for branch in table.branches if branch.endswith("_a")])
    assert table.columns.live.tolist() == [65, 1]
    driver.run()
    assert len(driver.finished) == 200
    assert not driver.taper.fallbacks
    assert not table.extras


def test_a_request_between_two_branches_stays_ahead_of_those_that_never_ran(make):
    driver = make(config=OFF, rows=2)
    driver.add(*fork("p", 2, tokens=3), *(request(name, arrival=1.0, tokens=20) for name in "abcd"))
    while "0_p" not in driver.finished:
        driver.step()
    assert [group.key[1] for group in driver.taper.table.columns.groups] == ["a", "p", "b"]


def test_requests_out_of_sight_queue_as_in_stock(make):
    driver = make(config=OFF, rows=8)
    driver.add(*fork("p", 4), *(request(f"s{at}", arrival=1.0 + at, tokens=5) for at in range(40)))
    assert len(driver.taper.table.columns.groups) == 8
    started = []
    while driver.scheduler.has_requests():
        started += [name for name in driver.step() if name.startswith("s") and name not in started]
    assert started == [f"s{at}" for at in range(40)]
    assert not driver.taper.fallbacks


def finish(driver):
    """Run to the end and return what the controller was told."""
    told = []
    observe = driver.taper.controller.observe
    driver.taper.controller.observe = lambda outcome: (told.extend(outcome.finished), observe(outcome))
    driver.run()
    return told


def test_accounts_of_a_serial_request(make):
    driver = make()
    driver.add(request("a", tokens=11))
    (told,) = finish(driver)
    assert told == FinishedRequest(
        tokens=11,
        serial_tokens=11,
        critical_path_tokens=11,
        residence_s=pytest.approx(10 * 0.02),
        externality_s=0.0,
        tpot_slo_s=0.05,
    )


def test_accounts_of_a_fork(make):
    """Branches of 4, 4 and 10 tokens, all eager: 4 tokens side by side, then 6 more alone."""
    driver = make(config=server_config(policy="eager"))
    short, long = fork("p", 3, tokens=4)[:2], fork("p", 3, tokens=10)[2]
    driver.add(*short, long)
    (told,) = finish(driver)
    assert (told.tokens, told.serial_tokens, told.critical_path_tokens) == (18, 6, 10)
    assert told.residence_s == pytest.approx(9 * 0.02)


def test_an_aborted_branch_takes_the_request_out_of_the_feedback(make):
    driver = make()
    driver.add(*fork("p", 2, tokens=20), request("s", tokens=5))
    for _ in range(3):
        driver.step()
    driver.abort("1_p")
    assert [one.tokens for one in finish(driver)] == [5]
    assert not driver.taper.table.groups
    assert driver.taper.table.parallel_groups == 0


def test_the_clock_starts_with_the_first_token(make, is_async):
    driver = make()
    driver.add(request("a", prompt=300, tokens=5))
    group = next(iter(driver.taper.table.groups.values()))
    driver.step()  # 256 prompt tokens
    assert np.isnan(group.first_token_s)
    for _ in range(2 if is_async else 1):
        driver.step()
    assert group.first_token_s == pytest.approx(100.0 + 2 * 0.02)


def test_a_siblings_prefix_is_spared_in_whole_blocks(make):
    """Prompt of 40 tokens in blocks of 16: two blocks come from the sibling, never the last token's."""
    driver = make(config=server_config(policy="off"))
    driver.add(*fork("p", 2, prompt=40))
    driver.add(*fork("q", 2, prompt=32, arrival=1.0))
    assert driver.taper.table.columns.spared_tokens.tolist() == [32, 32, 16, 16]


def test_prompts_of_tagged_branches_share_what_they_share(make):
    driver = make()
    stem, tag = list(range(1, 33)), {"taper_group": "g"}
    driver.add(request("a", prompt=[*stem, *[5] * 20], xargs=tag), request("b", prompt=[*stem, *[6] * 9], xargs=tag))
    assert driver.taper.table.columns.spared_tokens.tolist() == [32, 32]


def test_a_group_between_stages_starts_anew(make):
    driver = make()
    tag = {"taper_group": "g"}
    driver.add(request("a", tokens=3, xargs=tag))
    driver.run()
    assert not driver.taper.table.groups
    driver.now_s = 500.0
    driver.add(request("b", tokens=3, xargs=tag))
    assert driver.taper.table.columns.arrival_s.tolist() == [500.0]


def test_columns_kept_from_step_to_step_are_those_built_afresh(make):
    rng = np.random.default_rng(3)
    driver = make()
    names = ("request", "first", "prompt_tokens", "end_tokens", "spared_tokens", "ended_tokens", "computed_tokens")
    tag = {"taper_group": "g"}
    for turn in range(120):
        if turn % 4 == 0 and turn < 80:
            name = f"p{turn}"
            width, prompt, tokens = (int(rng.integers(*span)) for span in ((1, 6), (17, 90), (3, 30)))
            driver.add(*fork(name, width, prompt=prompt, tokens=tokens))
            driver.add(request(f"{name}-tagged", prompt=prompt, tokens=tokens, xargs=tag, arrival=float(turn)))
        if turn % 7 == 3 and driver.taper.table.branches:
            driver.abort(str(rng.choice(sorted(driver.taper.table.branches))))
        driver.step()
        kept = driver.taper.table.columns
        for group in driver.taper.table.groups.values():
            group.stirred()
        fresh = Columns(list(driver.taper.table.in_sight()))
        assert kept.ids == fresh.ids
        assert all(one is other for one, other in zip(kept.requests, fresh.requests, strict=True))
        assert all(one is other for one, other in zip(kept.output_tokens, fresh.output_tokens, strict=True))
        for column in names:
            assert getattr(kept, column).tolist() == getattr(fresh, column).tolist(), column
        assert [one.tolist() for one in kept.numbers] == [one.tolist() for one in fresh.numbers]
    assert not driver.taper.fallbacks


def test_only_a_group_that_changed_is_read_again(make):
    driver = make()
    driver.add(*fork("a", 3), *fork("b", 2))
    driver.step()
    before = {block.group.key[1]: block for block in driver.taper.table.in_sight()}
    driver.add(*fork("b", 3)[2:])
    after = {block.group.key[1]: block for block in driver.taper.table.in_sight()}
    assert after["a"] is before["a"]
    assert after["b"] is not before["b"]

"""What vLLM's own scheduler does at the seams that TAPER stands on: no TAPER in here but its hands, `SchedulerSeam`.

A failure says what a new release of vLLM does differently.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import RequestStatus

from taper.engines.vllm import compat
from taper.engines.vllm.seam import SchedulerSeam, preempted, step_rows
from tests.vllm.harness import BLOCK, TOKEN, make_stock, request


@pytest.fixture
def stock(tmp_path, is_async):
    def build(**kwargs):
        driver = make_stock(tmp_path, is_async=is_async, **kwargs)
        return driver, SchedulerSeam(driver.scheduler)

    return build


def names(requests):
    return [one.request_id for one in requests]


def test_every_schedule_call_counts_one_step(stock):
    driver, seam = stock()
    driver.add(request("a"))
    for _ in range(4):
        coming = seam.next_step
        driver.step()
        assert driver.scheduler.current_step == coming
        assert seam.next_step == coming + 1


def test_a_deferred_row_skips_one_step_and_keeps_its_blocks(stock):
    driver, seam = stock()
    driver.add(request("a"), request("b"))
    for _ in range(3):
        driver.step()
    row = driver.scheduler.requests["a"]
    blocks = driver.blocks("a")
    seam.defer([row])
    assert driver.step().keys() == {"b"}
    assert driver.blocks("a") == blocks
    assert row.status is RequestStatus.RUNNING
    assert driver.step().keys() == {"a", "b"}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_taken_out_of_the_queue_do_not_start_and_go_back_in_order(stock, policy):
    driver, seam = stock(policy=policy)
    driver.add(*(request(name, arrival=float(at)) for at, name in enumerate("abcd")))
    requests = driver.scheduler.requests
    held = seam.hold({requests["b"], requests["c"]})
    assert driver.step().keys() == {"a", "d"}
    seam.release(held)
    assert names(driver.scheduler.waiting) == ["b", "c"]
    driver.add(request("e", arrival=5.0))
    assert list(driver.step())[2:] == ["b", "c", "e"]


def test_the_step_token_bound_is_read_at_every_step(stock):
    driver, seam = stock(step_tokens=256)
    driver.add(request("a", prompt=100))
    seam.max_step_tokens = 30
    assert driver.step() == {"a": 30}
    seam.max_step_tokens = 256
    assert driver.step() == {"a": 70}


def test_tokens_are_handed_out_from_the_front_of_the_running_rows(stock):
    driver, seam = stock(step_tokens=64)
    driver.add(request("a", prompt=20), request("b", prompt=200))
    assert driver.step() == {"a": 20, "b": 44}
    seam.max_step_tokens = 10
    assert names(seam.running) == ["a", "b"]
    assert driver.step() == {"a": 1, "b": 9}
    seam.running.reverse()
    assert driver.step() == {"b": 10}


def test_the_last_running_row_is_the_one_preempted(stock):
    driver, seam = stock(blocks=16, max_model_len=200)
    driver.add(*(request(name, prompt=30, tokens=150) for name in "abcde"))
    for _ in range(5):
        driver.step()
    assert len(seam.running) == 5
    seam.running.reverse()
    while not preempted(driver.outputs[-1]):
        driver.step()
    assert "a" in driver.outputs[-1].preempted_req_ids
    victim = driver.scheduler.requests["a"]
    assert victim.status is RequestStatus.PREEMPTED
    assert victim.num_computed_tokens == 0


def test_columns_of_a_request_are_0_before_it_starts_and_cover_its_prompt_after(stock):
    driver, _ = stock()
    driver.add(request("a", prompt=20))
    one = driver.scheduler.requests["a"]
    assert compat.computed_tokens([one]).tolist() == [0]
    driver.schedule()
    assert compat.computed_tokens([one]).tolist() == [20]
    assert compat.placeholders([one]).tolist() == [1 if driver.is_async else 0]


def test_output_tokens_grow_in_place(stock):
    driver, _ = stock()
    driver.add(request("a", tokens=6))
    tokens = compat.output_tokens(driver.scheduler.requests["a"])
    driver.run()
    assert tokens == [TOKEN] * 6


def test_free_kv_falls_by_whole_blocks_and_comes_back(stock):
    driver, seam = stock()
    free = seam.kv_free_tokens
    driver.add(request("a", prompt=20, tokens=4))
    driver.step()
    assert free - seam.kv_free_tokens == 2 * BLOCK
    driver.run()
    assert seam.kv_free_tokens == free
    assert seam.kv_usage == 0.0


def test_block_hashes_are_chained():
    shared = list(range(1, 2 * BLOCK + 1))
    one = request("a", prompt=[*shared, *[1] * BLOCK, *[3] * BLOCK])
    other = request("b", prompt=[*shared, *[2] * BLOCK, *[3] * BLOCK])
    assert compat.common_prefix_blocks(one, other) == 2
    assert one.block_hashes[3] != other.block_hashes[3]


def test_a_step_says_who_ran_on_how_much(stock):
    driver, _ = stock()
    driver.add(request("a", prompt=20))
    assert step_rows(driver.schedule()) == (0, 0, 20)
    driver.update()
    driver.add(request("b", prompt=30))
    assert step_rows(driver.schedule()) == (1, 20, 30)


@pytest.mark.parametrize("aborts", [False, True])
def test_an_end_shows_in_the_status(stock, aborts):
    driver, seam = stock()
    driver.add(request("a", tokens=3))
    one = driver.scheduler.requests["a"]
    driver.step()
    if aborts:
        driver.abort("a")
    driver.run()
    assert compat.is_over(one)
    assert compat.ended_well(one) is not aborts
    assert driver.finished == (set() if aborts else {"a"})
    assert seam.is_empty


def test_children_of_n_are_named_after_their_parent():
    parent = ParentRequest(SimpleNamespace(external_req_id="x", request_id="p_1", params=SamplingParams(n=3)))
    child, params = parent.get_child_info(2)
    assert compat.parent_id(SimpleNamespace(request_id=child)) == "p_1"
    assert params.n == 1

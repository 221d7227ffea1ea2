"""What a request adds up to, and how it is made to fit a context."""

from __future__ import annotations

import pytest

from taper.core.types import ConfigError
from taper.workload import Request

REQUEST = Request(seed=0, index=3, arrival_s=0.0, prompt_tokens=100, stages=((5,), (3, 9, 4), (2,)))


def test_sums() -> None:
    assert (REQUEST.tokens, REQUEST.serial_tokens, REQUEST.critical_path_tokens) == (23, 7, 16)
    assert (REQUEST.branches, REQUEST.branching, REQUEST.kind) == (3, True, "branching")
    assert REQUEST.join_tokens == 7  # 3 + 4 come after the 9 that the cache holds
    # 5 tokens from 100, then 3, 9 and 4 from 105, then 2 from 121
    assert REQUEST.context_sum_tokens == 5 * 100 + 12.5 + 16 * 105 + (9 + 81 + 16) / 2 + 2 * 121 + 2


def test_the_longest_context_counts_branch_headers() -> None:
    assert REQUEST.peak_context_tokens == 100 + 5 + 3 + 16 + 2
    fork = Request(seed=0, index=0, arrival_s=0.0, prompt_tokens=10, stages=((7, 30),))
    assert fork.peak_context_tokens == 10 + 2 + 30


def test_a_request_that_fits_is_left_alone() -> None:
    assert REQUEST.fitted(126) is REQUEST
    shrunk = REQUEST.fitted(64)
    assert shrunk.peak_context_tokens <= 64
    assert [len(stage) for stage in shrunk.stages] == [1, 3, 1]
    assert shrunk.prompt_tokens > 40
    assert (shrunk.seed, shrunk.index) == (0, 3)


def test_a_context_too_small_for_a_token_per_branch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"request 3.*fits no context of 4"):
        REQUEST.fitted(4)

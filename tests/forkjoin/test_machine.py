"""The state machine: properties under random programs, and the cases by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taper.core.types import ConfigError
from taper.forkjoin.machine import Begin, BudgetExceeded, Machine, Over, Resume
from taper.forkjoin.plan import BranchSpec, Budget, Ending, Fork, Join, OnError

WIDE = Budget(max_branches=40, max_depth=3, max_total_tokens=500, wall_s=1000.0, branch_s=60.0)


class Driver:
    """Applies actions to a set of runs, as whoever drives the engine does, and holds every call to the contract."""

    def __init__(self, on_error=OnError.FAIL, budget=WIDE):
        self.machine = Machine(budget, on_error=on_error)
        self.running: set[str] = set()
        self.overs: dict[str, Ending] = {}
        self.begun: list[str] = []
        self.now_s = 0.0
        self.do(self.machine.start(0.0))

    def do(self, actions):
        for action in actions:
            if isinstance(action, Begin):
                assert action.branch not in self.begun
                self.begun.append(action.branch)
                self.running.add(action.branch)
            elif isinstance(action, Resume):
                assert action.branch in self.begun
                assert action.branch not in self.overs
                assert all(child in self.overs for child in action.children)
                self.running.add(action.branch)
            else:
                assert action.branch not in self.overs, "ended twice"
                self.overs[action.branch] = action.ending
                self.running.discard(action.branch)
        assert {name for name in self.begun if self.machine.is_running(name)} == self.running
        if not self.machine.is_over:
            assert self.running, "deadlock: something lives and nothing runs"
        return actions

    def fork(self, name, count, join=Join.ALL, *, goes_on=False):
        actions = self.machine.fork(name, count, join, self.now_s, parent_continues=goes_on)
        if join is Join.ALL:
            self.running.discard(name)
        return self.do(actions)

    def end(self, name, ending=Ending.STOP, detail=None):
        self.running.discard(name)
        return self.do(self.machine.end(name, ending, self.now_s, detail))

    def check_over(self):
        assert self.machine.is_over
        assert self.running == set()
        assert sorted(self.overs) == sorted(self.begun)
        assert self.machine.next_deadline_s == math.inf


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["fork", "fork", "end", "end", "fail", "grow", "tick"]),
        st.integers(0, 10_000),
        st.integers(1, 5),
        st.sampled_from([(Join.ALL, False), (Join.SYNC, True), (Join.NONE, True), (Join.NONE, False)]),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(MOVES, st.sampled_from(OnError), st.booleans())
def test_every_started_branch_ends_exactly_once_and_nothing_hangs(moves, on_error, aborts):
    driver = Driver(on_error)
    for move, pick, count, (join, goes_on) in moves:
        if driver.machine.is_over:
            break
        name = sorted(driver.running)[pick % len(driver.running)]
        if move == "fork":
            before = (driver.machine.started, set(driver.running))
            try:
                driver.fork(name, count, join, goes_on=goes_on)
            except BudgetExceeded:
                assert (driver.machine.started, driver.running) == before
        elif move == "grow":
            driver.do(driver.machine.grew(name, pick % 40, driver.now_s))
        elif move == "tick":
            driver.now_s += pick % 20
            driver.do(driver.machine.tick(driver.now_s))
            assert driver.machine.next_deadline_s > driver.now_s
        else:
            driver.end(name, Ending.STOP if move == "end" else Ending.ERROR)
    assert driver.machine.started <= WIDE.max_branches
    if aborts:
        driver.do(driver.machine.abort())
    while not driver.machine.is_over:  # nobody forks any more: it must come to an end by itself
        driver.end(min(driver.running))
    driver.check_over()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from([Join.ALL, Join.SYNC, Join.NONE]))
def test_abort_reaches_every_descendant(widths, join):
    driver = Driver()
    level = ["0"]
    for width in widths:
        parents, level = level, []
        for name in parents:
            actions = driver.fork(name, width, join, goes_on=join is not Join.ALL)
            level += [action.branch for action in actions if isinstance(action, Begin)]
    live = set(driver.begun) - set(driver.overs)
    driver.do(driver.machine.abort("gone"))
    assert {name for name, ending in driver.overs.items() if ending is Ending.ABORTED} == live
    driver.check_over()


def test_join_all_waits_for_the_last_child_and_hands_them_over_in_fork_order():
    driver = Driver()
    driver.fork("0", 3)
    assert driver.running == {"0.1", "0.2", "0.3"}
    assert driver.end("0.3") == [Over(branch="0.3", ending=Ending.STOP)]
    driver.end("0.1", Ending.LENGTH)
    over, resume = driver.end("0.2")
    assert (over.branch, resume) == ("0.2", Resume(branch="0", children=("0.1", "0.2", "0.3")))
    driver.fork("0", 1)
    assert "0.4" in driver.running  # names go on over the branch's life


def test_sync_waits_at_the_parents_own_end():
    driver = Driver()
    driver.fork("0", 2, Join.SYNC, goes_on=True)
    driver.end("0.1")
    assert driver.end("0") == []
    assert driver.end("0.2")[-1] == Resume(branch="0", children=("0.1", "0.2"))
    driver.end("0")
    driver.check_over()


def test_none_lets_the_parent_end_first():
    driver = Driver()
    driver.fork("0", 2, Join.NONE)
    assert driver.overs == {"0": Ending.STOP}
    driver.end("0.1", Ending.ERROR, "boom")
    assert not driver.machine.is_over
    driver.end("0.2")
    driver.check_over()
    assert [(over.branch, over.detail) for over in driver.machine.failures] == [("0.1", "boom")]


def test_a_failed_child_fails_its_join_and_says_why():
    driver = Driver()
    driver.fork("0", 2)
    driver.fork("0.2", 2)
    driver.end("0.2.1", Ending.ERROR, "boom")
    driver.check_over()
    assert driver.overs == {
        "0.2.1": Ending.ERROR,
        "0.2": Ending.JOIN_FAILED,
        "0.2.2": Ending.ABORTED,
        "0": Ending.JOIN_FAILED,
        "0.1": Ending.ABORTED,
    }
    assert driver.machine.failures[0] == Over(branch="0.2.1", ending=Ending.ERROR, detail="boom")


def test_skip_leaves_a_failed_child_out():
    driver = Driver(OnError.SKIP)
    driver.fork("0", 3)
    driver.end("0.2", Ending.TIMEOUT)
    driver.end("0.3")
    assert driver.end("0.1")[-1] == Resume(branch="0", children=("0.1", "0.3"))


def test_budgets_name_the_limit():
    driver = Driver(budget=Budget(max_branches=4, max_depth=1, max_total_tokens=10))
    with pytest.raises(BudgetExceeded, match=r"a fork into 4 would make 5 branches; budget\.max_branches is 4"):
        driver.machine.fork("0", 4, Join.ALL, 0.0, parent_continues=False)
    driver.fork("0", 2)
    with pytest.raises(BudgetExceeded, match=r"depth 2; budget\.max_depth is 1"):
        driver.machine.fork("0.1", 1, Join.ALL, 0.0, parent_continues=False)
    assert driver.do(driver.machine.grew("0.1", 10, 0.0)) == []
    actions = driver.do(driver.machine.grew("0.2", 1, 0.0))
    assert {action.ending for action in actions} == {Ending.BUDGET}
    assert {action.detail for action in actions} == {"budget.max_total_tokens is 10"}
    driver.check_over()


def test_deadlines():
    driver = Driver(OnError.SKIP, Budget(wall_s=100.0, branch_s=10.0))
    assert driver.machine.next_deadline_s == 10.0
    driver.now_s = 4.0
    driver.fork("0", 2)
    assert driver.machine.next_deadline_s == 14.0  # a waiting parent has no clock of its own
    driver.now_s = 9.0
    driver.fork("0.1", 1)
    assert driver.do(driver.machine.tick(14.0)) == [
        Over(branch="0.2", ending=Ending.TIMEOUT, detail="budget.branch_s is 10 s")
    ]
    actions = driver.do(driver.machine.tick(100.0))
    assert {action.detail for action in actions} == {"budget.wall_s is 100 s"}
    driver.check_over()


def test_a_branch_that_does_not_run_cannot_act():
    driver = Driver()
    driver.fork("0", 1)
    for call in (
        lambda: driver.machine.end("0", Ending.STOP, 0.0),
        lambda: driver.machine.grew("9", 1, 0.0),
        lambda: driver.machine.fork("0", 1, Join.ALL, 0.0, parent_continues=False),
    ):
        with pytest.raises(ValueError, match="is not running"):
            call()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"max_branches": 0}, "budget.max_branches must be between 1 and 4096"),
        ({"max_depth": 17}, "budget.max_depth must be between 1 and 16"),
        ({"max_total_tokens": 1.5}, "budget.max_total_tokens must be an integer"),
        ({"wall_s": 0}, "budget.wall_s must be between"),
        ({"branch_s": math.nan}, "budget.branch_s must be between"),
    ],
)
def test_bad_budgets(budget, words):
    with pytest.raises(ConfigError, match=words):
        Budget(**budget)


@pytest.mark.parametrize(
    ("fork", "words"),
    [
        ({"branches": ()}, "at least one branch"),
        ({"parent_continues": True}, "not 'all'"),
        ({"join": Join.SYNC}, "needs a parent that continues"),
    ],
)
def test_forks_that_make_no_sense(fork, words):
    with pytest.raises(ConfigError, match=words):
        Fork(**{"at": 0, "branches": (BranchSpec(label="1"),), **fork})

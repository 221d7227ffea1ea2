"""Incremental parsers against a whole-text reference, on outputs cut anywhere."""

from __future__ import annotations

import random

import pytest

from taper.forkjoin.plan import End, Fork
from taper.forkjoin.protocols import BUILT_IN
from tests.forkjoin import corpora, reference

COUNT = 1000
MESSAGES = ({"role": "user", "content": "Why?"},)


def parse(grammar, parts, *, is_root):
    """((offset, labels or "end"), ...) and the number of malformed tags of a text in `parts`."""
    front = BUILT_IN[grammar]({})
    parser = front.parser(front.opening(MESSAGES), is_root=is_root)
    events = [event for part in parts for event in parser.feed(part)] + parser.close()
    found = [(e.at, "end" if isinstance(e, End) else tuple(b.label for b in e.branches)) for e in events]
    assert all(isinstance(event, (Fork, End)) for event in events)
    return found, parser.malformed


def outputs(grammar, is_mutated):
    rng = random.Random(f"{grammar} {is_mutated}")
    for _ in range(COUNT):
        text = corpora.GRAMMARS[grammar](rng)
        yield rng, corpora.mutate(rng, text) if is_mutated else text


@pytest.mark.parametrize("is_root", [True, False], ids=["root", "branch"])
@pytest.mark.parametrize("is_mutated", [False, True], ids=["wellformed", "mutated"])
@pytest.mark.parametrize("grammar", corpora.GRAMMARS)
def test_1000_outputs_cut_at_every_token_say_what_the_whole_text_says(grammar, is_mutated, is_root):
    events = 0
    for number, (rng, text) in enumerate(outputs(grammar, is_mutated)):
        tokens = list(corpora.pieces(rng, text))
        found, malformed = parse(grammar, tokens, is_root=is_root)
        assert found == reference.read(grammar, text, is_root=is_root), text
        assert parse(grammar, [text], is_root=is_root) == (found, malformed), text
        if number % 200 == 0:  # and in two parts, at every one of its cuts
            for cut in range(len(tokens) + 1):
                parts = ["".join(tokens[:cut]), "".join(tokens[cut:])]
                assert parse(grammar, parts, is_root=is_root) == (found, malformed), parts
        events += len(found)
    speaks = is_root or grammar != "skeleton-of-thought"
    assert (events >= COUNT / 3) == speaks


@pytest.mark.parametrize("grammar", ["multiverse", "threadweaver", "hpd"])
def test_wellformed_roots_have_nothing_malformed_but_the_branches_ends(grammar):
    for _, text in outputs(grammar, False):
        flat = text.replace("</Path>", "").replace("</Thread>", "").replace("<Path>", "").replace("<Thread>", "")
        assert parse(grammar, [flat], is_root=True)[1] == 0, text


def one_fork(grammar, text, *, is_root=True):
    front = BUILT_IN[grammar]({})
    parser = front.parser(front.opening(MESSAGES), is_root=is_root)
    (event,) = parser.feed(text) + parser.close()
    return event, parser.malformed


def test_multiverse_headers_and_join():
    text = "<Goal> <Outline> 1.1: a</Outline> <Outline>1.2 : b</Outline> </Goal>"
    fork, malformed = one_fork("multiverse", text)
    assert (fork.at, malformed) == (len(text), 0)
    assert [branch.header for branch in fork.branches] == ["\n<Path>\n1.1:", "\n<Path>\n1.2:"]
    assert [branch.leg.kept_stops for branch in fork.branches] == [("</Goal>", "</Path>")] * 2
    assert [branch.closing for branch in fork.branches] == ["</Path>"] * 2
    assert (fork.join.value, fork.resume.text, fork.resume.leg.kept_stops) == ("all", "\n<Conclusion>\n", ("</Goal>",))


def test_threadweaver_headers_and_join():
    fork, _ = one_fork("threadweaver", "<Outlines><Outline> 1: a</Outline></Outlines>", is_root=False)
    (branch,) = fork.branches
    assert (branch.header, branch.closing) == ("\n<Thread>\n1:", "</Thread>")
    assert fork.resume.leg.kept_stops == ("</Outlines>", "</Thread>")


def test_sprint_headers_and_join():
    fork, _ = one_fork("sprint", "<Plan_2> x <prompt_2.1> a </prompt_2.1><prompt_2.2> b </prompt_2.2></Plan_2>")
    assert fork.lead == "\n<Execution_2>\n"
    assert [branch.header for branch in fork.branches] == ["<execution_2.1>\n", "<execution_2.2>\n"]
    assert [branch.closing for branch in fork.branches] == ["</execution_2.1>\n", "</execution_2.2>\n"]
    assert [branch.leg.stop for branch in fork.branches] == [("</execution_",)] * 2
    assert fork.resume.text == "</Execution_2>\n"


def test_hpd_parent_goes_on_and_child_has_its_header():
    fork, malformed = one_fork("hpd", "a<FORK>b</FORK>")
    assert (fork.at, fork.parent_continues, fork.join.value, malformed) == (7, True, "none", 1)
    assert [branch.header for branch in fork.branches] == ["<CHILD>"]


@pytest.mark.parametrize(
    ("inner", "names", "malformed"),
    [
        ("<Outline> 1: a</Outline><Outline> 1: b</Outline>", ["1"], 1),  # duplicate
        ("<Outline> a</Outline><Outline> b</Outline>", ["1", "2"], 2),  # no ids
        ("<Outline> 2: a</Outline><Outline> b</Outline>", ["2"], 1),  # position 2 is taken
        ("<Outline> 1: a<Outline> 2: b", ["1", "2"], 2),  # unterminated
        ("<Outline> 1: a</Outline></Outline>", ["1"], 1),
        ("<Outline> 1: <Path> a</Outline>", ["1"], 1),
        ("<Goal><Outline> 7: a</Outline>", ["7"], 1),  # a list in a list: the last one counts
        ("<Outline_1> 1: a</Outline_1><Outline> 3: b</Outline>", ["3"], 2),
    ],
)
def test_malformed_outlines_have_a_defined_meaning(inner, names, malformed):
    fork, count = one_fork("multiverse", f"<Goal>{inner}</Goal>")
    assert ([branch.label for branch in fork.branches], count) == (names, malformed)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("multiverse", "<Goal></Goal>"),
        ("multiverse", "</Goal>"),
        ("multiverse", "<Goal><Outline> 1: a</Outline>"),
        ("sprint", "<Plan_1><prompt_1.1>a</prompt_1.1></Plan_2>"),
        ("sprint", "<Plan_x><prompt_1.1>a</prompt_1.1></Plan_x>"),
        ("hpd", "<CHILD>"),
    ],
)
def test_what_does_not_fit_is_text_and_counted(grammar, text):
    found, malformed = parse(grammar, [text], is_root=True)
    assert found == []
    assert malformed > 0


def test_skeleton_points_are_branches_with_one_common_prompt():
    fork, malformed = one_fork("skeleton-of-thought", "Sure!\n1. Light bends\n2) **Blue** wins\n**3.** The eye")
    assert malformed == 0
    assert [branch.header for branch in fork.branches] == ["1. Light bends:", "2. **Blue** wins:", "3. The eye:"]
    assert all(branch.messages == fork.branches[0].messages for branch in fork.branches)
    assert "Why?" in fork.branches[0].messages[-1]["content"]
    assert fork.resume is None


def test_without_an_outline_the_question_is_answered_as_it_is():
    fork, malformed = one_fork("skeleton-of-thought", "I cannot.")
    assert [(branch.messages, branch.header) for branch in fork.branches] == [(MESSAGES, "")]
    assert malformed == 1

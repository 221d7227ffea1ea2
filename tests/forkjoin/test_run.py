"""Programs from start to end, on a stand-in for the engine."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing

import pytest

from taper.claims import SEALED
from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.forkjoin import protocol
from taper.forkjoin.answers import Gathered, event_json
from taper.forkjoin.compile import chat_program, explicit_program
from taper.forkjoin.events import Done, Ended, Joined, Started, Text
from taper.forkjoin.plan import BranchSpec, End, Fork, Join, Resume
from taper.forkjoin.protocols import BUILT_IN
from taper.forkjoin.service import Service
from taper.forkjoin.wire import ChatRequest, ProgramRequest
from tests.forkjoin.toy import BLOCK, ToyEngine

CONFIG = ServerConfig()


def chat(engine, protocol, content="Q", **fields):
    options = {key: fields.pop(key) for key in ("options", "budget", "branch_max_tokens") if key in fields}
    body = {"messages": [{"role": "user", "content": content}], "taper": {"protocol": protocol, **options}, **fields}
    return chat_program(ChatRequest.model_validate(body), engine, CONFIG, None)


def explicit(engine, **fields):
    return explicit_program(ProgramRequest.model_validate(fields), engine, CONFIG, None)


def run(engine, program):
    """(events, gathered, ordered answer) of a program that is left alone."""

    async def collect():
        service, events, gathered, answer = Service(engine, time.monotonic), [], Gathered(), ""
        async with aclosing(service.events(program)) as stream:
            async for event in stream:
                events.append(event)
                answer += gathered.feed(event)
        await asyncio.sleep(0.01)
        assert (service.live, engine.live) == (0, {})
        return events, gathered, answer

    return asyncio.run(collect())


def multiverse(prompt):
    if prompt.endswith(">"):
        return "So.<Goal><Outline> 1: a</Outline><Outline> 2: b</Outline></Goal>never said"
    if prompt.endswith("1:"):
        return " one</Path>more"
    if prompt.endswith("2:"):
        return " second"  # ends by itself, unclosed
    return "Done."


def test_multiverse_forks_joins_and_goes_on_from_its_own_tokens():
    engine = ToyEngine(multiverse)
    events, gathered, answer = run(engine, chat(engine, "multiverse"))
    goal = "So.<Goal><Outline> 1: a</Outline><Outline> 2: b</Outline></Goal>"
    paths = "\n<Path>\n1: one</Path>\n<Path>\n2: second</Path>"
    assert answer == f"{goal}{paths}\n<Conclusion>\nDone."
    assert [run["prompt"] for run in engine.runs] == [
        "[Q]>",
        f"[Q]>{goal}\n<Path>\n1:",
        f"[Q]>{goal}\n<Path>\n2:",
        f"[Q]>{goal}{paths}\n<Conclusion>\n",
    ]
    assert [run["stop"] for run in engine.runs] == [
        ["</Goal>"],
        ["</Goal>", "</Path>"],
        ["</Goal>", "</Path>"],
        ["</Goal>"],
    ]
    assert len({run["id"] for run in engine.runs}) == 1
    (tag,) = {run["extra"]["taper_group"] for run in engine.runs}
    assert tag.startswith(SEALED)
    assert engine.runs[0]["id"].removeprefix("taper-") not in tag  # an answer shows that id
    assert [(b.id, b.parent, b.label, b.text, b.finish_reason) for b in gathered.branches.values()] == [
        ("0", None, "", goal + "Done.", "stop"),
        ("0.1", "0", "1", " one</Path>", "stop"),
        ("0.2", "0", "2", " second", "stop"),
    ]
    assert isinstance(events[-1], Done)
    assert (events[-1].status.value, events[-1].error) == ("complete", None)


def test_usage_counts_every_token_once():
    engine = ToyEngine(multiverse)
    _, gathered, _ = run(engine, chat(engine, "multiverse"))
    usage = gathered.done.usage
    goal, first, second = 64, len(" one</Path>"), len(" second")
    assert (usage.prompt_tokens, usage.root_tokens, usage.branch_tokens) == (4, goal + 5, first + second)
    header = len("\n<Path>\n1:")
    assert usage.join_tokens == 2 * header + first + second + len("</Path>")
    for prefill in usage.forks:  # all but the last generated token is cached, in whole blocks
        assert prefill.prompt_tokens == 4 + goal + header
        assert prefill.recomputed_tokens <= BLOCK + header
    (join,) = usage.joins
    inherited_and_first = 4 + goal + header + first
    assert join.cached_tokens == (inherited_and_first - 1) // BLOCK * BLOCK  # the first child is reused as it is
    assert usage.recomputed_tokens == usage.prefilled_tokens - usage.cached_tokens


def test_an_unterminated_branch_is_closed_at_its_limit_and_counted():
    engine = ToyEngine(multiverse)
    _, gathered, answer = run(engine, chat(engine, "multiverse", max_tokens=64, branch_max_tokens=5))
    assert "\n<Path>\n1: one</Path>\n<Path>\n2: seco</Path>\n<Conclusion>\nDone." in answer
    assert [b.finish_reason for b in gathered.branches.values()] == ["stop", "length", "length"]
    assert gathered.done.usage.unterminated_branches == 2
    assert [run["max_tokens"] for run in engine.runs] == [64, 5, 5, 64]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_nested_outlines_are_nested_forks(chunk):
    def reply(prompt):
        if prompt.endswith(">"):
            return "<Goal><Outline> 1: a</Outline></Goal>"
        if prompt.endswith("\n1:"):
            return "<Goal><Outline> 1.1: x</Outline><Outline> 1.2: y</Outline></Goal>"
        if prompt.endswith(("1.1:", "1.2:")):
            return "leaf</Path>"
        return "inner</Path>" if prompt.count("<Conclusion>") == 1 else "end"

    engine = ToyEngine(reply, chunk=chunk)
    _, gathered, answer = run(engine, chat(engine, "multiverse"))
    assert answer == (
        "<Goal><Outline> 1: a</Outline></Goal>\n<Path>\n1:"
        "<Goal><Outline> 1.1: x</Outline><Outline> 1.2: y</Outline></Goal>"
        "\n<Path>\n1.1:leaf</Path>\n<Path>\n1.2:leaf</Path>\n<Conclusion>\n"
        "inner</Path>\n<Conclusion>\nend"
    )
    assert list(gathered.branches) == ["0", "0.1", "0.1.1", "0.1.2"]


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_hpd_children_start_from_the_text_up_to_their_fork_and_are_spliced_in(chunk):
    def reply(prompt):
        return {"k": "A<FORK>B<FORK>C", "A": "x", "B": "y"}.get(
            prompt.replace("<FORK>", "").replace("<CHILD>", "")[-1], "k"
        )

    engine = ToyEngine(lambda prompt: "A<FORK>B<FORK>C" if prompt == "[Q]>" else reply(prompt), chunk=chunk)
    _, gathered, answer = run(engine, chat(engine, "hpd"))
    assert answer == "A<FORK><CHILD>xB<FORK><CHILD>yC"
    assert [run["prompt"] for run in engine.runs] == ["[Q]>", "[Q]>A<FORK><CHILD>", "[Q]>A<FORK>B<FORK><CHILD>"]
    assert gathered.branches["0"].text == "A<FORK>B<FORK>C"
    assert gathered.done.status.value == "complete"


@pytest.mark.parametrize("chunk", [1, 64])
def test_sprint_runs_its_stages(chunk):
    def reply(prompt):
        if prompt.endswith(">"):
            if "Execution_1" in prompt:
                return "unreachable"
            return "<Plan_1><prompt_1.1>a</prompt_1.1><prompt_1.2>b</prompt_1.2></Plan_1>"
        if prompt.endswith("_1.1>\n") and "</execution_1.2>" not in prompt:
            return "ex1</execution_1.1>"
        if prompt.endswith("_1.2>\n") and "</execution_1.2>" not in prompt:
            return "ex2</execution_1.2>"
        return "All done."

    engine = ToyEngine(reply, chunk=chunk)
    _, _, answer = run(engine, chat(engine, "sprint"))
    assert answer == (
        "<Plan_1><prompt_1.1>a</prompt_1.1><prompt_1.2>b</prompt_1.2></Plan_1>\n<Execution_1>\n"
        "<execution_1.1>\nex1</execution_1.1>\n<execution_1.2>\nex2</execution_1.2>\n</Execution_1>\nAll done."
    )
    assert engine.runs[-1]["prompt"] == "[Q]>" + answer.removesuffix("All done.")


@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize(
    ("protocol", "first", "malformed"),
    [
        ("multiverse", "<Goal>no outline</Goal>", 1),
        ("multiverse", "never opened</Goal>", 1),
        ("threadweaver", "<Outlines></Outlines>", 1),
        ("sprint", "<Plan_1>thinking on</Plan_1>", 0),
    ],
)
def test_a_closing_tag_that_forks_nothing_is_text_and_the_branch_goes_on(protocol, first, malformed, chunk):
    engine = ToyEngine(lambda prompt: first + "dropped" if prompt.endswith("]>") else " and on", chunk=chunk)
    _, gathered, answer = run(engine, chat(engine, protocol, max_tokens=40))
    assert answer == f"{first} and on"
    assert [run["prompt"] for run in engine.runs] == ["[Q]>", f"[Q]>{first}"]
    assert [run["max_tokens"] for run in engine.runs] == [40, 40 - len(first)]  # one limit for both
    assert [(branch.text, branch.finish_reason) for branch in gathered.branches.values()] == [(answer, "stop")]
    usage = gathered.done.usage
    assert (usage.malformed_tags, usage.forks, usage.joins) == (malformed, [], [])
    assert usage.prefilled_tokens == 4 + 4 + len(first)


def test_a_branch_that_only_closes_what_it_never_opened_meets_its_limit():
    engine = ToyEngine(lambda prompt: "</Goal>")
    _, gathered, answer = run(engine, chat(engine, "multiverse", max_tokens=21))
    assert answer == "</Goal>" * 3
    assert (len(engine.runs), gathered.done.status.value) == (3, "complete")


def test_skeleton_hides_the_outline_and_writes_points_in_order():
    def reply(prompt):
        if "outline of an answer" in prompt:
            return "1. Sun\n2. Moon\n3. Sky"
        return {"Sun:": " hot.", "Moon:": " cold.", "Sky:": " blue."}[prompt.rsplit(" ", 1)[1]]

    engine = ToyEngine(reply)
    _, _, answer = run(engine, chat(engine, "skeleton-of-thought"))
    assert answer == "1. Sun: hot.\n\n2. Moon: cold.\n\n3. Sky: blue.\n\n"
    assert len(engine.runs) == 4  # nothing runs after the points


def test_scripted_forks_where_told():
    engine = ToyEngine(lambda prompt: "x")
    stages = [
        {"branches": 3, "tokens": [2, 5, 3], "header": "#", "then_tokens": 4},
        {"branches": 2, "tokens": 1, "join": "none"},
    ]
    _, gathered, answer = run(engine, chat(engine, "scripted", options={"lead_tokens": 6, "stages": stages}))
    assert answer == "xxxxxx#xx#xxxxx#xxx\nxxxx\nx\nx"
    assert [b.tokens for b in gathered.branches.values()] == [10, 2, 5, 3, 1, 1]
    assert engine.most_live == 3


def test_explicit_program_with_join_and_continuation():
    engine = ToyEngine(lambda prompt: "!no" if prompt.endswith("bad:") else f"<{prompt[-2]}>")
    program = explicit(
        engine,
        prompt="common ",
        branches=[{"id": "a", "suffix": "a:", "max_tokens": 2}, {"id": "b", "suffix": "b:", "stop": ["b"]}],
        join={"separator": "|", "instruction": " sum:", "continuation": {"max_tokens": 9}},
        temperature=0.5,
        seed=10,
    )
    events, gathered, _ = run(engine, program)
    assert engine.runs[-1]["prompt"] == "common a:<a|b:<b| sum:"
    assert [(run["max_tokens"], run["stop"], run["seed"]) for run in engine.runs] == [
        (2, [], 10),
        (256, ["b"], 11),
        (9, [], 12),
    ]
    assert {run["temperature"] for run in engine.runs} == {0.5}
    assert gathered.branches["0"].text == "<m>"
    assert [event.children for event in events if isinstance(event, Joined)] == [("0.1", "0.2")]


def test_order_reuse_puts_the_longest_child_first_and_its_kv_is_reused():
    engine = ToyEngine(lambda prompt: "s" if prompt.endswith("1:") else "l" * 30)
    branches = [{"suffix": "1:"}, {"suffix": "2:"}]
    join = {"order": "reuse", "separator": "", "continuation": {"max_tokens": 1}}
    _, gathered, _ = run(engine, explicit(engine, prompt="p" * 20, branches=branches, join=join))
    assert engine.runs[-1]["prompt"] == "p" * 20 + "2:" + "l" * 30 + "1:s"
    (join_prefill,) = gathered.done.usage.joins
    assert join_prefill.recomputed_tokens == 55 - 51 // BLOCK * BLOCK


def test_branches_can_be_chats_of_their_own():
    engine = ToyEngine(lambda prompt: "r")
    messages = [{"role": "user", "content": "doc"}]
    own = [{"role": "user", "content": "part"}]
    run(engine, explicit(engine, messages=messages, branches=[{"messages": own, "suffix": "S"}]))
    assert engine.runs[0]["prompt"] == "[doc][part]>S"


def test_a_failed_branch_fails_the_join_with_what_there_is():
    engine = ToyEngine(lambda prompt: "!out of luck" if prompt.endswith("2:") else "~")
    program = explicit(engine, prompt="p", branches=[{"suffix": "1:"}, {"suffix": "2:"}], join={})
    _, gathered, _ = run(engine, program)
    assert gathered.done.status.value == "failed"
    assert gathered.done.error == "branch 0.2 ended with error: RuntimeError: out of luck"
    assert [b.finish_reason for b in gathered.branches.values()] == ["join_failed", "aborted", "error"]


def test_a_program_is_aborted_on_the_engine_also_where_its_runs_were_cut_before_they_spoke():
    """A run that is cancelled while the engine takes it in may be left there: only the program's id reaches it."""
    engine = ToyEngine(lambda prompt: "!no" if prompt.endswith("1:") else "~")
    program = explicit(engine, prompt="p", branches=[{"suffix": "1:"}, {"suffix": "2:"}], join={})
    run(engine, program)
    assert engine.aborted == [program.id]


def test_skip_leaves_it_out_and_says_partial():
    engine = ToyEngine(lambda prompt: "!out of luck" if prompt.endswith("2:") else "ok")
    branches = [{"suffix": "1:"}, {"suffix": "2:"}]
    join = {"continuation": {"max_tokens": 5}, "separator": "/"}
    _, gathered, _ = run(engine, explicit(engine, prompt="p", branches=branches, join=join, on_branch_error="skip"))
    assert (gathered.done.status.value, engine.runs[-1]["prompt"]) == ("partial", "p1:ok/")


def test_a_branch_that_forks_for_ever_meets_the_budget():
    engine = ToyEngine(
        lambda prompt: "<Goal><Outline> 1: a</Outline><Outline> 2: b</Outline></Goal>", max_model_tokens=99999
    )
    _, gathered, _ = run(engine, chat(engine, "multiverse", budget={"max_branches": 20}))
    assert gathered.done.status.value == "failed"
    assert "budget.max_" in gathered.done.error
    assert len(gathered.branches) <= 20
    engine = ToyEngine(lambda prompt: "<FORK>" * 500, max_model_tokens=99999)
    _, gathered, _ = run(engine, chat(engine, "hpd", budget={"max_branches": 9, "max_total_tokens": 5000}))
    assert "budget.max_" in gathered.done.error
    assert len(gathered.branches) <= 9


def test_token_budget_and_wall_time_end_everything():
    engine = ToyEngine(lambda prompt: "~")
    program = chat(engine, "hpd", budget={"max_total_tokens": 40})
    _, gathered, _ = run(engine, program)
    assert gathered.done.error == "branch 0 ended with budget: budget.max_total_tokens is 40"
    assert gathered.done.usage.generated_tokens == 41
    engine = ToyEngine(lambda prompt: "~", max_model_tokens=10**9)
    _, gathered, _ = run(engine, chat(engine, "hpd", budget={"wall_s": 0.05, "max_total_tokens": 10**7}))
    assert gathered.done.error == "branch 0 ended with timeout: budget.wall_s is 0.05 s"


def test_a_join_that_does_not_fit_the_context_is_a_clear_error():
    reply = lambda prompt: multiverse(prompt) if prompt[-1] in ">:" and len(prompt) < 150 else "x"  # noqa: E731
    engine = ToyEngine(
        lambda prompt: " x" * 60 if prompt.endswith(("1:", "2:")) else reply(prompt), max_model_tokens=220
    )
    _, gathered, _ = run(engine, chat(engine, "multiverse"))
    assert gathered.done.status.value == "failed"
    assert "ContextFull: a context of" in gathered.done.error
    assert "this model's is 220" in gathered.done.error


def nested(levels):
    return [{"max_tokens": 1, **({"fork": {"branches": nested(levels - 1)}} if levels > 1 else {})}]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"branches": [{"max_tokens": 1000}]}, "1001 tokens in one context; this model's context is 1000"),
        ({"branches": [{"max_tokens": 400}] * 3, "join": {"continuation": {}}}, "in one context; this model's context"),
        ({"branches": [{"max_tokens": 1}] * 17}, "17 branches at once; the rows this server holds are 16"),
        (
            {"branches": [{"max_tokens": 1}] * 4, "budget": {"max_branches": 4}},
            "5 branches in all; budget.max_branches",
        ),
        ({"branches": [{"max_tokens": 9}] * 4, "budget": {"max_total_tokens": 35}}, "36 generated tokens; budget"),
        (
            {"branches": [{"max_tokens": 0, "fork": {"branches": [{}]}}], "budget": {"max_depth": 1}},
            "2 forks on top of each other; budget.max_depth is 1",
        ),
        ({"branches": [{"id": "a"}, {"id": "a"}]}, "id 'a' is given twice"),
        ({"branches": [{}], "join": {"instruction": "x"}}, "instruction goes only with a continuation"),
        ({"branches": [{"messages": [{"role": "user", "content": "x"}]}]}, "messages go only with a program that has"),
        ({"branches": [{}], "vllm_xargs": {"taper_group": "mine"}}, "a program is a group of its own"),
        ({"branches": [{}], "vllm_xargs": {"taper_tpot_slo_ms": 1}}, "taper_tpot_slo_ms must be between"),
        ({"branches": [{}], "budget": {"max_branches": 10**6}}, "budget.max_branches must be between"),
        ({"branches": [{}], "prompt": ""}, "prompt must not be empty"),
        ({"branches": nested(33)}, "nest more than 32 deep"),
    ],
)
def test_programs_that_cannot_end_well_are_refused_before_anything_runs(fields, words):
    engine = ToyEngine(lambda prompt: "x")
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        explicit(engine, **{"prompt": "p", **fields})
    assert engine.runs == []


def test_worst_case_is_exact():
    """A program sized to the last token of the context fits, and fills it."""
    engine = ToyEngine(lambda prompt: "x", max_model_tokens=2 + 2 * (1 + 10 + 1) + 1 + 5)
    fields = {"prompt": "pp", "branches": [{"suffix": ":", "max_tokens": 10}] * 2, "ignore_eos": True}
    join = {"separator": "|", "instruction": "i", "continuation": {"max_tokens": 5}}
    _, gathered, _ = run(engine, explicit(engine, **fields, join=join))
    assert gathered.branches["0"].tokens == 5
    with pytest.raises(ConfigError, match="tokens in one context"):
        explicit(engine, **fields, join={**join, "instruction": "ii"})


@pytest.mark.parametrize(
    ("protocol", "options", "words"),
    [
        ("nope", {}, "taper.protocol must be one of multiverse, .*, off, not 'nope'"),
        ("off", {}, "goes alone"),
        ("multiverse", {"x": 1}, "takes none, not x"),
        ("skeleton-of-thought", {"points": 3}, "unknown 'points'"),
        ("skeleton-of-thought", {"max_points": 1}, "max_points must be between 2 and 10"),
        ("scripted", {}, "taper.options.stages: Field required"),
        ("scripted", {"stages": [{"branches": 2, "tokens": [1]}]}, "2 branches need as many tokens, not 1"),
        (
            "scripted",
            {"stages": [{"branches": 1, "tokens": 1, "join": "none", "then_tokens": 1}]},
            "nothing can follow",
        ),
        ("scripted", {"stages": [{"branches": 17, "tokens": 1}]}, "17 branches at once"),
    ],
)
def test_protocols_refuse_what_they_cannot_do(protocol, options, words):
    engine = ToyEngine(lambda prompt: "x")
    with pytest.raises(ConfigError, match=words):
        chat(engine, protocol, options=options)


def test_messages_that_do_not_render_are_refused():
    engine = ToyEngine(lambda prompt: "x")
    with pytest.raises(ConfigError, match="messages: no clowns"):
        explicit(engine, messages=[{"role": "clown", "content": "x"}], branches=[{}])


def test_200_programs_whose_readers_leave_at_random_points_leave_nothing_behind():
    rng = random.Random(7)

    async def leave(service, engine):
        kinds = ["multiverse", "hpd", "scripted"]
        options = {"scripted": {"stages": [{"branches": 5, "tokens": 40, "then_tokens": 5}] * 2}}
        kind = rng.choice(kinds)
        program = chat(engine, kind, options=options.get(kind, {}))
        left = rng.randint(0, 60)
        async with aclosing(service.events(program)) as events:
            async for _ in events:
                left -= 1
                if left < 0:
                    break

    async def all_of_them():
        def reply(prompt):
            return "~" if rng.random() < 0.3 else multiverse(prompt)

        engine = ToyEngine(reply)
        service = Service(engine, time.monotonic)
        for _ in range(20):
            await asyncio.gather(*[leave(service, engine) for _ in range(10)])
        for _ in range(100):
            await asyncio.sleep(0)
        totals = service.totals
        assert (service.live, engine.live, len(asyncio.all_tasks())) == (0, {}, 1)
        assert sum(totals[name] for name in ("complete", "partial", "failed", "left")) == service.started == 200
        assert totals["left"] > 50
        assert len(set(engine.aborted)) == len(engine.aborted) == 200

    asyncio.run(all_of_them())


def test_every_branch_starts_once_and_ends_once_and_streams_its_text():
    engine = ToyEngine(multiverse)
    events, gathered, _ = run(engine, chat(engine, "multiverse"))
    started = [event.branch for event in events if isinstance(event, Started)]
    ended = [event.branch for event in events if isinstance(event, Ended)]
    assert (sorted(started), sorted(ended)) == (["0", "0.1", "0.2"], ["0", "0.1", "0.2"])
    for name, branch in gathered.branches.items():
        texts = [e.text for e in events if isinstance(e, Text) and e.branch == name and not e.is_given]
        assert "".join(texts) == branch.text
    kinds = [data["type"] for data in map(event_json, events) if data]
    assert kinds[0] == "branch.started"
    assert kinds[-1] == "program.done"


def test_replicas_are_taken_in_turn_and_held_for_the_whole_program():
    engine = ToyEngine(multiverse, replicas=3)

    async def three():
        service = Service(engine, time.monotonic)
        for _ in range(4):
            request = ChatRequest.model_validate(
                {"messages": [{"role": "user", "content": "Q"}], "taper": {"protocol": "multiverse"}}
            )
            program = chat_program(request, engine, CONFIG, service.next_replica())
            async with aclosing(service.events(program)) as events:
                async for _ in events:
                    pass

    asyncio.run(three())
    assert [run["replica"] for run in engine.runs] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4


def test_programs_that_are_accepted_at_once_go_to_different_replicas():
    service = Service(ToyEngine(multiverse, replicas=2), time.monotonic)
    assert [service.next_replica() for _ in range(4)] == [0, 1, 0, 1]


class Noting:
    """A protocol of a plug-in: at "!" a note is written beside the text, and all notes are read at the end of it."""

    name = "noting"
    keeps_special_tokens = False

    def __init__(self, options):
        self.options = options

    def opening(self, messages):
        return BranchSpec(label="", messages=tuple(messages))

    def parser(self, spec, *, is_root):
        return NotingParser(is_root)


class NotingParser:
    def __init__(self, is_root):
        self.malformed = 0
        self.chars = 0
        self.is_root = is_root

    def feed(self, text):
        ends = [self.chars + at + 1 for at, char in enumerate(text) if char == ("!" if self.is_root else ".")]
        self.chars += len(text)
        if not self.is_root:
            return [End(at=end) for end in ends[:1]]
        resume = Resume(text="=", separator=",")
        return [
            Fork(
                at=end,
                branches=(BranchSpec(label="n", header="?", closing="."),),
                join=Join.SYNC,
                parent_continues=True,
                resume=resume,
            )
            for end in ends
        ]

    def close(self):
        return []


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_sync_children_start_at_once_and_are_joined_at_the_parents_end(chunk, monkeypatch):
    def reply(prompt):
        if prompt.endswith("="):
            return "end"
        return {"a!?": "n1.dropped", "b!?": "n2"}.get(prompt[-3:], "a!b!c" if prompt.endswith(">") else "")

    engine = ToyEngine(reply, chunk=chunk)
    request = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "Q"}], "taper": {"protocol": "noting"}}
    )
    monkeypatch.setitem(BUILT_IN, "noting", Noting)
    events, _, answer = run(engine, chat_program(request, engine, CONFIG, None))
    assert engine.runs[-1]["prompt"] == "[Q]>a!b!c?n1.,?n2.,="
    assert answer == "a!?n1.b!?n2.c=end"
    assert [event.children for event in events if isinstance(event, Joined)] == [("0.1", "0.2")]


def test_a_plugin_protocol_is_found_by_its_entry_point(monkeypatch):
    class Point:
        name = "noting"

        def load(self):
            return Noting

    monkeypatch.setattr(protocol, "entry_points", lambda group: [Point()] if group == "taper.protocols" else [])
    engine = ToyEngine(lambda prompt: "x")
    program = chat(engine, "noting", options={"deep": True})
    assert program.front.options == {"deep": True}
    with pytest.raises(ConfigError, match="scripted, noting, off, not 'other'"):
        chat(engine, "other")

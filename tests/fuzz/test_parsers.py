"""Everything that reads the outside world: it understands its input or refuses it with its own error, and nothing else.

The error's text must survive a log and an HTTP answer, so it encodes.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from taper.bench.store import Store
from taper.bench.stream import StreamReader
from taper.claims import ClaimLimits, parse_claims
from taper.cli import _config, _model_and_flags
from taper.client.types import EVENTS, Program
from taper.config import ServerConfig, resolve_policy
from taper.core.latency import LinearLatency
from taper.core.policies import Guidance, Taper
from taper.core.types import ConfigError, Knobs, Slo
from taper.engines.vllm import command
from taper.files import parse_table
from taper.forkjoin.compile import chat_program, explicit_program
from taper.forkjoin.plan import End, Fork
from taper.forkjoin.protocol import resolve_protocol
from taper.forkjoin.protocols import BUILT_IN
from taper.forkjoin.wire import ChatRequest, ProgramRequest
from taper.profile import load_profile
from taper.records import RecordError, request_file, step_file
from taper.results import ResultsError, document, read_runs
from taper.sim import hardware, scenario
from taper.sim.command import Options, cases_of
from taper.trace.decision import Decision, dump
from taper.trace.file import read_trace as read_decisions
from taper.trace.replay import replay
from taper.workload import Replay, parse_mix, read_trace
from tests.core.views import random_view
from tests.forkjoin import corpora
from tests.forkjoin.toy import ToyEngine
from tests.fuzz.explore import examples
from tests.fuzz.inputs import FRAGMENTS, json_texts, texts, toml_texts, trees
from tests.test_records import REQUEST, STEP
from tests.test_results import RUN

ROOT = Path(__file__).parents[2]
PROFILE = (ROOT / "results/engine/cpu-smollm2-profile.json").read_text("utf-8")
MACHINE = hardware.hardware("a100x8-qwen3-32b")
SCENARIOS = tuple(
    (ROOT / f"src/taper/sim/scenarios/{name}.toml").read_text("utf-8") for name in ("headline", "bursts", "spikes")
)
MACHINES = tuple(path.read_text("utf-8") for path in (ROOT / "src/taper/sim/machines").glob("*.toml"))
MIX = """
branching_share = 0.5
prompt = {low = 3, high = 9, shape = "lognormal"}
serial = {values = [3, 9], weights = [1, 2.5]}
slo_classes = [[0.5, 2.0]]
branch = {points = [[0, 1], [0.5, 20], [1, 90]]}
at_arrival = true
"""
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5,374,44\n2023-11-17 00:00:01.25,396,109\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,a,472,18,490,x\n45.5,b,9,0,9,y\n"
MOONCAKE = '{"timestamp": 27, "input_length": 6, "output_length": 5}\n'
CHUNK = """{"choices": [{"index": 0, "text": "a", "token_ids": [1, 2], "delta": {"content": "b"},
    "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "error": {"message": "m"}}"""
FORK = """{"prompt": "p", "branches": [{"suffix": "a", "max_tokens": 3, "stop": ["x"]}, {"id": "b", "fork": {"branches":
    [{"messages": null}]}}], "join": {"continuation": {"max_tokens": 4}}, "lead": {"seed": 3}, "budget": {"wall_s": 3},
    "vllm_xargs": {"taper_priority": 0}}"""
CHAT = """{"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 9, "taper": {"protocol": "scripted",
    "options": {"lead_tokens": 2, "stages": [{"branches": 2, "tokens": [3, 4], "then_tokens": 5}]}}}"""
PLAIN = """{"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    "taper": {"protocol": "multiverse"}}"""
EVENT = '{"type": "branch.ended", "branch": "0.1", "finish_reason": "stop", "detail": null}'
ANSWER = '{"id": "a", "model": "m", "status": "partial", "failure": null, "text": "", "branches": [], "usage": {}}'
CONFIG = ServerConfig(profile=json.loads(PROFILE), trace="t.jsonl").to_json()
CLAIMS = '{"taper_group": "g", "taper_tpot_slo_ms": 60, "taper_ttft_slo_ms": 9000, "taper_priority": -1, "mine": 3}'
ENGINE = ToyEngine(reply=lambda prompt: "")


def decision() -> str:
    view = random_view(np.random.default_rng(1), rows=9, requests=4)
    law = LinearLatency(base_s=0.01, row_s=1e-3, context_s=1e-6, prefill_s=1e-4, capture_sizes=(1, 2, 4))
    guidance = Guidance(margin=0.02, mean_output_tokens=50.0)
    step = Decision(
        step=7,
        policy="taper",
        view=view,
        latency=law,
        knobs=Knobs(),
        guidance=guidance,
        plan=Taper()(view, law, Knobs(), guidance),
        requests=np.arange(4),
        branches=np.arange(9),
    )
    return dump(step).decode()


# --- the readers; each gets one input, as text, and a folder to put it into ---


def written(text: str, folder: Path, name: str = "input") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))  # what is no UTF-8 must be refused too
    return path


def replay_trace(text: str, folder: Path) -> None:
    Replay(rows=tuple(read_trace(written(text, folder))))


def use_scenario(text: str, folder: Path) -> None:
    scenario.settle(scenario.parse("x", text), MACHINE)


def use_machine(text: str, folder: Path) -> None:
    machine = hardware.parse("x", text)
    machine.predictor()
    scenario.settle(scenario.load("headline"), machine)


def decide_again(text: str, folder: Path) -> None:
    replay(read_decisions(written(text + "\n", folder)), None, resolve_policy)


def resume_bench(text: str, folder: Path) -> None:
    out = folder / "bench"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    written(text, out, "meta.json")
    written(text, out, "requests.jsonl")
    with Store(out, settings={"seed": 1}, about={}):
        pass


def read_stream(text: str, folder: Path) -> None:
    text = text.replace("\n", " ")
    reader = StreamReader(keep=True)
    for number, part in enumerate(("data: " + text, "\r\n", "data:" + text + "\n")):
        reader.feed(part.encode("utf-8", "surrogatepass"), float(number))
    request_file().dump(replace(REQUEST, choices=reader.choices()))


def run_program(text: str, folder: Path) -> None:
    explicit_program(ProgramRequest.model_validate_json(text), ENGINE, ServerConfig(), None)


def run_chat(text: str, folder: Path) -> None:
    chat_program(ChatRequest.model_validate_json(text), ENGINE, ServerConfig(), None)


def serve(text: str, folder: Path) -> None:
    """What `taper serve` makes of its command line, words separated by spaces."""
    words = text.split(" ")
    _, rest = _model_and_flags(words)
    command.check_args(rest, stock=False)
    command.address(rest, None)
    for word in words:
        _config(word, None, None, [], allow_control=False)


def set_knobs(text: str, folder: Path) -> None:
    _config(None, None, None, text.split(" "), allow_control=False)


def simulate(text: str, folder: Path) -> None:
    names = ("scenarios", "hardware", "policies", "loads", "shares", "replicas", "routers")
    cases_of(Options(**dict(zip(names, text.split(" "), strict=False)), seeds=1))


def refuse_claims(text: str, folder: Path) -> None:
    """A request with these claims at the door of the server: it passes, or it is answered 400."""
    middleware = pytest.importorskip("taper.engines.vllm.middleware")
    body = f'{{"vllm_xargs": {text}}}'.encode("utf-8", "surrogatepass")
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "client": ("h", 1)}
    answers: list[int] = []

    async def passed(scope: Any, receive: Any, send: Any) -> None:
        answers.append(200)

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        answers.extend([message["status"]] if "status" in message else [])

    asyncio.run(middleware.ClaimsMiddleware(passed)(scope, receive, send))
    assert answers in ([200], [400])
    if answers == [400]:
        raise ConfigError("refused")


@dataclass(frozen=True)
class Reader:
    read: Callable[[str, Path], object]
    errors: tuple[type[Exception], ...]
    inputs: st.SearchStrategy[str]


READERS = {
    "config": Reader(lambda text, _: ServerConfig.from_json(text, where="x"), (ConfigError,), json_texts(CONFIG)),
    "profile": Reader(lambda text, to: load_profile(written(text, to)), (ConfigError,), json_texts(PROFILE)),
    "calibrated machine": Reader(
        lambda text, to: hardware.calibrated(written(text, to)), (ConfigError,), json_texts(PROFILE)
    ),
    "claims": Reader(
        lambda text, _: parse_claims(json.loads(text), ClaimLimits(), Slo()),
        (ConfigError,),
        trees((CLAIMS,)).filter(lambda tree: isinstance(tree, dict)).map(json.dumps),
    ),
    "claims over HTTP": Reader(refuse_claims, (ConfigError,), json_texts(CLAIMS)),
    "knobs": Reader(set_knobs, (ConfigError,), texts("margin=0.1 rho=0.5", "horizon_steps=16")),
    "serve": Reader(
        serve,
        (ConfigError,),
        texts("off", "eager", "cap:3", "cap:33 taper", "--port 80", "--port=8 --host ::", "--taper"),
    ),
    "simulate": Reader(
        simulate, (ConfigError,), texts("headline a100x8 off,cap:2 1,2 0.5 1,2 round-robin", "contended cpu off")
    ),
    "program": Reader(run_program, (ConfigError, ValidationError), json_texts(FORK)),
    "chat": Reader(run_chat, (ConfigError, ValidationError), json_texts(CHAT, PLAIN)),
    "client event": Reader(lambda text, _: EVENTS.validate_json(text), (ValidationError,), json_texts(EVENT)),
    "client answer": Reader(lambda text, _: Program.model_validate_json(text), (ValidationError,), json_texts(ANSWER)),
    "request record": Reader(
        lambda text, to: list(request_file().read(written(text + "\n", to))),
        (RecordError,),
        json_texts(request_file().dump(REQUEST)),
    ),
    "step record": Reader(
        lambda text, to: list(step_file().read(written(text + "\n", to))),
        (RecordError,),
        json_texts(step_file().dump(STEP)),
    ),
    "results": Reader(
        lambda text, to: read_runs(written(text, to)), (ResultsError,), json_texts(json.dumps(document([RUN, RUN])))
    ),
    "decision trace": Reader(decide_again, (ConfigError,), json_texts(decision())),
    "workload trace": Reader(replay_trace, (ConfigError,), texts(AZURE, BURSTGPT, MOONCAKE)),
    "machine": Reader(use_machine, (ConfigError,), toml_texts(*MACHINES)),
    "scenario": Reader(use_scenario, (ConfigError,), toml_texts(*SCENARIOS)),
    "mix": Reader(
        lambda text, _: parse_mix(parse_table(text, "x"), "x").request(seed=1, index=1),
        (ConfigError,),
        toml_texts(MIX),
    ),
    "bench folder": Reader(
        resume_bench, (ConfigError,), json_texts('{"schema": "taper.bench/1", "settings": {"seed": 1}, "window": "w"}')
    ),
    "event stream": Reader(read_stream, (), json_texts(CHUNK)),
}


@pytest.mark.parametrize("name", READERS)
def test_it_is_understood_or_refused(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    seen: Counter[str] = Counter()

    @examples(60)
    @given(reader.inputs)
    def check(text: str) -> None:
        try:
            reader.read(text, tmp_path)
        except reader.errors as error:
            str(error).encode("utf-8")
            seen["refused"] += 1
        else:
            seen["understood"] += 1

    check()
    assert seen["understood"]
    assert seen["refused"] or not reader.errors


tags = st.lists(st.sampled_from(corpora.TAGS + FRAGMENTS) | st.text(max_size=6), max_size=40)


@pytest.mark.parametrize("grammar", corpora.GRAMMARS)
@pytest.mark.parametrize("is_root", [True, False], ids=["root", "branch"])
def test_a_protocol_reads_any_text_in_any_pieces(grammar: str, is_root: bool) -> None:
    front = BUILT_IN[grammar]({})
    found = 0

    def events(parts: list[str]) -> tuple[list[Fork | End], int]:
        parser = front.parser(front.opening(({"role": "user", "content": "Why?"},)), is_root=is_root)
        read = [event for part in parts for event in parser.feed(part)] + parser.close() + parser.close()
        return read, parser.malformed

    def answer(rng: random.Random) -> list[str]:
        return list(corpora.pieces(rng, corpora.mutate(rng, corpora.GRAMMARS[grammar](rng))))

    @examples(40)
    @given(tags | st.builds(answer, st.randoms()))
    def check(parts: list[str]) -> None:
        nonlocal found
        read = events(parts)
        assert read == events(["".join(parts)])
        assert all(0 <= event.at <= len("".join(parts)) for event in read[0])
        found += len(read[0])

    check()
    assert found or (grammar == "skeleton-of-thought" and not is_root)


@examples(80)
@given(st.sampled_from([*BUILT_IN, "off", "", "none"]), trees((json.dumps(json.loads(CHAT)["taper"]["options"]), "{}")))
def test_options_of_a_protocol_are_taken_or_refused(name: str, options: Any) -> None:
    if isinstance(options, dict):
        try:
            resolve_protocol(name, options, BUILT_IN)
        except ConfigError as error:
            str(error).encode("utf-8")

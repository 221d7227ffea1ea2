"""What goes wrong around and inside a running `taper serve`, and what its users see of it: docs/faults.md.

Two servers: one lives through everything that TAPER must bear and then gets its SIGTERM; the other's engine is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from taper.engines.vllm.calibrate import engine_key
from taper.engines.vllm.launch import free_port
from taper.profile import Profile, save_profile
from tests.waiting import eventually

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
SLO_MS = 200  # with it some of eight branches are admitted, and whether they are can be seen
READY_S, GRACE_S = 900.0, 180.0
STANDSTILL_S = 3.0
USAGE_STATUS, KILLED_STATUS = 2, 137
POLICIES = ("Raising", "Planning", "Predicting", "Jumping")
LAW = {"base_s": 0.015, "row_s": 5e-4, "context_s": 2e-6, "prefill_s": 4e-4}


class Serving:
    """`taper serve` as a user starts it, with the plug-in policies of `tests.engine.hostile` installed."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "serve.log"
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        slo = ("--taper-tpot-slo-ms", str(SLO_MS))
        argv = [sys.executable, "-m", "taper.cli", "serve", "--port", str(port), "--taper-allow-control", *slo, *flags]
        path = os.pathsep.join([str(installed(folder)), str(ROOT), os.environ.get("PYTHONPATH", "")])
        # One thread: nothing here is about speed, and on a busy machine two wait for each other at every step.
        env = {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=log, stderr=log, process_group=0)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while "TAPER is on" not in self.output():
            assert self.process.poll() is None, self.output()[-3000:]
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.2)
        self.key = engine_key({"engines": [self.state()]})

    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def engine_core(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        (core,) = [one for one in children if "EngineCore" in " ".join(one.cmdline())]
        return core

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def async_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as http:
            return http.get(path)

    def state(self) -> dict[str, Any]:
        (state,) = self.get("/taper/state").raise_for_status().json()["engines"]
        return state

    def control(self, patch: dict[str, Any]) -> httpx.Response:
        with self.client() as http:
            return http.post("/v1/taper/control", json=patch)

    def metric(self, name: str) -> float:
        """Waits for a server that cannot say yet: its first answer may be late."""

        def values() -> list[float]:
            families = text_string_to_metric_families(self.get("/metrics").raise_for_status().text)
            return [sample.value for family in families for sample in family.samples if sample.name == name]

        (value,) = eventually(values, bool)
        return value

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                for one in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                    one.kill()
        return self.process.wait()


def installed(folder: Path) -> Path:
    """A folder of packages with one in it that registers our policies."""
    info = folder / "packages" / "hostile-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1\n")
    points = "\n".join(f"{name.lower()} = tests.engine.hostile:{name}" for name in POLICIES)
    (info / "entry_points.txt").write_text(f"[taper.policies]\n{points}\n")
    return info.parent


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Its trace goes to a disk that is full from the first byte on."""
    running = Serving(tmp_path_factory.mktemp("bearing"), "--taper-profile", "skip", "--taper-trace", "/dev/full")
    try:
        running.wait_ready()
        assert running.control({"profile": Profile(key=running.key, coefficients=LAW).to_json()}).is_success
        yield running
    finally:
        running.stop()


def completion(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 16, **fields}


def model_of(serving: Serving) -> str:
    return str(serving.get("/v1/models").json()["data"][0]["id"])


async def posts(serving: Serving, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    async with serving.async_client() as http:
        return await gathered(http, bodies)


async def gathered(http: httpx.AsyncClient, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    return await asyncio.gather(*[http.post("/v1/completions", json=body) for body in bodies])


def mixed_load(serving: Serving) -> list[int]:
    """Tokens that two branching requests and a serial one were answered with, all at once."""
    model = model_of(serving)
    bodies = [completion(model, n=4), completion(model, n=4), completion(model)]
    answers = asyncio.run(posts(serving, bodies))
    return [answer.raise_for_status().json()["usage"]["completion_tokens"] for answer in answers]


WHOLE = [64, 64, 16]


@pytest.mark.parametrize(
    ("policy", "is_fault"), [("raising", True), ("planning", True), ("predicting", True), ("jumping", False)]
)
def test_a_faulty_policy_costs_no_request_and_no_token(serving, policy, is_fault):
    """Random exceptions, plans nobody can carry out, predictions of NaN, zero and infinity, a clock that jumps."""
    before = serving.state()["totals"]["fallbacks"]
    assert serving.control({"policy": policy}).is_success
    assert mixed_load(serving) == WHOLE
    faults = serving.state()["totals"]["fallbacks"] - before
    assert (faults > 0) == is_fault
    eventually(lambda: serving.metric("taper:fallbacks_total"), lambda found: found == before + faults)
    assert serving.control({"policy": "taper"}).is_success
    assert mixed_load(serving) == WHOLE
    empty = {"groups": 0, "branches": 0, "pending_steps": 0}
    after = eventually(serving.state, lambda state: state["tables"] == empty)
    assert after["totals"]["fallbacks"] == before + faults
    assert serving.output().count("TAPER fault, later ones only count") <= 1


def test_a_full_disk_ends_the_trace_and_nothing_else(serving):
    assert mixed_load(serving) == WHOLE
    ends = "TAPER's trace ends here: /dev/full: [Errno 28] No space left on device"
    eventually(serving.output, lambda output: ends in output)
    before = serving.metric("taper:trace_dropped_total")
    assert mixed_load(serving) == WHOLE
    eventually(lambda: serving.metric("taper:trace_dropped_total"), lambda found: found > before)
    assert serving.output().count("TAPER's trace ends here") == 1


def test_an_engine_that_stood_still_goes_on_where_it_was(serving):
    """What a suspended machine or a debugger does: to the scheduler its clock jumps. Readers get what was known."""
    core, model = serving.engine_core(), model_of(serving)

    async def stand_still() -> list[httpx.Response]:
        async with serving.async_client() as http:
            bodies = [completion(model, n=4, max_tokens=200), completion(model)]
            running, seen = asyncio.create_task(gathered(http, bodies)), []
            while not any(seen):
                assert not running.done(), f"branches, as seen meanwhile: {seen}"
                (engine,) = (await http.get("/taper/state")).json()["engines"]
                seen.append(engine["tables"]["branches"])
            core.suspend()
            try:
                for path in ("/health", "/v1/models", "/metrics", "/taper"):
                    assert (await http.get(path)).is_success
                await asyncio.sleep(STANDSTILL_S)
                assert await asyncio.to_thread(serving.metric, "taper:snapshot_age_seconds") > STANDSTILL_S
            finally:
                core.resume()
            return await running

    before = serving.state()["totals"]["fallbacks"]
    answers = [answer.raise_for_status().json() for answer in asyncio.run(stand_still())]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [4 * 200, 16]
    assert serving.control({}).status_code == httpx.codes.OK  # a new window

    def loaded() -> dict[str, Any]:
        assert mixed_load(serving) == WHOLE
        return serving.state()

    # Nobody is kept at width 1 from then on.
    after = eventually(loaded, lambda state: state["window"]["extra_row_steps"] > 0)
    assert after["totals"]["fallbacks"] == before


def test_scrapers_that_never_read_hold_up_nobody(serving):
    """They ask for more than any buffer holds, or stop in mid-request."""
    asked = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        for number in range(24):
            path = (b"/metrics", b"/taper/live", b"/taper/state")[number % 3]
            blocked = stack.enter_context(socket.socket())
            blocked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            blocked.connect(("127.0.0.1", int(serving.url.rpartition(":")[2])))
            blocked.setblocking(False)
            blocked.send((asked % path) * 100 if number < 18 else (asked % path)[:-10])
        for _ in range(2):
            assert mixed_load(serving) == WHOLE
            eventually(lambda: serving.metric("taper:num_groups"), lambda found: found == 0)
    assert serving.get("/health").is_success


def refused_start(profile: Path) -> str:
    """What `taper serve` says where it does not even start an engine."""
    argv = [sys.executable, "-m", "taper.cli", "serve", "--port", str(free_port()), "--taper-profile", str(profile)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == USAGE_STATUS
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_law_that_no_engine_has_is_refused_by_a_running_one(serving):
    before = serving.state()["correction"]
    for name, value in (("row_s", 1e300), ("base_s", 0), ("context_s", -1)):
        profile = Profile(key=serving.key, coefficients={**LAW, name: value})
        answer = serving.control({"profile": profile.to_json()})
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert f"{name} must be between" in answer.json()["error"]["message"]
    assert serving.state()["correction"] == before  # of the law in force
    assert mixed_load(serving) == WHOLE


STREAMS = ("/v1/taper/programs", "/v1/completions")
PROGRAM = {"prompt": "Once upon a time", "branches": [{"max_tokens": 600, "ignore_eos": True}] * 3}


class Reading:
    """One streamed answer, read to whatever end it comes to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def read(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        with suppress(httpx.RemoteProtocolError):
            async with http.stream("POST", path, json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line:
                        self.lines.append(line)

    def ended_with(self, error: str) -> bool:
        """Whether it said what went wrong, and that this was its end."""
        return self.lines[-1] == "data: [DONE]" and error in "".join(self.lines[-3:])

    @property
    def was_cut(self) -> bool:
        """The connection went, with nobody left to say why."""
        return self.lines[-1] != "data: [DONE]"

    def __repr__(self) -> str:
        return f"{len(self.lines)} lines, the last {self.lines[-3:]}"


async def cut_short(serving: Serving, cut: Callable[[], None]) -> list[Reading]:
    """A streamed program and a streamed completion, both in the middle of their answers when `cut` is called.

    One loop asks for both before it reads either.
    """
    bodies = zip(STREAMS, (PROGRAM, completion(model_of(serving), n=2, max_tokens=600)), strict=True)
    async with serving.async_client() as http:
        readings = [Reading() for _ in STREAMS]
        ends = [asyncio.create_task(one.read(http, *body)) for one, body in zip(readings, bodies, strict=True)]
        while not all(one.lines for one in readings):
            assert not any(end.done() for end in ends), (readings, ends, serving.output()[-3000:])
            await asyncio.sleep(0.05)
        cut()
        await asyncio.gather(*ends)
    return readings


def test_sigterm_in_the_middle_of_a_program(serving):
    """Last of this server: it stops within its grace, and who waits for an answer is told.

    Unless vLLM forgets them: of its two cancellations, the one that tells the streams can come second. It then waits
    for them for ever, and the supervisor ends that.
    """
    program, plain = asyncio.run(cut_short(serving, serving.process.terminate))
    status = serving.process.wait(GRACE_S)
    if "Waiting for connections to close" in serving.output() and status == KILLED_STATUS:
        assert "the vLLM server did not stop within 30 s and is killed" in serving.output()
        assert program.was_cut
        assert plain.was_cut
    else:
        assert status == 0
        assert program.ended_with("EngineDeadError")
        assert plain.ended_with("InternalServerError")
    with pytest.raises(httpx.ConnectError):
        serving.get("/health")


@pytest.fixture(scope="module")
def doomed(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """Another server, with the profile file that it was started with; the first must have made room by then."""
    folder = tmp_path_factory.mktemp("doomed")
    profile = save_profile(Profile(key=serving.key, coefficients=LAW), folder / "profile.json")
    serving.stop()
    running = Serving(folder, "--taper-profile", str(profile))
    try:
        running.wait_ready()
        yield running, profile
    finally:
        running.stop()


def test_a_profile_that_goes_bad_on_disk_is_nothing_to_a_running_server(doomed):
    """It was read once, whole; a start with what is there now is refused without an engine."""
    serving, path = doomed
    assert serving.state()["profile"] == str(serving.key)
    whole = path.read_text("utf-8")
    foreign = json.loads(whole)
    foreign["key"]["model"] = "somebody/else"
    for content, words in (
        (whole[: len(whole) // 2], "run taper calibrate to write it anew"),
        (json.dumps(foreign), "belongs to somebody/else"),
        (whole.replace("0.0005", "1e300"), "row_s must be between 0 and 3600"),
        ("", "truncated"),
    ):
        path.write_text(content)
        assert words in refused_start(path)
    assert mixed_load(serving) == WHOLE
    state = serving.state()
    assert (state["profile"], state["learning"], state["totals"]["fallbacks"]) == (str(serving.key), False, 0)


def test_a_killed_engine_ends_the_server_as_stock_vllm_and_with_a_status_that_says_so(doomed):
    """What was in flight gets an error; nothing hangs; and the exit status makes a supervisor start another."""
    serving, _ = doomed
    assert mixed_load(serving) == WHOLE
    program, plain = asyncio.run(cut_short(serving, serving.engine_core().kill))
    assert program.ended_with("EngineDeadError")
    assert plain.ended_with("InternalServerError")
    assert serving.process.wait(GRACE_S) == 1
    assert "the vLLM server ended by itself, with status 0" in serving.output()
    with pytest.raises(httpx.ConnectError):
        serving.get("/health")

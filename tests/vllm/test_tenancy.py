"""An attacker beside honest clients, through the middleware and vLLM's own scheduler, in simulated time.

The victims are the same requests at the same times, with and without the attacker. For a crowd and for forged ids
"without" means that nobody is there instead, which is the hardest comparison there is; for claims it means the same
requests without the claims. Every attack is also run with its defence off, and has to succeed there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from taper.claims import ClaimLimits
from taper.core.policies import Taper
from taper.core.types import Slo
from taper.engines.vllm.middleware import ClaimsMiddleware
from tests.vllm.harness import PROFILE, Driver, fork, make, request, server_config

CROWD = 10_000
POINTS = 2.0
SLO = Slo(tpot_s=0.05, ttft_s=5.0)
LAW = PROFILE["coefficients"]
GUARDED = ClaimLimits(max_branches=CROWD)  # the scheduler alone has to bear a crowd that the default would refuse
OPEN = ClaimLimits(tightest_slo=1e-6, max_priority=1000, max_branches=CROWD)


@dataclass
class Machine(Driver):
    """A step takes the law's time for what it carries."""

    def update(self) -> None:
        carried = self.in_flight[0].num_scheduled_tokens.values()
        prompt = sum(tokens for tokens in carried if tokens > 1)
        rows = sum(tokens == 1 for tokens in carried)
        self.step_s = LAW["base_s"] + LAW["row_s"] * rows + LAW["prefill_s"] * prompt
        super().update()


class Server:
    """The API server: bodies go through the middleware and become requests, named as vLLM names them."""

    def __init__(self, machine: Machine, *, is_sealing: bool) -> None:
        self.machine = machine
        self.answers: list[int] = []
        self._count = itertools.count(1)
        self._door = ClaimsMiddleware(self._admit) if is_sealing else self._admit
        self._state = SimpleNamespace(args=SimpleNamespace(api_key=["alice", "mallory"]))

    def post(self, key: str, body: dict[str, Any], *, name: str = "cmpl") -> list[str]:
        """Names of the request's branches; none if it was refused. `name` is what the client asks it to be called."""
        made: list[str] = []
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": headers, "client": ("h", 1)}
        scope |= {"app": SimpleNamespace(state=self._state), "name": f"{name}-{next(self._count):08x}", "made": made}

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message):
            if "status" in message:
                self.answers.append(message["status"])

        asyncio.run(self._door(scope, receive, send))
        return made

    async def _admit(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        arrival = self.machine.now_s + 1e-6 * next(self._count)
        what = {"tokens": body["max_tokens"], "xargs": body.get("vllm_xargs"), "arrival": arrival}
        n = body.get("n", 1)
        made = fork(scope["name"], n, **what) if n > 1 else [request(scope["name"], **what)]
        self.machine.add(*made)
        scope["made"].extend(one.request_id for one in made)


@dataclass
class Victim:
    """One honest request; its branches may come one by one, under a tag."""

    bodies: list[dict[str, Any]]
    sent_s: float
    names: list[str] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0

    def look(self, machine: Machine) -> None:
        tokens = sum(machine.tokens.get(name, 0) for name in self.names)
        if tokens > self.tokens:
            self.first_s, self.last_s = self.first_s or machine.now_s, machine.now_s
        self.tokens = tokens

    def is_over(self, machine: Machine) -> bool:
        return bool(self.names) and machine.finished.issuperset(self.names)

    def met(self, machine: Machine) -> bool:
        in_time = self.first_s - self.sent_s <= SLO.ttft_s
        return in_time and self.is_over(machine) and self.last_s - self.first_s <= SLO.tpot_s * (self.tokens - 1)


class Believing(Taper):
    """Takes a loosened SLO for the request's own need, as it would where nobody has a reason to lie."""

    def __call__(self, view, predict, knobs, guidance):
        return super().__call__(view, predict, knobs, replace(guidance, promise_s=math.inf))


@dataclass(frozen=True, kw_only=True)
class Play:
    """One attack: the victims, what the attacker does at every turn, and what holds where its defence is off."""

    victims: list[list[dict[str, Any]]]
    gap_s: float
    attack: Callable[[Server, int], None]
    honest: Callable[[Server, int], None] | None = None  # the same work without the attack; None: nothing at all
    is_sealing: bool = True  # with the defence off
    settings: dict[str, Any] = field(default_factory=dict)


def tagged(index: int, width: int) -> list[dict[str, Any]]:
    return [{"max_tokens": 40, "vllm_xargs": {"taper_group": f"job-{index}"}}] * width


def serial() -> list[dict[str, Any]]:
    return [{"max_tokens": 40}]


def once(*bodies: dict[str, Any]) -> Callable[[Server, int], None]:
    """Send these at the first turn; what is refused is sent again without its claims."""

    def attack(server: Server, turn: int) -> None:
        for body in () if turn else bodies:
            if not server.post("mallory", body):
                server.post("mallory", {name: value for name, value in body.items() if name != "vllm_xargs"})

    return attack


def forging(server: Server, turn: int) -> None:
    """Branches that say they belong to the victims' groups: by name, and by the ids that the server itself uses."""
    if turn:
        return
    table = server.machine.taper.table
    sealed = [str(group.key[1]) for group in table.groups.values() if group.key[0] == "tag"]
    assert sealed
    for name in ("job-2", "job-5", "job-8", "job-11", *sealed[:2]):
        body = {"n": CROWD // 5, "max_tokens": 400, "vllm_xargs": {"taper_group": name}}
        server.post("mallory", body)
    for name in list(table.branches)[:2]:
        server.post("mallory", {"n": 4, "max_tokens": 400}, name=name)
        server.post("mallory", {"max_tokens": 400}, name=f"7_{name.rpartition('-')[0]}")


def claim(body: dict[str, Any], **claims: Any) -> dict[str, Any]:
    return {**body, "vllm_xargs": claims}


MIXED = [serial() if index % 3 < 2 else tagged(index, 6) for index in range(24)]
WIDE = {"n": 70, "max_tokens": 400}
PLAYS = {
    # Defence: regulation itself, and that extra branches of one request wait outside vLLM's queue.
    "10,000 tagged branches": Play(
        victims=MIXED,
        gap_s=0.4,
        attack=once(*[claim({"n": CROWD // 10, "max_tokens": 400}, taper_group="mine")] * 10),
        settings={"policy": "eager"},
    ),
    # Defence: tags are sealed with the tenant's key.
    "forged ids": Play(victims=MIXED, gap_s=0.4, attack=forging, is_sealing=False),
    # Defence: a loosened SLO binds nobody where the server's own is lost. All victims need extras, since the baseline
    # breaks the SLO; a request whose looser one can just be kept would hold every step at it.
    "extreme SLOs": Play(
        victims=[[{"n": 4, "max_tokens": 40}]] * 48,
        gap_s=0.02,
        attack=once(
            *(claim({"max_tokens": 300}, taper_tpot_slo_ms=slo_ms) for slo_ms in (0.1, 1, 65, 80, 5000)),
            *(claim({"max_tokens": 300}, taper_ttft_slo_ms=slo_ms) for slo_ms in (0.1, 5e5)),
        ),
        honest=once(*[{"max_tokens": 300}] * 7),
        settings={"is_believing": True},
    ),
    # Defence: a priority above the ordinary is refused. All victims need extras, since the baseline breaks the SLO.
    "priority inflation": Play(
        victims=[[{"n": 4, "max_tokens": 40}]] * 38,
        gap_s=0.05,
        attack=once(claim(WIDE, taper_priority=1000)),
        honest=once(WIDE),
        settings={"limits": OPEN},
    ),
}


@pytest.fixture
def attainment(monkeypatch, tmp_path):
    """Percent of the victims that meet their SLO, on a server with these settings."""

    def run(play, acts, *, is_sealing=True, is_believing=False, **settings):
        config = server_config(slo=SLO, **{"limits": GUARDED, **settings})
        driver = make(monkeypatch, tmp_path, is_async=False, config=config, rows=256, blocks=4096)
        machine = Machine(driver.scheduler, is_async=False, now_s=0.0)
        if is_believing:
            machine.taper.controller.replace(policy=Believing())
        server = Server(machine, is_sealing=is_sealing)
        victims = [Victim(bodies=bodies, sent_s=play.gap_s * index) for index, bodies in enumerate(play.victims)]
        turns = itertools.count()
        while machine.now_s < 40.0 and not all(victim.is_over(machine) for victim in victims):
            for victim in victims:
                if not victim.names and victim.sent_s <= machine.now_s:
                    victim.names = [name for body in victim.bodies for name in server.post("alice", body)]
            if acts is not None and machine.now_s >= 1.0:
                acts(server, next(turns))
            if machine.scheduler.has_requests():
                machine.step()
            else:
                machine.now_s += 0.01
            for victim in victims:
                victim.look(machine)
        assert not machine.taper.fallbacks
        return 100.0 * sum(victim.met(machine) for victim in victims) / len(victims)

    return run


@pytest.mark.parametrize("name", PLAYS)
def test_an_attacker_takes_nothing_from_others(attainment, name):
    play = PLAYS[name]
    without = attainment(play, play.honest)
    assert without >= 95.0
    assert attainment(play, play.attack) >= without - POINTS


@pytest.mark.parametrize("name", PLAYS)
def test_the_attack_succeeds_where_its_defence_is_off(attainment, name):
    play = PLAYS[name]
    off = {"is_sealing": play.is_sealing, **play.settings}
    assert attainment(play, play.attack, **off) < attainment(play, play.honest) - 5 * POINTS

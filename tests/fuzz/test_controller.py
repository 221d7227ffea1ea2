"""The controller under anything an engine may show it: P1, P2 and P8 of docs/controller.md after every decision.

Requests live, fork, decode and end in a small model; the clock jumps both ways, steps hang, outcomes lie, and policy,
knobs and law change on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from taper.core.controller import MARGIN_MAX, Controller
from taper.core.latency import LinearLatency
from taper.core.policies import resolve
from taper.core.types import Ending, FinishedRequest, Knobs, Plan, StepLoad, StepOutcome, StepView
from tests.core.test_properties import batches, held_pay_prefill
from tests.core.views import Req, make_view
from tests.fuzz.explore import Tally, explore

policies = st.sampled_from(["taper", "taper-paper", "off", "cap:2", "cap:7", "eager"]).map(resolve)
laws = st.builds(
    LinearLatency,
    base_s=st.floats(1e-6, 10.0),
    row_s=st.floats(0, 0.1),
    context_s=st.floats(0, 1e-3),
    prefill_s=st.floats(0, 0.1),
    knee_rows=st.floats(0, 64),
    steep_s=st.sampled_from([0.0, 1e-3]),
    capture_sizes=st.sampled_from([(), (1, 2, 4, 8), (8, 16)]),
)
knobs = st.builds(
    Knobs, **{spec.name: st.floats(spec.metadata["low"], spec.metadata["high"]) for spec in fields(Knobs)}
)
hostile_s = st.one_of(st.sampled_from([0.0, -1.0, 5e-324, 1e300, math.inf, -math.inf]), st.floats(allow_nan=False))
slos_s = st.sampled_from([1e-4, 0.01, 0.05, 0.5, 60.0])


@dataclass
class Live:
    """One logical request of the model."""

    arrival_s: float
    tpot_slo_s: float
    priority: float
    progress: list[int]  # of each live branch
    limit: int  # output tokens per branch
    prompt: int
    tokens: int = 0
    first_token_s: float = math.nan
    started: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)

    def shown(self) -> Req:
        held = set(range(len(self.progress))) - self.started
        return Req(
            branches=[(self.prompt + done, done) for done in self.progress],
            tokens=self.tokens,
            first_token_s=self.first_token_s,
            arrival_s=self.arrival_s,
            tpot_slo_s=self.tpot_slo_s,
            priority=self.priority,
            prefill=dict.fromkeys(held, self.prompt),
            held=held,
            ran=self.ran,
            pinned=self.pinned,
        )

    def advance(self, run: np.ndarray, now_s: float) -> None:
        """Every row of the step brought a token; branches at their limit are over."""
        self.ran = set(np.flatnonzero(run).tolist())
        self.started |= self.ran
        self.tokens += len(self.ran)
        self.progress = [done + (index in self.ran) for index, done in enumerate(self.progress)]
        if self.ran and math.isnan(self.first_token_s):
            self.first_token_s = now_s
        kept = [index for index, done in enumerate(self.progress) if done < self.limit]
        self.progress = [self.progress[index] for index in kept]
        for name in ("started", "ran", "pinned"):
            setattr(self, name, {at for at, index in enumerate(kept) if index in getattr(self, name)})


class ControllerMachine(RuleBasedStateMachine):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally
        self.now_s = 0.0
        self.live: list[Live] = []

    @initialize(law=laws, policy=policies, knobs=knobs, learn=st.booleans(), now_s=st.floats(-1e6, 1e9))
    def start(self, law: LinearLatency, policy, knobs: Knobs, learn: bool, now_s: float) -> None:
        self.controller = Controller(latency=law, policy=policy, knobs=knobs, learn=learn)
        self.now_s = now_s

    @precondition(lambda self: len(self.live) < 12)
    @rule(
        branches=st.sampled_from([1, 1, 2, 5, 16]),
        limit=st.integers(1, 60),
        prompt=st.integers(1, 4000),
        slo_s=slos_s,
        priority=st.sampled_from([0.0, 0.0, -3.0, 5.0]),
        pinned=st.sets(st.integers(0, 15), max_size=1),
    )
    def arrive(self, branches: int, limit: int, prompt: int, slo_s: float, priority: float, pinned: set[int]) -> None:
        self.live.append(
            Live(self.now_s, slo_s, priority, [0] * branches, limit, prompt, pinned={i for i in pinned if i < branches})
        )

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 11), branches=st.integers(1, 8))
    def fork(self, which: int, branches: int) -> None:
        self.live[which % len(self.live)].progress += [0] * branches
        self.tally.counts["forks"] += 1

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 11))
    def abort(self, which: int) -> None:
        self.live.pop(which % len(self.live))
        self.tally.counts["aborts"] += 1

    @rule(seconds=st.one_of(st.sampled_from([-3600.0, -0.06, 0.0, 0.06, 60.0, 1e6]), st.floats(-1e9, 1e9)))
    def jump(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.live)
    @rule(
        steps=st.integers(1, 40),
        slowness=st.floats(0.2, 8.0),
        ending=st.sampled_from([Ending.CLEAN, Ending.CLEAN, Ending.IGNORED, Ending.OVERRUN]),
        kv_free_tokens=st.sampled_from([0, 100, 10**6]),
    )
    def run(self, steps: int, slowness: float, ending: Ending, kv_free_tokens: int) -> None:
        for _ in range(steps):
            if not self.live:
                return
            view = make_view(*(one.shown() for one in self.live), now_s=self.now_s, kv_free_tokens=kv_free_tokens)
            plan = self.decided(view)
            measured_s = plan.predicted_s * slowness
            self.now_s += measured_s
            served = len(self.live)
            finished = self.advance(view, plan)
            self.controller.observe(
                StepOutcome(load=plan.load, requests=served, measured_s=measured_s, ending=ending, finished=finished)
            )
            self.sound()

    def advance(self, view: StepView, plan: Plan) -> tuple[FinishedRequest, ...]:
        for index, one in enumerate(self.live):
            one.advance(plan.run[view.request == index], self.now_s)
        over = [one for one in self.live if not one.progress]
        self.live = [one for one in self.live if one.progress]
        return tuple(
            FinishedRequest(
                tokens=one.tokens,
                serial_tokens=0,
                critical_path_tokens=min(one.limit, one.tokens),
                residence_s=self.now_s - one.first_token_s,
                externality_s=0.0,
                tpot_slo_s=one.tpot_slo_s,
            )
            for one in over
        )

    @rule(batch=batches, kv_free_tokens=st.integers(-50, 50))
    def decide_on_anything(self, batch: list[Req], kv_free_tokens: int) -> None:
        self.decided(make_view(*held_pay_prefill(batch), now_s=self.now_s, kv_free_tokens=kv_free_tokens))

    def decided(self, view: StepView) -> Plan:
        policy = self.controller.in_force
        plan, again = self.controller.decide(view), self.controller.decide(view)
        self.tally.counts["steps"] += 1
        self.tally.counts["deferrals"] += int(np.count_nonzero(~plan.run))
        assert np.array_equal(plan.run, again.run)
        widths = np.bincount(view.request[plan.run], minlength=len(view.tokens))
        assert (widths >= 1).all()  # P1
        assert plan.run[view.pinned].all()
        assert plan.run[plan.protected].all()
        assert not any(map(math.isnan, (plan.baseline_s, plan.predicted_s, plan.budget_s, plan.slack_min_s)))
        assert plan.prefill_limit_tokens is None or plan.prefill_limit_tokens >= 0
        if policy.name in ("taper", "taper-paper"):  # P2
            assert plan.predicted_s <= plan.budget_s * (1 + 1e-9) or np.array_equal(plan.run, plan.protected)
        if len(view.request) == len(view.tokens):  # P8
            assert plan.run.all()
            assert plan.externality_s == 0.0
            assert plan.prefill_limit_tokens is None
        return plan

    @rule(
        rows=st.sampled_from([0, 1, 7, 4096]),
        context_tokens=st.sampled_from([0, 1, 10**7]),
        prefill_tokens=st.sampled_from([0, 1, 10**5]),
        requests=st.integers(0, 300),
        measured_s=hostile_s,
        ending=st.sampled_from(Ending),
        times=st.integers(1, 60),
    )
    def lie(
        self,
        rows: int,
        context_tokens: int,
        prefill_tokens: int,
        requests: int,
        measured_s: float,
        ending: Ending,
        times: int,
    ) -> None:
        """Steps that took no time, or all of it, over and over."""
        load = StepLoad(rows=rows, context_tokens=context_tokens, prefill_tokens=prefill_tokens)
        for _ in range(times):
            self.controller.observe(StepOutcome(load=load, requests=requests, measured_s=measured_s, ending=ending))
        self.tally.counts["lies"] += times

    @rule(
        tokens=st.integers(0, 5000),
        serial=st.floats(0, 1),
        path=st.floats(0, 1),
        residence_s=hostile_s,
        externality_s=st.floats(0, 1e9),
        slo_s=slos_s,
        times=st.integers(1, 30),
    )
    def finish(
        self,
        tokens: int,
        serial: float,
        path: float,
        residence_s: float,
        externality_s: float,
        slo_s: float,
        times: int,
    ) -> None:
        """Requests that took no time, or came back before they went."""
        serial_tokens = int(tokens * serial)
        over = FinishedRequest(
            tokens=tokens,
            serial_tokens=serial_tokens,
            critical_path_tokens=serial_tokens + math.ceil((tokens - serial_tokens) * path),
            residence_s=residence_s,
            externality_s=externality_s,
            tpot_slo_s=slo_s,
        )
        load = StepLoad(rows=4, context_tokens=400, prefill_tokens=0)
        self.controller.observe(
            StepOutcome(load=load, requests=4, measured_s=0.01, ending=Ending.IGNORED, finished=(over,) * times)
        )

    @rule(policy=policies)
    def change_policy(self, policy) -> None:
        self.controller.replace(policy=policy)

    @rule(knobs=knobs)
    def change_knobs(self, knobs: Knobs) -> None:
        self.controller.replace(knobs=knobs)

    @rule(law=laws)
    def change_law(self, law: LinearLatency) -> None:
        self.controller.replace(latency=replace(law))

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "controller"):
            return
        law, guidance = self.controller.latency, self.controller.guidance
        assert 0.01 <= law.scale <= 100
        assert 0.01 <= law.prefill_scale <= 100
        assert 0 < law.predict(1, 1, 1) < math.inf
        assert 0.0 <= guidance.margin <= MARGIN_MAX
        assert guidance.floor_s >= 0.0
        assert 0.0 <= guidance.mean_output_tokens < math.inf
        assert 0.0 <= guidance.mean_path_tokens < math.inf


def test_controller(tally: Tally) -> None:
    wanted = ("deferrals", "forks", "aborts", "lies")
    explore(ControllerMachine, tally, steps=1000, wanted=wanted, examples=40, rules=40)

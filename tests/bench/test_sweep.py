"""Sweeps: their plan, the rule that rejects windows, and what a killed one leaves for the next."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from taper.bench.client import LoadClient
from taper.bench.control import ControlClient
from taper.bench.driver import WindowPlan
from taper.bench.live import display_for
from taper.bench.measure import Target
from taper.bench.store import Store
from taper.bench.sweep import Point, Sweep, bound_tok_s, regime_at, run_sweep, slots
from taper.core.latency import LinearLatency
from taper.core.types import ConfigError
from taper.records import request_file, step_file
from taper.results import Run, read_runs
from taper.workload import Branching, Lengths, Mix, Synthetic
from tests.bench.server import FakeEngine, serving

LAW = LinearLatency(base_s=0.010, row_s=0.001, context_s=0.0, prefill_s=0.0)
SOURCE = Synthetic(
    mix=Mix(
        prompt=Lengths(low=20, high=20),
        serial=Lengths(low=30, high=30),
        branching=Branching(
            at_arrival=True, equal=True, fanout=Lengths(low=4, high=4), branch=Lengths(low=10, high=10)
        ),
    )
)
PLAN = WindowPlan(ramp_s=0.1, measure_s=0.6, drain_s=300.0)
SWEEP = Sweep(
    source=SOURCE.scaled(0.2),
    points=(Point(share=0.5, rate_rps=20.0, slo_tpot_s=5.0), Point(share=0.0, rate_rps=20.0, slo_tpot_s=5.0)),
    policies=("off", "taper"),
    rounds=2,
    seed=4,
    plan=PLAN,
    concurrency=8,
    foreign_limit=1.0,
)


class OneServer:
    def __init__(self, target: Target) -> None:
        self._target = target

    async def target(self, policy: str) -> Target:
        return self._target


def perform(sweep: Sweep, out: Path, *, engine: FakeEngine | None = None, controlled: bool = True) -> list[Run]:
    async def session(store: Store) -> list[Run]:
        async with (
            serving(engine or FakeEngine()) as url,
            LoadClient(base_url=f"{url}/v1", model="m", dialogue="tokens") as client,
            ControlClient(url=url) as control,
        ):
            target = Target(client=client, control=control if controlled else None)
            with display_for(Console(file=io.StringIO()), windows=8, plan=sweep.plan) as display:
                return await run_sweep(sweep, OneServer(target), store, display)

    with Store(out, settings={"seed": sweep.seed}, about={"command": "test"}, keep_steps=True) as store:
        return asyncio.run(session(store))


def test_every_round_visits_every_point_and_rotates_the_policies() -> None:
    assert [slot.name for slot in slots(SWEEP)] == [
        "share0.5-rate20-slo-ms5000/round0/off",
        "share0.5-rate20-slo-ms5000/round0/taper",
        "share0-rate20-slo-ms5000/round0/off",
        "share0-rate20-slo-ms5000/round0/taper",
        "share0.5-rate20-slo-ms5000/round1/taper",
        "share0.5-rate20-slo-ms5000/round1/off",
        "share0-rate20-slo-ms5000/round1/taper",
        "share0-rate20-slo-ms5000/round1/off",
    ]


def test_relative_loads_and_slos_follow_the_law() -> None:
    sweep = replace(SWEEP, source=SOURCE, law=LAW, concurrency=7, points=(Point(share=0.5, load=0.5, slo_at=0.5),))
    regime = regime_at(sweep, sweep.points[0])
    # off 7 rows, eager 7 * 35/20 = 12.25 rows: steps of 17 and 22.25 ms; half-way 9.625 rows in 19.6 ms
    assert regime.slo.tpot_s == pytest.approx(0.0196, abs=1e-4)
    assert regime.rate_rps == pytest.approx(0.5 * 9.6 / 0.0196 / 35, rel=0.01)
    assert regime.max_concurrency == 7
    assert bound_tok_s(sweep, regime) == pytest.approx(regime.rate_rps * 35)  # all that is offered
    loaded = regime_at(sweep, Point(share=0.5, load=2.0, slo_at=0.5))
    assert bound_tok_s(sweep, loaded) == pytest.approx(9.6 / 0.0196, rel=0.01)  # all that fits the SLO
    given = regime_at(sweep, Point(share=0.5, rate_rps=3.0, slo_tpot_s=0.03))
    assert (given.rate_rps, given.slo.tpot_s) == (3.0, 0.03)


def test_without_a_law_everything_is_absolute() -> None:
    assert regime_at(SWEEP, SWEEP.points[0]).rate_rps == 20.0
    assert bound_tok_s(SWEEP, regime_at(SWEEP, SWEEP.points[0])) is None
    with pytest.raises(ConfigError, match="without a latency profile"):
        regime_at(SWEEP, Point(share=0.5, load=1.0, slo_tpot_s=0.03))


def test_a_sweep_fills_its_folder_and_a_finished_one_runs_nothing(tmp_path: Path) -> None:
    runs = perform(SWEEP, tmp_path / "out")
    assert [run.conditions.window for run in runs] == [f"{slot.name}/try0" for slot in slots(SWEEP)]
    assert all(run.conditions.accepted for run in runs)
    assert {(run.conditions.share, run.summary.attainment_branching is None) for run in runs} == {
        (0.5, False),
        (0.0, True),
    }
    assert read_runs(tmp_path / "out" / "runs.json") == runs
    records = list(request_file().read(tmp_path / "out" / "requests.jsonl"))
    assert {record.window for record in records} == {run.conditions.window for run in runs}
    first = [record for record in records if record.window == runs[0].conditions.window]
    assert [record.seed for record in first] == [4] * len(first)
    again = FakeEngine()
    assert perform(SWEEP, tmp_path / "out", engine=again) == runs
    assert again.requests == []


def test_a_killed_sweep_goes_on_at_the_first_unfinished_window(tmp_path: Path) -> None:
    short = replace(SWEEP, rounds=1, points=SWEEP.points[:1])
    runs = perform(short, tmp_path)
    raw = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    raw["runs"] = raw["runs"][:1]  # killed during the second window
    (tmp_path / "runs.json").write_text(json.dumps(raw), encoding="utf-8")
    with (tmp_path / "requests.jsonl").open("a", encoding="utf-8") as out:
        out.write('{"id": "torn')
    resumed = perform(short, tmp_path)
    assert [run.conditions.window for run in resumed] == [run.conditions.window for run in runs]
    records = list(request_file().read(tmp_path / "requests.jsonl"))
    second = [record.index for record in records if record.policy == "taper"]
    assert sorted(set(second)) == sorted(second)


def test_a_window_on_a_busy_machine_is_kept_marked_and_repeated(tmp_path: Path) -> None:
    busy = replace(SWEEP, rounds=1, points=SWEEP.points[:1], policies=("taper",), foreign_limit=-1.0, tries=2)
    runs = perform(busy, tmp_path)
    assert [(run.conditions.attempt, run.conditions.accepted) for run in runs] == [(0, False), (1, False)]
    assert [run.conditions.window.rpartition("/")[2] for run in runs] == ["try0", "try1"]
    quiet = perform(replace(busy, foreign_limit=1.0, tries=3), tmp_path)
    assert [run.conditions.accepted for run in quiet] == [False, False, True]


def test_a_server_without_taper_has_no_account_of_its_own(tmp_path: Path) -> None:
    long = replace(PLAN, measure_s=3.0)
    stock = replace(SWEEP, rounds=1, points=SWEEP.points[:1], policies=("stock",), plan=long)
    engine = FakeEngine()
    (run,) = perform(stock, tmp_path, engine=engine, controlled=False)
    assert engine.patches == []
    assert (run.engine.planner_p99_s, run.engine.fallbacks, run.engine.steps) == (None, None, 0)
    assert run.summary.judged > 0


def test_steps_are_kept_with_their_window(tmp_path: Path) -> None:
    store = Store(tmp_path, settings={}, about={}, keep_steps=True)
    with store:
        assert store.runs == []
    step = {
        "step": 1, "time_s": 2.0, "policy": "off", "rows": 1, "context_tokens": 1, "prefill_tokens": 0, "groups": 1,
        "protected": 1, "extra": 0, "deferred": 0, "held": 0, "baseline_s": None, "predicted_s": None, "budget_s": None,
        "slack_min_s": None, "measured_s": None, "ending": None, "planner_s": None, "window": "w",
    }  # fmt: skip
    assert step_file().parse(json.dumps(step)).window == "w"


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "a", settings={"seed": 1, "loads": (1.0,)}, about={}):
        pass
    with Store(tmp_path / "a", settings={"seed": 1, "loads": (1.0,)}, about={}) as again:
        again.note(resolved={"law_scale": 1.5})
    with pytest.raises(ConfigError, match=r"holds a bench with seed = 1, not 2"):
        Store(tmp_path / "a", settings={"seed": 2, "loads": (1.0,)}, about={})
    assert json.loads((tmp_path / "a" / "meta.json").read_text(encoding="utf-8"))["resolved"] == {"law_scale": 1.5}
    for torn in ("", "[]", '{"schema": "taper.bench/1"}', "[" * 5000):
        (tmp_path / "a" / "meta.json").write_text(torn, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"meta\.json(: not JSON| is not of schema)"):
            Store(tmp_path / "a", settings={"seed": 1}, about={})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no bench"):
        Store(tmp_path / "b", settings={}, about={})


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"load": 1.0}, "slo_at or slo_tpot_s"),
        ({"load": 1.0, "rate_rps": 2.0, "slo_at": 0.5}, "load or rate_rps"),
        ({"load": 0.0, "slo_at": 0.5}, "load must be between"),
        ({"load": 1.0, "slo_at": 1.0}, "slo_at must be between"),
    ],
)
def test_impossible_points_are_refused(point: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Point(**point)


def test_impossible_sweeps_are_refused() -> None:
    for change, message in (
        ({"rounds": 0}, "rounds"),
        ({"tries": 0}, "tries"),
        ({"policies": ("off", "off")}, "each named once"),
        ({"points": (SWEEP.points[0], SWEEP.points[0])}, "the same"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SWEEP, **change)  # type: ignore[arg-type]

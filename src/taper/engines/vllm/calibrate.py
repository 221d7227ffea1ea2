"""Calibration of a running engine: drive loads through it, drain its step records, fit the latency law.

It runs under policy `off`: every row of a calibration is a request of its own, so nothing has to be widened,
and a client that comes in meanwhile is never served eagerly by surprise. The policy in force before is put
back whatever happens.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from taper.core.calibration import Fit, Samples, fit
from taper.core.latency import LinearLatency
from taper.engines.vllm import grid
from taper.engines.vllm.drive import Driver
from taper.engines.vllm.facts import key_of
from taper.engines.vllm.grid import Bounds, Visit
from taper.engines.vllm.launch import ServerError
from taper.profile import COEFFICIENTS, KNEE, Profile, ProfileKey

START_BUDGET_S = 45.0
STEPS_PER_VISIT = 8
PROBE_SHARE = 0.25  # of the time budget, for finding out how many rows are worth visiting
PREFILL_SHARE = 0.25  # ... and for prefilling the contexts
LEAST_ROWS = 12  # visited even where steps are long: fewer do not show what a row costs
LONGEST_STEP_SLOS = 2.0  # row counts whose steps last longer are not visited: no policy that keeps SLOs goes there

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A profile ready to be saved, and what it was made from."""

    profile: Profile
    fit: Fit
    samples: Samples
    seconds: float


def calibrate(
    url: str,
    headers: Mapping[str, str],
    *,
    budget_s: float = START_BUDGET_S,
    apply: bool = True,
    progress: Progress | None = None,
    seed: int = 0,
) -> Calibration:
    """Calibrate the TAPER server at `url` within about `budget_s` seconds; `headers` carry the control right.

    With `apply` the engine goes on with the new profile. Raises `ServerError` if the server fails or refuses,
    `ConfigError` if its steps cannot determine a law.
    """
    return asyncio.run(_calibrate(url, headers, budget_s, apply, progress or (lambda line: None), seed))


def spot_check(url: str, headers: Mapping[str, str], law: LinearLatency, *, seed: int = 0) -> float:
    """Measured over predicted seconds of a step, whichever of two light loads is further off; takes 1-3 s.

    Raises `ServerError` if the server fails or refuses.
    """
    return asyncio.run(_spot_check(url, headers, law, seed))


def engine_key(state: Mapping[str, Any]) -> ProfileKey:
    """The profile key of a server from its `/taper/state`."""
    return key_of(_facts(state))


async def _calibrate(
    url: str, headers: Mapping[str, str], budget_s: float, apply: bool, progress: Progress, seed: int
) -> Calibration:
    start_s = time.monotonic()
    async with Driver(url, headers, seed) as driver:
        before = (await driver.state())["engines"][0]
        facts = _facts({"engines": [before]})
        await driver.configure({"policy": "off"})
        profile: Profile | None = None
        try:
            longest_s = LONGEST_STEP_SLOS * float(before["tpot_slo_s"])
            await _visit_all(driver, Bounds.of(facts), start_s + budget_s, longest_s, progress)
            samples = driver.samples()
            sizes = tuple(facts["capture_sizes"])
            result = fit(samples, capture_sizes=sizes)
            profile = _profile(key_of(facts), result, sizes)
        finally:
            patch: dict[str, Any] = {"policy": before["policy"]}
            if apply and profile is not None:
                patch["profile"] = profile.to_json()
            await driver.configure(patch)
    return Calibration(profile=profile, fit=result, samples=samples, seconds=time.monotonic() - start_s)


async def _spot_check(url: str, headers: Mapping[str, str], law: LinearLatency, seed: int) -> float:
    async with Driver(url, headers, seed) as driver:
        before = (await driver.state())["engines"][0]
        bounds = Bounds.of(_facts({"engines": [before]}))
        await driver.configure({"policy": "off"})
        ratios = [1.0]
        try:
            context = grid.context_lengths(bounds, STEPS_PER_VISIT)[0]
            for rows in (1, min(LEAST_ROWS, bounds.max_rows)):
                measured = await driver.visit(Visit(rows=rows, context_tokens=context, steps=STEPS_PER_VISIT))
                if measured:
                    tokens = rows * (context + STEPS_PER_VISIT // 2)
                    ratios.append(float(np.median(measured)) / law.predict(rows, tokens, 0))
        finally:
            await driver.configure({"policy": before["policy"]})
        return max(ratios, key=lambda ratio: abs(math.log(ratio)))


async def _visit_all(driver: Driver, bounds: Bounds, deadline_s: float, longest_s: float, progress: Progress) -> None:
    budget_s = deadline_s - time.monotonic()
    rate = await driver.prefill_rate(bounds.chunk_tokens)
    bounds = bounds.within(PREFILL_SHARE * budget_s * rate)
    rows = await _probe(driver, bounds, time.monotonic() + PROBE_SHARE * budget_s, longest_s)
    progress(f"calibrating: rows 1-{rows[-1]}, contexts up to {grid.context_lengths(bounds, STEPS_PER_VISIT)[-1]}")
    visits = grid.passes(rows, bounds, STEPS_PER_VISIT, driver.seed)
    count, longest_visit_s = 0, 0.0
    while (now_s := time.monotonic()) + longest_visit_s < deadline_s:
        await driver.visit(next(visits))
        count += 1
        longest_visit_s = max(0.9 * longest_visit_s, time.monotonic() - now_s)
        if count % 10 == 0:
            progress(f"calibrating: {count} loads visited, {len(driver.records)} steps measured")


async def _probe(driver: Driver, bounds: Bounds, deadline_s: float, longest_s: float) -> tuple[int, ...]:
    """Row counts worth visiting: up to the first whose steps are too long. Tries every second one."""
    context = grid.context_lengths(bounds, STEPS_PER_VISIT)[0]
    counts = grid.row_counts(bounds)
    most = 0
    for rows in dict.fromkeys((*counts[::2], counts[-1])):
        if not grid.fits(rows, context, STEPS_PER_VISIT, bounds):
            break
        measured = await driver.visit(Visit(rows=rows, context_tokens=context, steps=STEPS_PER_VISIT))
        too_long = bool(measured) and float(np.median(measured)) > longest_s
        if too_long and most >= LEAST_ROWS:
            break
        most = rows
        if most >= LEAST_ROWS and time.monotonic() > deadline_s:
            break
    return tuple(rows for rows in counts if rows <= most)


def _facts(state: Mapping[str, Any]) -> dict[str, Any]:
    engines = state.get("engines") or [{}]
    facts = engines[0].get("engine")
    if not isinstance(facts, dict):
        raise ServerError("/taper/state says nothing about the engine; is the server another TAPER version?")
    return facts


def _profile(key: ProfileKey, result: Fit, capture_sizes: tuple[int, ...]) -> Profile:
    law, stats = result.latency, asdict(result)
    del stats["latency"]
    names = (*COEFFICIENTS, *KNEE) if law.steep_s else COEFFICIENTS
    return Profile(
        key=key,
        coefficients={name: float(getattr(law, name)) for name in names},
        capture_sizes=capture_sizes,
        fit=stats,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )

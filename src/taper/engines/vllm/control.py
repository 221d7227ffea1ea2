"""Reading and changing a running engine: what the utility methods on EngineCore do.

Everything that leaves here crosses a process boundary as msgpack and then JSON: dicts, lists, strings and
finite numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from taper.config import resolve_policy, settings
from taper.core.types import ConfigError, Knobs
from taper.engines.vllm import compat
from taper.engines.vllm.live import STEP_KEYS, live, slack_quantiles_s
from taper.engines.vllm.meter import Window
from taper.engines.vllm.regulator import Regulator
from taper.profile import Profile, parse_profile

SCHEMA = "taper.state/1"
SLO_KEYS = {"tpot_slo_s": "tpot_s", "ttft_slo_s": "ttft_s"}
PATCH_KEYS = ("policy", *SLO_KEYS, "knobs", "profile")


def snapshot(taper: Regulator) -> dict[str, Any]:
    """The state of one engine replica as plain data; `step` is None before the first step."""
    controller, law = taper.controller, taper.controller.latency
    last = taper.last_step
    record = last.record() if last else None
    found = compat.installed()
    return {
        "schema": SCHEMA,
        "policy": controller.policy.name,
        "tpot_slo_s": taper.slo.tpot_s,
        "ttft_slo_s": taper.slo.ttft_s,
        "profile": str(taper.profile.key) if taper.profile else "none",
        "learning": controller.learning,
        "seams": taper.seam_report,
        "vllm_version": found[1] if found else None,
        "engine": taper.seam.facts,
        "step": {key: record[key] for key in STEP_KEYS} if record else None,
        "window": taper.window.report(taper.clock()),
        "totals": {
            "steps": taper.steps,
            "fallbacks": taper.fallbacks,
            "rejected_claims": taper.rejected_claims,
        },
        "correction": {
            "scale": law.scale,
            "prefill_scale": law.prefill_scale,
            "margin": controller.guidance.margin,
        },
        "tables": {
            "groups": len(taper.table.groups),
            "branches": len(taper.table.branches),
            "pending_steps": len(taper.meter),
        },
        "kv_usage": taper.seam.kv_usage,
        "counters": taper.onlooker.tally.counters()
        | {"forks": taper.table.forks, "joins": taper.table.joins}
        | {"trace_dropped": taper.onlooker.trace.dropped if taper.onlooker.trace else 0},
        "recent": taper.onlooker.tally.recent(taper.clock()),
        "slack_s": slack_quantiles_s(taper),
    }


def configure(taper: Regulator, patch: object) -> dict[str, Any]:
    """Apply a patch as a whole and start a new statistics window; returns the snapshot.

    A bad patch changes nothing and returns {"error": one line}. A new SLO also holds for requests in flight
    that made no claim of their own; `"profile": null` goes back to learning online.
    """
    try:
        change = _checked(taper, patch)
    except ConfigError as error:
        return {"error": str(error)}
    change()
    taper.window = Window(since_s=taper.clock())
    return snapshot(taper)


def drain_steps(taper: Regulator) -> list[dict[str, Any]]:
    """The step records since the last drain, oldest first, at most `record_steps` of them."""
    records = list(taper.records)
    taper.records.clear()
    return records


def _checked(taper: Regulator, patch: object) -> Callable[[], None]:
    """Validate everything first. Raises `ConfigError`; the result applies the patch and cannot fail."""
    if not isinstance(patch, Mapping):
        raise ConfigError(f"patch must be a JSON object, not {type(patch).__name__}")
    for key in patch:
        if key not in PATCH_KEYS:
            raise ConfigError(f"unknown key {key!r}; known: {', '.join(PATCH_KEYS)}")
    controller = taper.controller
    policy = resolve_policy(patch["policy"]) if "policy" in patch else None
    slo = replace(taper.slo, **{field: patch[key] for key, field in SLO_KEYS.items() if key in patch})
    knobs = controller.knobs
    if "knobs" in patch:
        if not isinstance(patch["knobs"], Mapping):
            raise ConfigError(f"knobs must be a JSON object, not {type(patch['knobs']).__name__}")
        knobs = settings(Knobs, {**asdict(knobs), **patch["knobs"]}, "knobs")
    profile: Profile | None = None
    if patch.get("profile") is not None:
        profile = parse_profile(patch["profile"])

    def apply() -> None:
        controller.replace(policy=policy, knobs=knobs)
        if "profile" in patch:
            taper.use_profile(profile)
        taper.use_slo(slo)

    return apply


# --- EngineCore methods -----------------------------------------------------------------------------------


def install(engine_core: Any) -> None:
    """Give EngineCore the `taper_*` methods; doing it again changes nothing."""
    for method in (taper_snapshot, taper_configure, taper_drain_steps, taper_live):
        setattr(engine_core, method.__name__, method)


def taper_snapshot(self: Any) -> dict[str, Any]:
    taper = _regulator(self)
    return snapshot(taper) if taper else _absent()


def taper_configure(self: Any, patch: dict[str, Any]) -> dict[str, Any]:
    taper = _regulator(self)
    return configure(taper, patch) if taper else _absent()


def taper_drain_steps(self: Any) -> list[dict[str, Any]]:
    taper = _regulator(self)
    return drain_steps(taper) if taper else []


def taper_live(self: Any, since: int) -> dict[str, Any]:
    taper = _regulator(self)
    return live(taper, since) if taper else _absent()


def _regulator(engine_core: Any) -> Regulator | None:
    return getattr(engine_core.scheduler, "taper", None)


def _absent() -> dict[str, Any]:
    return {
        "error": "this engine does not run TAPER's scheduler: add --scheduler-cls "
        "taper.engines.vllm.scheduler.TaperScheduler"
    }

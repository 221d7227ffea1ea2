"""What a client may ask for in `vllm_xargs`, and how far: SLO, priority and group of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from taper.core.types import ConfigError, Slo, check_range

MAX_GROUP_CHARS = 128
SEALED = "sealed:"  # begins every tag that the server made: see `taper.tenancy`
TPOT_FIELD, TTFT_FIELD = "taper_tpot_slo_ms", "taper_ttft_slo_ms"
FIELDS = ("taper_group", TPOT_FIELD, TTFT_FIELD, "taper_priority")
MS_PER_S = 1000.0
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLimits:
    """Server policy: what a claim is bounded by. By default a client may loosen its SLO and not tighten it."""

    tightest_slo: float = 1.0  # a claimed SLO is at least this many times the server's
    loosest_slo: float = 100.0  # ... and at most this many times
    max_priority: float = 0.0  # largest priority a client may claim; 0 = no claims above ordinary
    max_branches: int = 1024  # of one request or tag at a time

    def __post_init__(self) -> None:
        check_range("limits.tightest_slo", self.tightest_slo, low=1e-6, high=1, unit="x the server's SLO")
        check_range("limits.loosest_slo", self.loosest_slo, low=1, high=1e6, unit="x the server's SLO")
        check_range("limits.max_priority", self.max_priority, low=0, high=1000, unit="")
        if not isinstance(self.max_branches, int) or not 1 <= self.max_branches <= 1_000_000:
            raise ConfigError(f"limits.max_branches must be an integer from 1 to 1000000, not {self.max_branches!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """A request's claims after the server's bounds. `group` is None for an untagged request."""

    group: str | None
    slo: Slo
    priority: float


def parse_claims(
    extra_args: Mapping[str, object] | None, limits: ClaimLimits, default_slo: Slo, *, sealed_only: bool = False
) -> Claims:
    """Read the `taper_*` fields of a request; other fields are not ours and are left alone.

    `sealed_only`: the tag must be one that the server made. Raises `ConfigError` with one line that names the field:
    unknown `taper_*` field, wrong type, not finite, or beyond what `limits` let a client claim.
    """
    extra = extra_args or {}
    for name in extra:
        if isinstance(name, str) and name.startswith("taper_") and name not in FIELDS:
            raise ConfigError(f"unknown field {name!r} in vllm_xargs; TAPER knows {', '.join(FIELDS)}")
    slo = default_slo
    for name, target in ((TPOT_FIELD, "tpot_s"), (TTFT_FIELD, "ttft_s")):
        if name in extra:
            slo = replace(slo, **{target: _slo_s(name, extra[name], getattr(default_slo, target), limits)})
    priority = 0.0
    if "taper_priority" in extra:
        priority = check_range("taper_priority", extra["taper_priority"], low=-1000, high=limits.max_priority, unit="")
    group = _group(extra.get("taper_group"))
    if sealed_only and group is not None and not group.startswith(SEALED):
        raise ConfigError("taper_group came past ClaimsMiddleware, which seals it; this route takes none")
    return Claims(group=group, slo=slo, priority=priority)


def _slo_s(name: str, value: object, server_s: float, limits: ClaimLimits) -> float:
    least_ms = server_s * limits.tightest_slo * MS_PER_S
    most_ms = server_s * limits.loosest_slo * MS_PER_S
    # 63.7 ms as seconds and back is a little more than 63.7: the server's own SLO must not be refused for that.
    return check_range(name, value, low=least_ms * (1 - ROUNDING), high=most_ms * (1 + ROUNDING), unit="ms") / MS_PER_S


def check_priority(value: float, limits: ClaimLimits) -> None:
    """Refuse vLLM's own `priority` (smaller is served first, and takes the place of running rows) out of bounds."""
    if value < -limits.max_priority:
        raise ConfigError(f"priority must be at least {0 - limits.max_priority:g} on this server, not {value:g}")


def check_branches(name: str, count: int, limits: ClaimLimits) -> None:
    if count > limits.max_branches:
        raise ConfigError(f"{name} makes {count} branches; this server allows a request {limits.max_branches}")


def _group(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"taper_group must be a string, not {value!r}")
    if not 1 <= len(value) <= MAX_GROUP_CHARS or not value.isprintable():
        raise ConfigError(f"taper_group must be 1 to {MAX_GROUP_CHARS} printable characters")
    return value

"""The nouns of the controller.

Seconds and tokens throughout; the unit is in the name. Anything that has one entry per request or per
branch is a numpy column, not a list of objects: at 4,096 rows an object per row would cost more than the
decode step may. Columns are read-only by convention; nothing in `core` writes to one it was given.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class ConfigError(ValueError):
    """A setting that TAPER refuses; the message names the field, the value and what is allowed."""

    def __str__(self) -> str:
        return writable(super().__str__())


def writable(text: str) -> str:
    """`text` as UTF-8 can carry it: JSON can spell half a surrogate pair, and nothing could print or keep that."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def knob(default: float, *, low: float, high: float, unit: str, doc: str) -> Any:
    """A dataclass field that carries its own range, unit and documentation."""
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "doc": doc})


def check_range(name: str, value: object, *, low: float, high: float, unit: str) -> float:
    """Return `value` as a float, or raise `ConfigError` unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number{unit and f' ({unit})'}, not {value!r}")
    if not low <= value <= high:  # not a number is not in between either, and a huge integer need not fit a float
        raise ConfigError(f"{name} must be between {low:g} and {high:g}{unit and f' {unit}'}, not {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request is promised: effective time per output token, and time to the first one."""

    tpot_s: float = knob(0.05, low=1e-4, high=60.0, unit="s", doc="time per output token, over all branches")
    ttft_s: float = knob(5.0, low=1e-3, high=3600.0, unit="s", doc="time to first token")

    def __post_init__(self) -> None:
        _check_knobs(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """Everything an operator can turn on the controller. Docs and command line are generated from here."""

    margin: float = knob(0.02, low=0.0, high=0.5, unit="of the SLO", doc="SLO share kept back for what T misses")
    horizon_steps: float = knob(
        16, low=1, high=1024, unit="steps", doc="steps over which a credit is spent, and the fewest for repaying a debt"
    )
    lookahead_tokens: float = knob(
        64, low=1, high=65536, unit="tokens", doc="least remaining length assumed when judging a request hopeless"
    )
    prefill_floor_tokens: float = knob(
        64, low=1, high=65536, unit="tokens", doc="prefill a step may always carry, whatever decode slack says"
    )
    quantum_tokens: float = knob(
        16, low=1, high=4096, unit="tokens", doc="tokens a branch advances before its siblings overtake it"
    )
    correction_rate: float = knob(
        0.05, low=0.0, high=1.0, unit="per step", doc="weight of one sample in the online predictor correction"
    )
    correction_limit: float = knob(
        3.0, low=1.0, high=100.0, unit="x", doc="furthest the online correction may move the profile, either way"
    )
    margin_gain: float = knob(
        0.01, low=0.0, high=0.2, unit="of the SLO per miss", doc="integral action on misses that extras caused"
    )
    miss_target: float = knob(
        0.02, low=0.0, high=0.5, unit="of requests", doc="share of extra-caused misses at which the margin rests"
    )
    throughput_floor: float = knob(
        1, low=0, high=1, unit="0 or 1", doc="let the outer loop raise the budget where deferral only loses"
    )
    rho: float = knob(0.8, low=0.0, high=1.0, unit="of slack", doc="slack share that policy taper-paper spends")

    def __post_init__(self) -> None:
        _check_knobs(self)


def _check_knobs(settings: Slo | Knobs) -> None:
    for spec in fields(settings):
        meta = spec.metadata
        check_range(spec.name, getattr(settings, spec.name), low=meta["low"], high=meta["high"], unit=meta["unit"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What the controller sees before one step: G requests and their B live branches, as columns.

    Branch columns are ordered by request, so `request` is non-decreasing and covers 0..G-1: a request
    without a live branch has no row to protect and is not in the view.
    """

    now_s: float
    # One entry per request, shape (G,).
    arrival_s: Floats
    first_token_s: Floats  # NaN until the request's first token
    tokens: Ints  # output tokens so far over all branches, ended ones included
    tpot_slo_s: Floats
    ttft_slo_s: Floats
    priority: Floats  # larger is served extras first; 0 is ordinary
    # One entry per live branch, shape (B,).
    request: Ints  # index into the request columns
    context_tokens: Ints  # KV the row reads in this step
    progress_tokens: Ints  # output tokens of this branch
    prefill_tokens: Ints  # prompt tokens still to compute before it can decode; 0 for a decoding row
    resident: Bools  # holds KV; False = held, not yet started
    ran_last: Bools  # was a row of the previous step
    pinned: Bools  # must run in this step whatever the policy says
    # Scalars of the step.
    kv_free_tokens: int  # KV room left for branches that are not resident
    max_prefill_tokens: int  # the engine's own bound on prompt tokens per step
    tokens_per_row: float = 1.0  # expected output tokens per row; above 1 with speculative decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What a step carries, as the latency model counts it."""

    rows: int
    context_tokens: int
    prefill_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decision for one step; `run` and `protected` align with the view's branch columns."""

    run: Bools  # (B,) rows of this step; the others are deferred, or held if not resident
    protected: Bools  # (B,) the rows that run whatever they cost: one per request, and pinned ones
    load: StepLoad
    baseline_s: float  # predicted T(S0)
    predicted_s: float  # predicted T(S)
    budget_s: float  # step time the batch can absorb; inf where nothing binds
    slack_min_s: float  # least slack of any request that still can meet its SLO; inf without one
    prefill_limit_tokens: int | None = None  # None: the engine's own bound

    @property
    def externality_s(self) -> float:
        """E(S) = T(S) - T(S0), what the admitted extras cost every request in the batch."""
        return self.predicted_s - self.baseline_s


class Ending(enum.Enum):
    """What became of a step's latency sample."""

    CLEAN = "clean"
    IGNORED = "ignored"  # warm-up, compilation, idle gap, preemption: says nothing about T
    OVERRUN = "overrun"  # far above prediction: counted, kept from the correction


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """A request whose last branch ended, as the controller's slow loops need it."""

    tokens: int  # over all branches
    serial_tokens: int  # produced while one branch was live
    critical_path_tokens: int  # serial tokens plus the longest branch of each parallel stage
    residence_s: float  # last token - first token
    externality_s: float  # sum of E over the steps in between
    tpot_slo_s: float

    @property
    def met(self) -> bool:
        """Effective TPOT within the SLO: residence <= SLO * (tokens - 1)."""
        return self.residence_s <= self.tpot_slo_s * (self.tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a planned step turned out to be: its load as executed, and its latency."""

    load: StepLoad
    requests: int  # in service during the step
    measured_s: float
    ending: Ending
    finished: tuple[FinishedRequest, ...] = ()
    tokens_per_row: float = 1.0  # expected, as in the view

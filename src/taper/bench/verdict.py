"""Did the run show what it should, and was the machine in the regime where it can? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taper.bench.result import over_rounds, ratio_over_rounds
from taper.core.types import Slo
from taper.goodput import Spread
from taper.results import Run

FOREIGN_CPU_LIMIT = 0.10  # share of the machine other processes may take before a window is called disturbed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One promise of the demo and what became of it."""

    name: str
    wanted: str
    got: float | None
    reached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    contended: bool
    regime_line: str
    targets: tuple[Target, ...]
    notes: tuple[str, ...]

    @property
    def reached(self) -> bool:
        return self.contended and all(target.reached for target in self.targets)


def judge(runs: Sequence[Run], slo: Slo) -> Verdict:
    """Compare medians over rounds with the targets; targets of policies that did not run are left out."""
    contended, line = _regime(runs, slo)
    return Verdict(contended=contended, regime_line=line, targets=_targets(runs), notes=_notes(runs))


def _regime(runs: Sequence[Run], slo: Slo) -> tuple[bool, str]:
    off, eager = (_median(over_rounds(runs, policy, "step_mean_s")) for policy in ("off", "eager"))
    if off is None or eager is None:
        return False, "the regime cannot be told: it takes measured steps of both off and eager"
    contended = off < slo.tpot_s < eager
    if contended:
        claim = "contended: off keeps the SLO with room to spare, eager breaks it"
    elif eager <= slo.tpot_s:
        claim = "NOT contended: even eager keeps this SLO, there is nothing to regulate"
    else:
        claim = "OUT OF REACH: even one row per request breaks this SLO (is the machine busy with something else?)"
    return contended, (
        f"mean step of off {off * 1e3:.1f} ms, SLO {slo.tpot_s * 1e3:.1f} ms, mean step of eager"
        f" {eager * 1e3:.1f} ms: {claim}"
    )


def _targets(runs: Sequence[Run]) -> tuple[Target, ...]:
    wanted = (
        ("taper's attainment", ">= 95 %", _median(over_rounds(runs, "taper", "attainment")), 0.95, True),
        ("eager's attainment", "< 85 %", _median(over_rounds(runs, "eager", "attainment")), 0.85, False),
        (
            "goodput, taper over off",
            ">= 1.3 x",
            _median(ratio_over_rounds(runs, "goodput_tok_s", "taper", "off")),
            1.3,
            True,
        ),
        (
            "goodput, taper over eager",
            ">= 1 x",
            _median(ratio_over_rounds(runs, "goodput_tok_s", "taper", "eager")),
            1.0,
            True,
        ),
    )
    return tuple(
        Target(name=name, wanted=text, got=got, reached=got >= bound if at_least else got < bound)
        for name, text, got, bound, at_least in wanted
        if got is not None
    )


def _notes(runs: Sequence[Run]) -> tuple[str, ...]:
    notes = []
    errors = sum(run.summary.misses_error for run in runs)
    if errors:
        notes.append(f"{errors} requests failed or timed out; they count as misses")
    fallbacks = sum(run.engine.fallbacks or 0 for run in runs)
    if fallbacks:
        notes.append(f"the planner fell back to eager in {fallbacks} steps: see the server's log")
    disturbed = [run for run in runs if (run.engine.foreign_cpu or 0) > FOREIGN_CPU_LIMIT]
    if disturbed:
        names = ", ".join(f"{run.policy} in round {run.round + 1}" for run in disturbed)
        notes.append(f"other processes took more than {FOREIGN_CPU_LIMIT:.0%} of the machine during: {names}")
    return tuple(notes)


def _median(value: Spread | None) -> float | None:
    return value.median if value else None

"""`taper:*` on the server's own `/metrics`, beside what vLLM shows there.

The numbers are the engines' own, fetched when somebody scrapes. Whichever API process answers asks every engine
that it serves, and nothing is added up over API processes: so the figures are right with one and with several,
and under data parallelism each engine is a labelled set of its own, as in vLLM's metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from taper.engines.vllm.watch import EnginesAway, Poll

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
ROLES = ("protected", "extra", "deferred", "held")
Snapshot = Mapping[str, Any]


class Exposition:
    """The text of `/metrics`: vLLM's registry first, then ours."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._poll: Poll | None = None
        self._model = ""
        self._ranks: Sequence[int] = ()

    def serve(self, poll: Poll, *, model: str, ranks: Sequence[int]) -> None:
        """The engines are up."""
        self._poll, self._model, self._ranks = poll, model, ranks

    async def text(self) -> bytes:
        """In the classic text format, which every scraper reads.

        Not in OpenMetrics, though Prometheus would rather have it: prometheus_client writes the colon of a
        sample's name as an underscore there, so that `taper:` and `vllm:` names would not be found.
        """
        ours = await self._ours()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Fixed(self._registry.collect))
        registry.register(_Fixed(lambda: ours))
        return generate_latest(registry)

    async def _ours(self) -> list[Metric]:
        if self._poll is None:
            return []
        try:
            snapshots, age_s = await self._poll.latest()
        except EnginesAway:
            return []
        return families(snapshots, model=self._model, ranks=self._ranks, age_s=age_s)


class _Fixed:
    def __init__(self, source: Any) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        found: Iterable[Metric] = self._source()
        return found


def families(snapshots: Sequence[Snapshot], *, model: str, ranks: Sequence[int], age_s: float) -> list[Metric]:
    """Every `taper:*` metric of every engine. A replica without TAPER's scheduler has none."""
    book = _Book()
    for rank, snapshot in zip(ranks, snapshots, strict=False):
        if "error" not in snapshot:
            base = (model, str(rank))
            _now(book, base, snapshot)
            _steps(book, base, snapshot)
            _requests(book, base, snapshot)
            book.gauge("snapshot_age_seconds", "Age of the engine's answer that these figures are from.", base, age_s)
    return list(book.families.values())


class _Book:
    """Metric families by name, each sample with its labels."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {}

    def gauge(self, name: str, doc: str, base: tuple[str, str], value: float | None, **labels: str) -> None:
        if value is not None:
            self._family(GaugeMetricFamily, name, doc, labels).add_metric([*base, *labels.values()], value)

    def counter(self, name: str, doc: str, base: tuple[str, str], value: float, **labels: str) -> None:
        self._family(CounterMetricFamily, name, doc, labels).add_metric([*base, *labels.values()], value)

    def histogram(self, name: str, doc: str, base: tuple[str, str], report: Mapping[str, Any]) -> None:
        count, buckets = 0, []
        for bound, more in zip((*report["bounds"], "+Inf"), report["counts"], strict=True):
            count += more
            buckets.append((bound if bound == "+Inf" else str(float(bound)), count))
        self._family(HistogramMetricFamily, name, doc, {}).add_metric([*base], buckets=buckets, sum_value=report["sum"])

    def _family(self, kind: Any, name: str, doc: str, labels: Mapping[str, str]) -> Any:
        if name not in self.families:
            self.families[name] = kind(f"taper:{name}", doc, labels=[*LABELS, *labels])
        return self.families[name]


def _now(book: _Book, base: tuple[str, str], snapshot: Snapshot) -> None:
    """What the last step looked like, and the settings it was decided under."""
    tables = snapshot["tables"]
    step = snapshot["step"] if tables["branches"] else None
    for role in ROLES:
        value = step[role] if step else 0
        book.gauge("num_rows", "Branches by their role in the last step.", base, value, role=role)
    book.gauge("num_groups", "Logical requests in the engine.", base, tables["groups"])
    book.gauge("num_branches", "Branches in the engine.", base, tables["branches"])
    for name, doc in (
        ("budget", "Time the last step was allowed; absent where nothing bound it."),
        ("predicted", "Predicted time of the last step."),
        ("measured", "Measured time of the last step."),
    ):
        book.gauge(f"step_{name}_seconds", doc, base, step[f"{name}_s"] if step else None)
    for stat, value in zip(("min", "p50"), snapshot["slack_s"] or (), strict=False):
        book.gauge("slack_seconds", "Step time that the requests allow: the least, the median.", base, value, stat=stat)
    correction = snapshot["correction"]
    for term, value in (("step", correction["scale"]), ("prefill", correction["prefill_scale"])):
        book.gauge(
            "calibration_scale", "Online correction of the calibrated law, 1 = as calibrated.", base, value, term=term
        )
    book.gauge("margin_ratio", "Share of the SLO kept back.", base, correction["margin"])
    for kind in ("tpot", "ttft"):
        book.gauge("slo_seconds", "The server's default SLO.", base, snapshot[f"{kind}_slo_s"], kind=kind)
    book.gauge("policy_info", "1, with the policy in force as a label.", base, 1, policy=snapshot["policy"])
    book.gauge("learning", "1 while the cost of a step is only a guess.", base, int(snapshot["learning"]))


def _steps(book: _Book, base: tuple[str, str], snapshot: Snapshot) -> None:
    counters, totals = snapshot["counters"], snapshot["totals"]
    for role in ROLES:
        book.counter("row_steps", "Branches by role, summed over steps.", base, counters["row_steps"][role], role=role)
    for ending, value in counters["endings"].items():
        book.counter("steps", "Steps, by what their time says about the law.", base, value, ending=ending)
    book.histogram("request_width", "Rows of a request in a step.", base, counters["widths"])
    book.histogram("step_seconds", "Measured time of a step.", base, counters["step_s"])
    book.histogram("planner_seconds", "Time to plan a step.", base, counters["planner_s"])
    book.counter("predicted_seconds", "Predicted time, summed over steps.", base, counters["predicted_s"])
    book.counter("externality_seconds", "Predicted T(S) - T(S0), summed over steps.", base, counters["externality_s"])
    book.counter(
        "predictor_error_ratio", "|predicted - measured| / measured, summed over clean steps.", base,
        counters["error_ratio"],
    )  # fmt: skip
    book.counter("forks", "Times that a request went from one live branch to several.", base, counters["forks"])
    book.counter("joins", "Times that a request went back to one live branch.", base, counters["joins"])
    book.counter("fallbacks", "Faults of TAPER: the step ran as stock vLLM's would.", base, totals["fallbacks"])
    book.counter("rejected_claims", "Claims of clients that were refused.", base, totals["rejected_claims"])
    book.counter(
        "trace_dropped", "Decisions that the step trace could not keep up with.", base, counters["trace_dropped"]
    )


def _requests(book: _Book, base: tuple[str, str], snapshot: Snapshot) -> None:
    for name, one in snapshot["counters"]["classes"].items():
        label = {"class": name}
        outcomes = {"met": one["met"], "missed": sum(one["missed"].values()), "unjudged": one["unjudged"]}
        for outcome, value in outcomes.items():
            book.counter("requests", "Finished requests, by class and outcome.", base, value, **label, outcome=outcome)
        for cause, value in one["missed"].items():
            book.counter(
                "request_misses", "Requests that missed their time per token.", base, value, **label, cause=cause
            )
        book.counter("ttft_misses", "Requests whose first token came late.", base, one["ttft_missed"], **label)
        book.counter("request_tokens", "Tokens of finished requests.", base, one["tokens"], **label)
        book.counter(
            "goodput_tokens", "Tokens of finished requests that met their SLO.", base, one["goodput_tokens"], **label
        )
        share = snapshot["recent"][f"attainment_{name}"]
        book.gauge(
            "slo_attainment_ratio", "Share of requests that met their SLO, last 5 minutes.", base, share, **label
        )

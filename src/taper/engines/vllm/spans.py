"""Requests and their branches as OpenTelemetry spans, where vLLM's own tracing is on (`--otlp-traces-endpoint`).

A request is a span from its arrival to its last branch's end, below the client's span where the client sent a
trace context; each branch is a child of it. Times of the engine's clock become wall-clock times by one offset
taken at the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from taper.engines.vllm.groups import Branch, Group

NS_PER_S = 1e9
INSTRUMENT = "taper"


class Spans:
    """Opens a span with each group and each branch, and closes it with them."""

    def __init__(self, tracer: Any, clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._offset_s = time.time() - clock()
        self._groups: dict[int, Any] = {}
        self._branches: dict[tuple[int, int], Any] = {}

    def added(self, branch: Branch, now_s: float) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        group = branch.group
        if group.number not in self._groups:
            carrier = branch.request.trace_headers or {}
            self._groups[group.number] = self._tracer.start_span(
                "taper.request",
                context=TraceContextTextMapPropagator().extract(carrier),
                start_time=self._ns(group.arrival_s),
                attributes={"taper.request": group.number, "taper.tpot_slo_s": group.claims.slo.tpot_s},
            )
        self._branches[group.number, branch.number] = self._tracer.start_span(
            "taper.branch",
            context=trace.set_span_in_context(self._groups[group.number]),
            start_time=self._ns(now_s),
            attributes={
                "taper.request": group.number,
                "taper.branch": branch.number,
                "gen_ai.request.id": branch.request.request_id,
            },
        )

    def branch_ended(self, branch: Branch, now_s: float) -> None:
        span = self._branches.pop((branch.group.number, branch.number), None)
        if span is not None:
            span.set_attribute("gen_ai.usage.completion_tokens", len(branch.output_tokens))
            span.end(end_time=self._ns(now_s))

    def closed(self, group: Group, met: bool | None, now_s: float) -> None:
        """`met` None: it was aborted, or has no time per token."""
        span = self._groups.pop(group.number, None)
        if span is None:
            return
        span.set_attribute("taper.branches", group.ended_branches)
        span.set_attribute("gen_ai.usage.completion_tokens", group.ended_tokens)
        if not math.isnan(group.first_token_s):
            span.set_attribute("gen_ai.latency.time_to_first_token", group.first_token_s - group.arrival_s)
            span.add_event("first token", timestamp=self._ns(group.first_token_s))
        if met is not None:
            span.set_attribute("taper.slo_met", met)
        span.end(end_time=self._ns(now_s))

    def _ns(self, at_s: float) -> int:
        return int((at_s + self._offset_s) * NS_PER_S)


def spans_for(endpoint: str | None, clock: Callable[[], float]) -> Spans | None:
    """None where vLLM traces nothing. vLLM's engine process has set up the exporter by then."""
    if endpoint is None:
        return None
    from opentelemetry import trace

    return Spans(trace.get_tracer(INSTRUMENT), clock)

"""Requests and branches as spans, where vLLM traces."""

from __future__ import annotations

import pytest

from taper.engines.vllm.spans import Spans, spans_for
from tests.vllm import harness
from tests.vllm.harness import fork, request

pytestmark = pytest.mark.vllm

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def traced(request, monkeypatch, tmp_path):
    """(driver, exporter)"""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")  # vLLM brings it, and traces only with it
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    driver = harness.make(monkeypatch, tmp_path, is_async=request.param)
    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    driver.taper.onlooker.spans = Spans(provider.get_tracer("taper"), driver.taper.clock)
    return driver, exporter


def test_a_request_is_a_span_and_its_branches_are_its_children(traced):
    driver, exporter = traced
    children = fork("p", 3, tokens=12)
    for child in children:
        child.trace_headers = {"traceparent": PARENT}
    driver.add(*children, request("s", tokens=5))
    driver.run()
    spans = exporter.get_finished_spans()
    forked, serial = (
        next(span for span in spans if span.name == "taper.request" and span.attributes["taper.request"] == number)
        for number in (1, 2)
    )
    assert forked.context.trace_id == int(PARENT.split("-")[1], 16)
    assert forked.parent.span_id == int(PARENT.split("-")[2], 16)
    assert serial.parent is None
    assert forked.attributes["taper.branches"] == 3
    assert forked.attributes["gen_ai.usage.completion_tokens"] == 36
    assert forked.attributes["taper.slo_met"] is True
    branches = [span for span in spans if span.name == "taper.branch" and span.attributes["taper.request"] == 1]
    assert {span.parent.span_id for span in branches} == {forked.context.span_id}
    assert sorted(span.attributes["gen_ai.request.id"] for span in branches) == ["0_p", "1_p", "2_p"]
    assert sorted(span.attributes["taper.branch"] for span in branches) == [0, 1, 2]
    for span in branches:
        assert forked.start_time <= span.start_time < span.end_time <= forked.end_time
    assert driver.taper.fallbacks == 0


def test_an_aborted_request_ends_its_spans(traced):
    driver, exporter = traced
    driver.add(*fork("p", 2, tokens=50))
    for _ in range(5):
        driver.step()
    driver.abort("0_p", "1_p")
    names = sorted(span.name for span in exporter.get_finished_spans())
    assert names == ["taper.branch", "taper.branch", "taper.request"]
    (whole,) = [span for span in exporter.get_finished_spans() if span.name == "taper.request"]
    assert "taper.slo_met" not in whole.attributes


def test_without_vllms_endpoint_there_are_none(monkeypatch, tmp_path):
    assert spans_for(None, lambda: 0.0) is None
    assert harness.make(monkeypatch, tmp_path, is_async=False).taper.onlooker.spans is None

"""A server with two API processes, tracing and an API key: equal figures, spans, and nothing without the key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from taper.client import by_protocol
from taper.engines.vllm.launch import Server
from taper.model import embedded_model
from tests.waiting import eventually

pytestmark = pytest.mark.engine

BRANCHES, TOKENS, REQUESTS = 4, 16, 6
KEY = "a-key"
STAGE = {"branches": 2, "tokens": 2}


class Collector:
    """An OTLP endpoint over HTTP that keeps every span."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in body.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def pair(collector, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("pair") / "vllm.log"
    args = ("--api-server-count", "2", "--api-key", KEY, "--otlp-traces-endpoint", collector.url)
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with Server(str(embedded_model()), args, embedded=True, log=log, env=env) as running:
        yield running


def attribute(span, name):
    (value,) = [one.value for one in span.attributes if one.key == name]
    return value.int_value or value.string_value


def scrape(server):
    with server.client(timeout=60) as http:
        text = http.get("/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def figures(server):
    """Branching requests that ended, and vLLM's own generated tokens, summed over both processes: of eight readings."""
    found = set()
    for _ in range(8):
        samples = scrape(server)
        assert {one.labels["engine"] for one in samples if one.name == "taper:num_groups"} == {"0"}
        ended = [
            one.value for one in samples if one.name == "taper:requests_total" and one.labels["class"] == "branching"
        ]
        tokens = [one.value for one in samples if one.name == "vllm:generation_tokens_total"]
        found.add((sum(ended), sum(tokens)))
    return found


def test_both_processes_give_the_same_figures_and_spans_arrive(pair, collector):
    model = None
    for _ in range(REQUESTS):  # a connection each, so that both processes get some
        with pair.client(timeout=60) as http:
            model = model or http.get("/v1/models").json()["data"][0]["id"]
            body = {"model": model, "prompt": "Once", "n": BRANCHES, "max_tokens": TOKENS, "ignore_eos": True}
            http.post("/v1/completions", json=body).raise_for_status()
    wanted = {(REQUESTS, REQUESTS * BRANCHES * TOKENS)}
    eventually(lambda: figures(pair), lambda found: found == wanted)  # either asks the engine anew only now and then

    def spans():
        return collector.named("taper.request"), collector.named("taper.branch")

    requests, branches = eventually(spans, lambda found: len(found[0] + found[1]) >= REQUESTS * (1 + BRANCHES))
    assert [attribute(span, "taper.branches") for span in requests] == [BRANCHES] * REQUESTS
    assert len(branches) == REQUESTS * BRANCHES
    assert {span.parent_span_id for span in branches} == {span.span_id for span in requests}


def test_programs_are_summed_over_both_processes(pair):
    profile = {"lead_tokens": 8, "stages": [{"branches": 2, "tokens": 8, "then_tokens": 4}]}
    body = {"messages": [{"role": "user", "content": "Hi"}], **by_protocol("scripted", options=profile)}
    reused = 0
    for _ in range(REQUESTS):
        with pair.client(timeout=60) as http:
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        usage = answer["usage"]["taper"]
        reused += sum(fork["cached_tokens"] for fork in usage["forks"])
    model = answer["model"]
    for _ in range(8):
        found = {one.name: one for one in scrape(pair) if one.name.startswith("taper:program_")}
        assert found["taper:program_complete_total"].value == REQUESTS
        assert found["taper:program_forked_branches_total"].value == 2 * REQUESTS
        assert found["taper:program_fork_cached_tokens_total"].value == reused
        assert {tuple(one.labels.items()) for one in found.values()} == {(("model_name", model),)}


@pytest.mark.parametrize("path", ["/v1/taper/programs", "/v1/taper/chat", "/v1/chat/completions"])
def test_fork_and_join_need_the_key(pair, path):
    """Also where the switch turns a chat completion into a program."""
    messages = [{"role": "user", "content": "Count."}]
    chat = {"messages": messages, "taper": {"protocol": "scripted", "options": {"stages": [STAGE]}}}
    body = {"messages": messages, "branches": [{"max_tokens": 2}] * 2} if path.endswith("programs") else chat
    headers = [{}, {"Authorization": "Bearer another"}, {"Authorization": f"Bearer {KEY}"}]
    found = [
        httpx.post(f"{pair.url}{path}", json=body, headers=given, timeout=60, trust_env=False).status_code
        for given in headers
    ]
    assert found == [401, 401, 200]

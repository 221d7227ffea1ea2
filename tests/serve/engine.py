"""A stand-in for a TAPER server: the routes a calibration uses, over a machine that obeys a given law exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from taper.core.latency import LinearLatency

TOKEN = "let-me-in"
KEY = {"model": "m", "dtype": "bfloat16", "device": "toy x1", "parallel": "tp1-pp1-dp1", "vllm": "0.32.0"}
FACTS = {
    "key": KEY,
    "capture_sizes": [],
    "max_rows": 64,
    "max_model_tokens": 1024,
    "max_step_tokens": 256,
    "block_tokens": 32,
    "kv_tokens": 50_000,
}


@dataclass(slots=True)
class Machine:
    law: LinearLatency
    facts: dict[str, Any] = field(default_factory=lambda: dict(FACTS))
    policy: str = "taper"
    profile: dict[str, Any] | None = None
    fail_completions: bool = False
    policies_seen: list[str] = field(default_factory=list)  # in force while prompts ran
    records: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def state(self) -> dict[str, Any]:
        return {"engines": [{"policy": self.policy, "tpot_slo_s": 0.05, "engine": self.facts}]}

    def complete(self, model: str, prompt: list[list[int]], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        """Prompts of one token beyond whole blocks decode at once; longer rests are prefilled on their own."""
        assert model == "served"
        assert sampling == {"ignore_eos": True, "temperature": 0.0}
        if len(prompt[0]) % self.facts["block_tokens"] != 1:
            self.step(0, 0, len(prompt[0]))
        for step in range(max_tokens):
            self.step(len(prompt), sum(map(len, prompt)) + len(prompt) * step, 0)
        return {"choices": []}

    def step(self, rows: int, context: int, prefill: int) -> None:
        seconds = self.law.predict(rows, context, prefill)
        with self.lock:
            self.policies_seen.append(self.policy)
            self.records.append(
                {
                    "rows": rows,
                    "context_tokens": context,
                    "prefill_tokens": prefill,
                    "measured_s": seconds,
                    "ending": "clean",
                }
            )

    def answer(self, path: str, token: str | None, body: Any) -> tuple[int, dict[str, Any]]:
        if path.startswith("/v1/taper/") and token != TOKEN:
            return 403, {"error": {"message": "needs the control token"}}
        if path == "/v1/completions" and self.fail_completions:
            return 500, {"error": {"message": "out of luck"}}
        routes = {
            "/taper/state": self.state,
            "/v1/models": lambda: {"data": [{"id": "served"}]},
            "/v1/completions": lambda: self.complete(**body),
            "/v1/taper/control": lambda: self.configure(**body),
            "/v1/taper/steps": lambda: {"engines": [self.drain()]},
        }
        return (200, routes[path]()) if path in routes else (404, {"detail": "Not Found"})

    def configure(self, policy: str | None = None, profile: dict[str, Any] | None = None) -> dict[str, Any]:
        self.policy = policy or self.policy
        self.profile = profile or self.profile
        return self.state()

    def drain(self) -> list[dict[str, Any]]:
        with self.lock:
            drained, self.records = self.records, []
        return drained


@contextmanager
def serving(machine: Machine) -> Iterator[str]:
    """Serve `machine` on a loopback port; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, answer = machine.answer(self.path, self.headers.get("X-Taper-Control"), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = handle_one

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

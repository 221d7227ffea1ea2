"""The server as a child process. A tiny Python program stands for vLLM where the child's behaviour matters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from taper.config import ENV_VAR, ServerConfig
from taper.core.types import ConfigError
from taper.engines.vllm import command
from taper.engines.vllm.launch import CONTROL_HEADER, Server, ServerError, answer_of, check_port, free_port
from tests.waiting import eventually

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(command.vllm_distribution() is None, reason="needs vLLM"),
]

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def child(server: Server, program: str) -> Server:
    """The same server with another program in place of vLLM."""
    server.argv = [sys.executable, "-c", program, str(server.port)]
    return server


def wait_for(path: Path) -> str:
    return eventually(path.read_text, bool)


def test_the_command_and_configuration_of_a_server() -> None:
    config = ServerConfig(policy="cap:3")
    server = Server("m", ["--seed", "1"], config=config)
    assert server.argv[0] == sys.executable
    assert server.argv[-4:] == ["--scheduler-cls", command.SCHEDULER, "--middleware", command.MIDDLEWARE]
    assert server.url == f"http://127.0.0.1:{server.port}"
    sent = json.loads(server.env[ENV_VAR])
    assert sent["policy"] == "cap:3"
    assert server.control_headers == {CONTROL_HEADER: sent["control_token"]}
    assert len(sent["control_token"]) >= 32
    assert Server("m").control_headers != server.control_headers
    assert "control_token" not in " ".join(server.argv)


def test_a_stock_server_knows_nothing_of_taper() -> None:
    server = Server("m", stock=True, env={ENV_VAR: "{}"})
    assert "taper" not in " ".join(server.argv[1:])
    assert ENV_VAR not in server.env
    assert "taper" not in server.env["VLLM_PLUGINS"].split(",")


def test_the_users_address_wins() -> None:
    server = Server("m", ["--host", "0.0.0.0", "--port=18999"], port=1)
    assert server.url == "http://127.0.0.1:18999"
    assert server.argv.count("--host") == 1
    assert not any(arg == "--port" for arg in server.argv)


def test_an_api_key_goes_with_control_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Server("m", ["--api-key", "k"]).control_headers["Authorization"] == "Bearer k"
    monkeypatch.setenv("VLLM_API_KEY", "from-env")
    assert Server("m").control_headers["Authorization"] == "Bearer from-env"


def test_what_stands_in_vllms_config_file_is_known(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 18999\nhost: 0.0.0.0\napi-key: [k, other]\nssl-keyfile: key.pem\nenforce-eager: true\n")
    server = Server("m", ["--config", str(file)])
    assert server.url == "https://127.0.0.1:18999"
    assert server.control_headers["Authorization"] == "Bearer k"
    assert not {"--port", "--host"} & set(server.argv)
    assert Server("m", ["--config", str(file), "--port", "18998"]).url == "https://127.0.0.1:18998"
    file.write_text("uds: socket\n")
    with pytest.raises(ConfigError, match="--uds does not go with taper serve"):
        Server("m", ["--config", str(file)])


@pytest.mark.parametrize(
    "content", [None, "- port", "port: [", "8000", "", "since: 2020-99-99", "[" * 9999], ids=range(7)
)
def test_a_config_file_that_is_none(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "serve.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"^--config {file}: [^\n]+$"):
        Server("m", ["--config", str(file)])


def test_start_ready_and_stop(tmp_path: Path) -> None:
    with child(Server("m", log=tmp_path / "log"), HEALTHY) as server:
        assert server.poll() is None
        assert server.client().get("/health").status_code == 200
    assert server.poll() == -15
    assert server.stop() == -15  # again, and nothing happens
    check_port("127.0.0.1", server.port)


def test_it_has_a_group_of_its_own_in_our_session(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = child(Server("m", log=log), "import os; print(os.getpid(), os.getpgrp(), os.getsid(0))")
    server.start()
    process, group, session = map(int, eventually(log.read_text, lambda text: "\n" in text).split())
    server.stop()
    assert (group, session) == (process, os.getsid(0))


def test_a_child_that_dies_early_says_why_on_one_line(tmp_path: Path) -> None:
    program = "import sys; print('ValueError: no such block size'); print('RuntimeError: see root cause'); sys.exit(3)"
    log = tmp_path / "log"
    with pytest.raises(ServerError) as caught, child(Server("m", log=log), program):
        pass
    assert str(caught.value) == (
        f"the vLLM server exited with status 3 while starting: ValueError: no such block size (its output: {log})"
    )


def test_a_child_that_is_never_ready(tmp_path: Path) -> None:
    server = child(Server("m", log=tmp_path / "log"), DEAF)
    server.start()
    wait_for(tmp_path / "log")  # before that, SIGTERM would end it
    try:
        with pytest.raises(ServerError, match="not ready within 0 s"):
            server.wait_ready(timeout_s=0.3)
    finally:
        assert server.stop(grace_s=0.3) == -9


def test_workers_do_not_outlive_their_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = child(Server("m", log=log), PARENT)
    server.start()
    worker = int(wait_for(log))
    server.stop()
    eventually(lambda: is_running(worker), lambda running: not running)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_taken_port_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*--port"):
            Server("m", port=port, log=tmp_path / "log").start()


def test_free_ports_are_free() -> None:
    check_port("127.0.0.1", free_port())


def answer(status: int, body: object) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return httpx.Response(status, text=content, request=httpx.Request("POST", "http://x/v1/taper/control"))


def test_answers_of_the_control_routes() -> None:
    assert answer_of(answer(200, {"engines": []})) == {"engines": []}
    for status, body, words in (
        (400, {"error": {"message": "unknown policy 'x'"}}, "HTTP 400: unknown policy 'x'"),
        (403, {"error": "no"}, "HTTP 403: no"),
        (404, {"detail": "Not Found"}, "no TAPER on this server"),
        (500, "<html>", "HTTP 500: <html>"),
        (200, [], "HTTP 200"),
    ):
        with pytest.raises(ServerError, match=words):
            answer_of(answer(status, body))


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    server = Server("m", log=tmp_path / "log")
    with pytest.raises(ServerError, match="GET /taper/state: "):
        server.state()
    assert os.listdir(tmp_path) == []


OWNER = """
import sys, time
from pathlib import Path
from taper.engines.vllm.launch import Server, exit_on_sigterm
exit_on_sigterm()
server = Server("m", log=Path(sys.argv[1]))
server.argv = [sys.executable, "-c", sys.argv[2], str(server.port)]
with server:
    print(server._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_terminated_owner_takes_its_server_with_it(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log"), HEALTHY], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.terminate()
    assert owner.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    owner.stdout.close()

"""A vLLM server as a child process, with TAPER on or plain.

Used by `taper serve`, `taper calibrate`, `taper demo` and the engine tests. Nothing here imports vLLM: the
supervisor stays light, and a broken engine install shows up as the child's error, not as ours.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.engines.vllm import command

READY_TIMEOUT_S = 900.0
STOP_GRACE_S = 20.0
POLL_S = 0.2
CAUSE = re.compile(r"\b\w*(?:Error|Exception|Interrupt)\b: .+")
NOT_THE_CAUSE = re.compile(r"root cause|Engine core initialization failed|leaked")
CONTROL_HEADER = "X-Taper-Control"


class ServerError(RuntimeError):
    """The server did not start, died, or refused a control request; the message says which and why."""


class Server:
    """One vLLM server. As a context manager it starts on entry (and is ready then) and stops on exit.

    vllm_args: any flags of `vllm serve`, its --config included; they win over the embedded defaults.
    stock: plain vLLM, without any of TAPER, as a baseline.
    embedded: fill in what suits the small embedded model, where `vllm_args` and the environment say nothing.
    port: None takes `--port` from `vllm_args`, else a free one.
    log: file for the server's output; None lets it through to ours.

    Raises `ConfigError` from the constructor for arguments that cannot work, `ServerError` afterwards.
    """

    def __init__(
        self,
        model: str,
        vllm_args: Sequence[str] = (),
        *,
        config: ServerConfig | None = None,
        stock: bool = False,
        embedded: bool = False,
        port: int | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        environ = {**os.environ, **(env or {})}
        token = (config.control_token if config else None) or secrets.token_urlsafe(24)
        secret = (config.group_secret if config else None) or secrets.token_urlsafe(24)
        self.config = replace(config or ServerConfig(), control_token=token, group_secret=secret)
        self.model = model
        self.stock = stock
        self.log = log
        args = command.embedded_args(vllm_args) if embedded else list(vllm_args)
        known = command.with_file(args)
        command.check_args(known, stock=stock)
        host, port = command.address(known, port)
        self.port = port or free_port()
        if not command.value_of(known, "--port"):
            args += ["--port", str(self.port)]
        if host is None:
            host = "127.0.0.1"
            args += ["--host", host]
        self.url = f"{command.scheme(known)}://{command.connect_host(host)}:{self.port}"
        self.argv = [sys.executable, *command.server_command(model, args, stock=stock)]
        self.env = command.child_env(
            environ,
            config=None if stock else self.config.to_json(),
            embedded=embedded,
            workers=command.local_workers(known),
        )
        self._host = host
        self._api_key = command.value_of(known, "--api-key") or environ.get("VLLM_API_KEY")
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the child; returns at once. Raises `ConfigError` if the port is taken."""
        check_port(self._host, self.port)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._log_file = self.log.open("wb")
        self._process = subprocess.Popen(
            self.argv,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT if self._log_file else None,
            # Workers die with it, and Ctrl-C reaches it through us alone. Not a session of its own: Linux shares out
            # processors by session (autogroup), and beside an engine that spins on sched_yield others wait for seconds.
            process_group=0,
        )

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Block until /health answers. Raises `ServerError` when the child exits first or time runs out."""
        deadline = time.monotonic() + timeout_s
        with self.client(timeout=5.0) as client:
            while time.monotonic() < deadline:
                status = self.poll()
                if status is not None:
                    raise ServerError(f"the vLLM server exited with status {status} while starting{self._reason()}")
                try:
                    if client.get("/health").status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL_S)
        raise ServerError(f"the vLLM server was not ready within {timeout_s:.0f} s{self._reason()}")

    def stop(self, grace_s: float = STOP_GRACE_S) -> int | None:
        """Ask the server to end, then make it; returns its exit status. Safe to call again."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
        _signal_group(process.pid, signal.SIGKILL)  # workers that outlived their parent
        if self._log_file is not None:
            self._log_file.close()
        return process.returncode

    def poll(self) -> int | None:
        """The exit status, or None while the server runs."""
        return self._process.poll() if self._process is not None else None

    def send_signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @property
    def control_headers(self) -> dict[str, str]:
        """Headers that carry the right to change policy, read steps, and pass the server's own API key."""
        headers = {CONTROL_HEADER: self.config.control_token or ""}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return headers

    def client(self, timeout: float = 120.0) -> httpx.Client:
        """A client of this server, with every right; proxies of the environment are left out of it."""
        return httpx.Client(
            base_url=self.url,
            headers=self.control_headers,
            timeout=timeout,
            trust_env=False,
            verify=False,  # noqa: S501 - our own child on this machine, under a name its certificate need not have
        )

    def state(self) -> dict[str, Any]:
        """`GET /taper/state`. Raises `ServerError` if it is not there."""
        return self._call("GET", "/taper/state")

    def configure(self, patch: Mapping[str, Any]) -> dict[str, Any]:
        """Change policy, SLO, knobs or profile of the running engine; returns the new state."""
        return self._call("POST", "/v1/taper/control", json=dict(patch))

    def drain_steps(self) -> dict[str, Any]:
        """Step records since the last call, per engine."""
        return self._call("GET", "/v1/taper/steps")

    def _call(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            with self.client() as client:
                return answer_of(client.request(method, path, **kwargs))
        except httpx.TransportError as error:
            raise ServerError(f"{method} {path}: {error or type(error).__name__}{self._reason()}") from error

    def _reason(self) -> str:
        """What the server's output gives as the reason, on one line."""
        if self.log is None:
            return "; its output above says why"
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        causes = [found.group() for line in lines if (found := CAUSE.search(line)) and not NOT_THE_CAUSE.search(line)]
        last = causes[-1] if causes else next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f": {last[:300]} (its output: {self.log})"


def exit_on_sigterm() -> None:
    """From now on SIGTERM is an ordinary exit of this process: servers have process groups of their own and
    would outlive it, were their context managers not left."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a control route's answer, or `ServerError` with the server's own words."""
    where = f"{response.request.method} {response.request.url.path}"
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if response.status_code == httpx.codes.NOT_FOUND:
        message = "no TAPER on this server (start it with taper serve, or name taper in VLLM_PLUGINS)"
    raise ServerError(f"{where}: HTTP {response.status_code}: {message or response.text[:200]}")


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if nothing could listen there: vLLM finds out only after loading the model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from error


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)

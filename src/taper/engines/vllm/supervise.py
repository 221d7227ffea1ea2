"""`taper serve`: one vLLM server, its profile, and its signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import FrameType

from rich.console import Console

from taper.config import ServerConfig
from taper.core.types import ConfigError
from taper.engines.vllm import report
from taper.engines.vllm.calibrate import START_BUDGET_S, Progress, calibrate, engine_key, spot_check
from taper.engines.vllm.command import DEFAULT_PORT, server_command, vllm_distribution
from taper.engines.vllm.launch import Server, ServerError
from taper.profile import Profile, ProfileKey, find_profile, load_profile, model_identity, save_profile

AUTO, SKIP = "auto", "skip"
FURTHEST_OFF = 2.0  # measured / predicted, either way, beyond which a cached profile is made anew
STOP_GRACE_S = 30.0
POLL_S = 0.2
ENDED_BY_ITSELF_STATUS = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a closed terminal must not leave an engine behind


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `taper serve` was told. `profile`: "auto", "skip" or the path of a profile file."""

    model: str
    embedded: bool
    vllm_args: Sequence[str] = ()
    config: ServerConfig = field(default_factory=ServerConfig)
    profile: str = AUTO
    calibration_s: float = START_BUDGET_S


def serve(options: ServeOptions, console: Console) -> int:
    """Run the server until it ends or a signal ends it; returns the exit status, the server's own.

    A vLLM whose engine died ends with status 0. Here that is 1, so that whoever restarts what failed does.

    Raises `ConfigError` before or, for a profile of another machine, after the engine start.
    """
    check_profile_file(options)
    server = Server(
        options.model,
        options.vllm_args,
        config=options.config,
        embedded=options.embedded,
        port=DEFAULT_PORT,
    )
    with _forwarded_signals(server) as stop:
        try:
            server.start()
            if stop:  # it came while there was nobody to pass it on to
                server.send_signal(signal.SIGTERM)
            server.wait_ready()
            profile, how = obtain_profile(
                server, options.profile, budget_s=options.calibration_s, progress=lambda line: _say(console, line)
            )
            _announce(server, options, profile, how, console)
            _wait(server, stop)
            if not stop:
                _fail(console, f"the vLLM server ended by itself, with status {_exit_status(server.poll())}")
        except ServerError as error:
            ended = server.poll()
            if ended is None and not stop:
                raise
            if not stop:
                _fail(console, str(error))
        finally:
            status = _stopped(server, stop, console)
    return _exit_status(status) or (0 if stop else ENDED_BY_ITSELF_STATUS)


def obtain_profile(
    server: Server, choice: str = AUTO, *, budget_s: float = START_BUDGET_S, progress: Progress | None = None
) -> tuple[Profile | None, str]:
    """Put the right profile into a running server; returns it and, in one phrase, where it came from.

    "auto": the cached profile of exactly this engine if a spot check bears it out, else a calibration, which is
    saved. "skip": none; the engine stays at width 2 until it has learned the law from its own steps. Otherwise
    the path of a file.
    Raises `ConfigError` for a foreign or broken file named by the user, `ServerError` if the server fails. A
    broken file in the cache is replaced.
    """
    say = progress or (lambda line: None)
    if choice == SKIP:
        return None, "none: at most two branches per request until enough steps were seen, then learned online"
    key = engine_key(server.state())
    if choice != AUTO:
        profile, how = load_profile(choice, expected=key), f"from {choice}"
    else:
        cached = _cached(server, key, say)
        if cached is None:
            return _calibrated(server, key, budget_s, say)
        profile, how = cached, f"cached, made {cached.created}"
    server.configure({"profile": profile.to_json()})
    return profile, f"{how}, {report.error_line(profile.fit)}"


def _calibrated(server: Server, key: ProfileKey, budget_s: float, say: Progress) -> tuple[Profile | None, str]:
    say(f"no profile for {key}; calibrating for about {budget_s:.0f} s")
    try:
        done = calibrate(server.url, server.control_headers, budget_s=budget_s, progress=say)
    except ConfigError as error:  # no room, too few steps: no reason not to serve
        return None, f"none, learning online at width 2: {error}"
    try:
        kept = str(save_profile(done.profile))
    except ConfigError as error:
        kept = f"not kept: {error}"
    return done.profile, f"calibrated in {done.seconds:.0f} s, {report.error_line(done.profile.fit)}; {kept}"


def _cached(server: Server, key: ProfileKey, say: Progress) -> Profile | None:
    """The cached profile, unless it is broken or was made when the machine was another (busy, throttled)."""
    try:
        profile = find_profile(key)
        if profile is None:
            return None
        ratio = spot_check(server.url, server.control_headers, profile.latency())
    except ConfigError as error:
        say(f"{error} (it is replaced)")
        return None
    if not 1 / FURTHEST_OFF <= ratio <= FURTHEST_OFF:
        say(f"the cached profile of {profile.created} is off: steps take {ratio:.2f} times what it says")
        return None
    return profile


def check_profile_file(options: ServeOptions) -> None:
    """Refuse what is plainly wrong with a profile file before an engine is started for it."""
    if options.profile in (AUTO, SKIP):
        return
    profile = load_profile(options.profile)
    distribution = vllm_distribution()
    here = version(distribution) if distribution else None
    model = model_identity(options.model)
    for name, theirs, ours in (("model", profile.key.model, model), ("vLLM", profile.key.vllm, here)):
        if ours is not None and theirs != ours:
            raise ConfigError(
                f"profile {options.profile}: belongs to {profile.key}, but this server's {name} is {ours}; "
                "run taper calibrate"
            )


def _announce(server: Server, options: ServeOptions, profile: Profile | None, how: str, console: Console) -> None:
    law = profile.latency() if profile else None
    _say(console, "TAPER is on")
    for line in report.decisions(server.state()["engines"][0], url=server.url, how=how, law=law):
        _say(console, f"  {line}")
    _say(console, f"  plain    {report.plain_line(server_command(options.model, [], stock=False), options.config)}")


def _wait(server: Server, stop: list[int]) -> None:
    """Until the server is gone or a signal came."""
    while server.poll() is None and not stop:
        time.sleep(POLL_S)


def _stopped(server: Server, stop: list[int], console: Console) -> int | None:
    """Its exit status. One that has its signal gets its grace and no second signal, which would cut that short."""
    deadline_s = time.monotonic() + STOP_GRACE_S
    while stop and server.poll() is None and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    if stop and server.poll() is None:
        _fail(console, f"the vLLM server did not stop within {STOP_GRACE_S:.0f} s and is killed")
    return server.stop(0.0 if stop else STOP_GRACE_S)


@contextmanager
def _forwarded_signals(server: Server) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the server, and SIGHUP as SIGTERM; yields the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        server.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_status(returncode: int | None) -> int:
    """A process's return code as a shell would show it."""
    if returncode is None:
        return 1
    return 128 - returncode if returncode < 0 else returncode


def _fail(console: Console, reason: str) -> None:
    console.print(f"taper: {reason}", style="red", highlight=False, soft_wrap=True, markup=False)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)

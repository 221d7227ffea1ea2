"""Pack vLLM's CUDA build, what it imports and this package into one small archive, for a GPU machine without a network.

    python benchmarks/gpu/bundle.py OUT.tar.xz [--arch 90] [--vllm 0.26.0]

The registry's wheel carries kernels for every generation of cards. Here each device image that is not for `--arch` is
overwritten with zeros inside the shared object, which keeps its layout and compresses to nothing: 304 MB become about
40. The other machine needs Python 3.12, the torch the wheel was built for (2.11 for vLLM 0.26), transformers and what
comes with them; it unpacks the archive and puts the folder on PYTHONPATH (see run.py).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from taper.model import embedded_model

PYTHON = ("3.12", "cp312")
GLIBC_MINORS = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)  # pip matches a platform tag exactly
KERNELS = (  # the shared objects a dense bf16 model needs on Hopper; the rest of the wheel's are left out
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/spinloop.abi3.so",
)
LEFT_OUT = re.compile(r"vllm/(third_party/(deep_gemm|fmha_sm100|flashmla)/|vllm-rs)|.*\.(so|jpg)$")
# What vLLM 0.26 imports beyond torch, transformers and the scientific packages.
PACKAGES = """
    annotated-types apache-tvm-ffi>=0.1.15 astor blake3 cachetools cbor2 compressed-tensors==0.17.0 depyf==0.20.0 dill
    distro fastapi<0.137 httpcore2 httpx2 ijson jiter jmespath lark==1.2.2 llguidance<1.8 loguru
    model-hosting-container-standards msgspec openai openai-harmony outlines_core==0.2.14 partial-json-parser
    prometheus-fastapi-instrumentator pybase64 pydantic pydantic_core python-json-logger pyzmq setproctitle sniffio
    starlette truststore typing-inspection uvicorn watchfiles xgrammar
"""

FATBIN_MAGIC = 0xBA55ED50
# The published shape of Qwen3-32B (its config.json): the weights are drawn at random where it is served.
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def fatbin_images(elf: bytearray) -> Iterator[tuple[int, int, int]]:
    """(architecture, offset, bytes) of every device image in the `.nv_fatbin` section of a 64-bit ELF file.

    Layout: a fat binary is a 16-byte header (magic, version, header size, size of what follows) and its images, each
    with a header of its own: header size (u32 at 4), payload size (u64 at 8), architecture (u32 at 28).
    """
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + index * entry_size) for index in range(entries)]
    names = sections[names_at][4]
    for name, _, _, _, start, size in sections:
        if elf[names + name : elf.index(0, names + name)] != b".nv_fatbin":
            continue
        at = start
        while at + 16 <= start + size:
            magic, _, header, length = struct.unpack_from("<IHHQ", elf, at)
            if magic != FATBIN_MAGIC:
                at += 8
                continue
            image, end = at + header, at + header + length
            while image < end:
                image_header, payload = struct.unpack_from("<IQ", elf, image + 4)
                yield struct.unpack_from("<I", elf, image + 28)[0], image + image_header, payload
                image += image_header + payload
            at = end


def prune(path: Path, arch: int) -> None:
    elf = bytearray(path.read_bytes())
    for found, offset, size in list(fatbin_images(elf)):
        if found != arch:
            elf[offset : offset + size] = bytes(size)
    path.write_bytes(elf)


def download(folder: Path, requirements: list[str]) -> None:
    """Binary wheels for the other machine, without their dependencies."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    version, abi = PYTHON
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder),
         f"--python-version={version}", "--implementation=cp", f"--abi={abi}", "--abi=abi3", "--abi=none",
         *platforms, "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", *requirements],
        check=True,
    )  # fmt: skip


def unpack_vllm(wheel: Path, site: Path, arch: int) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name in KERNELS or not LEFT_OUT.match(name):
                archive.extract(name, site)
    for name in KERNELS:
        prune(site / name, arch)


def write_model(folder: Path, tokenizer_from: Path) -> None:
    """The shape alone, with a tokenizer whose vocabulary is padded to the shape's: text is not what is measured."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B, indent=1))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_from / name, folder)
    tokenizer = json.loads((tokenizer_from / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), QWEN3_32B["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability x 10")
    parser.add_argument("--vllm", default="0.26.0")
    parser.add_argument("--wheels", type=Path, help="folder of wheels fetched before")
    options = parser.parse_args()
    repository = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as scratch:
        wheels, bundle = options.wheels or Path(scratch, "wheels"), Path(scratch, "bundle")
        site = bundle / "site"
        site.mkdir(parents=True)
        if options.wheels is None:
            download(wheels, [f"vllm=={options.vllm}", *PACKAGES.split()])
        own = Path(scratch, "own")
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(own), str(repository)], check=True
        )
        for wheel in sorted([*wheels.glob("*.whl"), *own.glob("*.whl")]):
            if wheel.name.startswith("vllm-"):
                unpack_vllm(wheel, site, options.arch)
            else:
                zipfile.ZipFile(wheel).extractall(site)
        write_model(bundle / "qwen3-32b", embedded_model())
        options.out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["tar", "-C", str(bundle), "-cf", str(options.out.resolve()), "--use-compress-program=xz -T0 -6", "."],
            check=True,
        )
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

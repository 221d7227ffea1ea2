"""Turn one GGUF checkpoint into a bfloat16 safetensors folder: `python -m taper.gguf_convert IN.gguf OUT`.

Run as a program of its own by `taper.model`, so that the memory goes back when it ends and a broken torch
companion package can only take this process down. `OUT` must be an empty folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CONTEXT_TOKENS_KEY = "max_position_embeddings"


def convert(gguf: Path, out: Path) -> None:
    """Write weights, configuration, tokenizer and chat template of `gguf` into the folder `out`."""
    import torch
    import transformers

    # Releases without GgufConfig always unpack the weights; those with it must be told to.
    packed = getattr(transformers, "GgufConfig", None)
    unpack = {} if packed is None else {"quantization_config": packed(gguf_file=gguf.name, dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack
    )
    model.save_pretrained(out)
    _save_tokenizer(gguf, out, context_tokens=int(getattr(model.config, CONTEXT_TOKENS_KEY)))


def _save_tokenizer(gguf: Path, out: Path, *, context_tokens: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if _pre_tokenizer_name(gguf) == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = context_tokens
    tokenizer.save_pretrained(out)
    # The class name that every transformers release knows: the folder is shared between environments.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _pre_tokenizer_name(gguf: Path) -> str | None:
    from gguf import GGUFReader

    entry = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return None if entry is None else str(entry.contents())


def _split_digits(tokenizer: Any) -> None:
    """The model was trained with one token per digit; GGUF says so only by the name of its pre-tokenizer."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def main(argv: list[str]) -> int:
    """Exit code 0, or a traceback."""
    if len(argv) != 3:
        print(f"usage: {argv[0]} IN.gguf OUT-FOLDER", file=sys.stderr)
        return 2
    convert(Path(argv[1]), Path(argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""GGUF -> an ordinary fp32 model folder.

A GGUF file holds a quantized model; transformers dequantizes it, here to fp32, where every Q4_1 value `d*q + m` is formed
once and deterministically. The result is a *dequantized 4-bit model*: its own figures are the ceiling in our tables, not
the figures published for the original weights.

Two faults of that reading are mended here:
- the configuration keeps `quantization_config`, and such a model refuses to be saved as what it now is: a plain model;
- a tokenizer of the `smollm` family loses its first pre-tokenizer, the one that splits numbers into single digits before
  the byte-level one sees them, so "a  1987" became other tokens than in training.
"""

from __future__ import annotations

import copy
import json
import mmap
import struct
from pathlib import Path
from typing import Any

import torch

from lbllm_core.errors import ModelError

CONVERSION = 1  # raise it when the result of `convert` changes: it is part of the digest
SINGLE_DIGITS = ("smollm",)  # values of tokenizer.ggml.pre whose numbers are split digit by digit


def convert(file: Path, folder: Path) -> None:
    """Write model.safetensors (fp32), config.json and the tokenizer of a GGUF file into `folder`. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{file} cannot be read as GGUF ({error}); use a safetensors folder of the model (model.source=folder)") from error
    if pre_tokenizer_name(file) in SINGLE_DIGITS:
        split_digits(tokenizer)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model.config = config
    for part in (model, getattr(model, "model", None)):
        for name in ("hf_quantizer", "quantization_method"):
            if part is not None and getattr(part, name, None) is not None:
                setattr(part, name, None)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)


def pre_tokenizer_name(file: Path) -> str:
    """The file's `tokenizer.ggml.pre`; empty when it has none.

    The header stores `key, type u32 (8: string), length u64, bytes`; the key is searched for instead of parsing the whole
    header, which takes the gguf package five seconds for a vocabulary of 49152.
    """
    key = b"tokenizer.ggml.pre"
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(struct.pack("<Q", len(key)) + key + struct.pack("<I", 8))
        if at < 0:
            return ""
        start = at + 8 + len(key) + 4
        (length,) = struct.unpack("<Q", data[start : start + 8])
        return data[start + 8 : start + 8 + min(length, 256)].decode("utf-8", "replace")


def split_digits(tokenizer: Any) -> None:
    """Put a single-digit splitter before the pre-tokenizer of a fast tokenizer, in place; once."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    present = json.loads(backend.to_str())["pre_tokenizer"]
    if '"Digits"' not in json.dumps(present):
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])

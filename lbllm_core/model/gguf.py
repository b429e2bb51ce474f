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
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbllm_core.errors import ModelError

CONVERSION = 1  # raise it when the result of `convert` changes: it is part of the digest
SINGLE_DIGITS = ("smollm",)  # values of tokenizer.ggml.pre whose numbers are split digit by digit


def convert(file: Path, folder: Path) -> None:
    """Write model.safetensors (fp32), config.json and the tokenizer of a GGUF file into `folder`. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_header(file)
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


@dataclass(frozen=True)
class Header:
    """Single values of a GGUF header by key (of arrays their length), and the number of weights of each tensor by name."""

    values: dict[str, Any]
    tensors: dict[str, int]


SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


def read_header(file: Path) -> Header:
    """The header of a GGUF file (version 2 or 3), in a fraction of a second. Raises ModelError when it is none or ends early.

    magic "GGUF", version u32, tensors u64, values u64; each value: key, type u32, content; each tensor: name, dimensions u32, their
    sizes u64, type u32, offset u64.
    """
    if file.stat().st_size < 24:
        raise ModelError(f"{file} is no GGUF file: it has {file.stat().st_size} bytes; fetch it again")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
            raise ModelError(f"{file} is no GGUF file of version 2 or 3 (it begins with {data[:8]!r}); fetch it again or look at model.file")
        try:
            return _read_entries(data)
        except (struct.error, IndexError, UnicodeDecodeError, ValueError, KeyError):
            raise ModelError(f"{file}: its GGUF header is damaged or cut off; fetch it again") from None


def _read_entries(data: mmap.mmap) -> Header:
    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)
    values: dict[str, Any] = {}
    tensors: dict[str, int] = {}
    at, end = 24, 0
    for _ in range(n_values):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        values[key], at = _value(data, at + 4, kind)
    for _ in range(n_tensors):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        tensors[name] = math.prod(struct.unpack_from(f"<{dimensions}Q", data, at + 4))
        at += 4 + 8 * dimensions
        end = max(end, struct.unpack_from("<IQ", data, at)[1])
        at += 12
    if at + end >= len(data):  # the last tensor begins behind the end of the file
        raise ValueError
    return Header(values, tensors)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    if at + 8 + length > len(data):
        raise ValueError
    return data[at + 8 : at + 8 + length].decode("utf-8", "replace"), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A value and where the next one begins; an array is passed over and gives its length."""
    if kind == STRING:
        return _string(data, at)
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in SCALARS:
            return count, at + count * struct.calcsize(SCALARS[inner])
        for _ in range(count):
            _, at = _value(data, at, inner)
        return count, at
    return struct.unpack_from(SCALARS[kind], data, at)[0], at + struct.calcsize(SCALARS[kind])


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

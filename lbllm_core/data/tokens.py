"""Tokens: documents -> windows `(sequences, seq_len)`, and the digests that make a cached step notice other data.

Documents are put in an order that the seed decides, encoded one by one without special tokens, joined with two newlines,
and cut into sequences without overlap; only as many documents are encoded as are needed. A model trained with a BOS token
(`model.add_bos`) gets one at the start of each sequence, which then holds seq_len - 1 tokens of text.

There is no substitute for missing text: too little of it is an error that names both numbers.

Every step of a run wants the same windows, and encoding a million tokens takes longer than many a step's work on a GPU: within a process
they are remembered by what decides them (tokenizer, file contents, config).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbllm_core.config import DatasetConfig, ModelConfig, RunConfig
from lbllm_core.data import text
from lbllm_core.data.synthetic import Language
from lbllm_core.errors import DataError
from lbllm_core.model.load import tiny_seed
from lbllm_core.model.store import file_digest

SELECTION = 1  # raise it when other tokens are chosen from the same files: it is part of the digest
JOINT = "\n\n"
CALIBRATION_STREAM = 1_000  # synthetic text: stream 0 trains tiny, 1000 + seed calibrates, EVALUATION_STREAM evaluates
EVALUATION_STREAM = 999


@dataclass(frozen=True)
class _Windows:
    """Windows by what decides them; equal ones are made once in a process."""

    key: str
    make: Callable[[], Tensor] = field(compare=False)


@functools.lru_cache(maxsize=8)
def _made(windows: _Windows) -> Tensor:
    return windows.make()


def remembered(tokenizer: Any, facts: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it made in this process for the same tokenizer and facts. Tokenizers that cannot be written as text are not told apart: no memory."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return make()
    key = hashlib.sha256(json.dumps([backend.to_str(), [str(fact) for fact in facts]]).encode()).hexdigest()
    return _made(_Windows(key, make)).clone()


def encode(tokenizer: Any, documents: Iterable[str], joint: str = JOINT) -> Iterator[list[int]]:
    """Token ids of each document followed by the joint, without special tokens, 64 documents at a time."""
    batch: list[str] = []
    for document in documents:
        batch.append(document + joint)
        if len(batch) == 64:
            yield from _encode_batch(tokenizer, batch)
            batch = []
    if batch:
        yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: Any, batch: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return found


def cut(ids: Sequence[int], length: int, bos: int | None) -> Tensor:
    """Windows `(n, length)` without overlap; with a `bos` each holds it and length - 1 tokens. A short rest is left out."""
    step = length if bos is None else length - 1
    count = len(ids) // step
    windows = torch.tensor(ids[: count * step], dtype=torch.long).reshape(count, step)
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], 1)


def bos_of(model: ModelConfig, tokenizer: Any) -> int | None:
    """The token that windows start with, or None. Raises DataError when the tokenizer has none."""
    if not model.add_bos:
        return None
    if tokenizer.bos_token_id is None:
        raise DataError(f"model.add_bos is set, but the tokenizer of {model.name} has no BOS token; set model.add_bos=false")
    return int(tokenizer.bos_token_id)


def require_context(config: RunConfig, tokenizer: Any) -> None:
    """DataError when the sequences are longer than what the loaded model was trained with."""
    context = min(config.model.context, int(tokenizer.model_max_length))
    if config.dataset.seq_len > context:
        raise DataError(f"dataset.seq_len={config.dataset.seq_len} is longer than the {context} tokens of {config.model.name}'s context; lower it")


def calibration_tokens(config: RunConfig, tokenizer: Any, home: Path | None = None) -> Tensor:
    """Token ids `(dataset.sequences, dataset.seq_len)`, int64, decided by config and seed. Raises DataError when too short.

    `home` is where self-generated text is kept; the other sources do not need it.
    """
    data = config.dataset
    require_context(config, tokenizer)
    if data.source == "self_generated":
        return _self_generated(config, home)
    bos = bos_of(config.model, tokenizer)
    facts = ("calibration", data, data_digest(data), config.seed, tiny_seed(config.model) if config.model.source == "synthetic" else "", bos)
    ids = remembered(tokenizer, facts, lambda: _cut_text(config, tokenizer, bos))
    return torch.cat([ids, _self_generated(config, home)]) if data.generated else ids


def _cut_text(config: RunConfig, tokenizer: Any, bos: int | None) -> Tensor:
    data = replace(config.dataset, sequences=config.dataset.sequences - config.dataset.generated)
    config = replace(config, dataset=data)
    wanted = data.sequences * (data.seq_len - (bos is not None))
    ids = _synthetic_ids(config, tokenizer, wanted) if data.source == "synthetic" else _document_ids(config, tokenizer, wanted)
    if len(ids) < wanted:
        raise DataError(
            f"dataset {data.name} gives {len(ids)} tokens, {wanted} are needed ({data.sequences} sequences of {data.seq_len}); "
            "add files, lower dataset.sequences or dataset.seq_len, or let the teacher write the rest (dataset.generated)"
        )
    return cut(ids[:wanted], data.seq_len, bos)


def _self_generated(config: RunConfig, home: Path | None) -> Tensor:
    from lbllm_core.data.self_generated import generated_tokens  # imported late: it reads tokens of this module

    if home is None:
        raise DataError("self-generated text is kept in a home folder; call calibration_tokens with one")
    return generated_tokens(config, home)


def _synthetic_ids(config: RunConfig, tokenizer: Any, wanted: int) -> list[int]:
    language = Language(tiny_seed(config.model) if config.model.source == "synthetic" else 0)
    rows, length = config.dataset.sequences, config.dataset.seq_len
    ids: list[int] = []
    for part in range(64):  # one part is enough when a symbol is a token; other tokenizers merge symbols
        ids += _encode_batch(tokenizer, [language.text(rows, length, (CALIBRATION_STREAM + config.seed) * 64 + part)])[0]
        if len(ids) >= wanted:
            break
    return ids


def _document_ids(config: RunConfig, tokenizer: Any, wanted: int) -> list[int]:
    documents = text.calibration_documents(config.dataset)
    order = np.random.default_rng([config.seed, 3]).permutation(len(documents))
    ids: list[int] = []
    for found in encode(tokenizer, (documents[i] for i in order)):
        ids += found
        if len(ids) >= wanted:
            break
    return ids


def data_digest(config: DatasetConfig) -> str:
    """sha256 (hex) of the calibration text: file contents, and what is held out of them. Of self-generated text: `generated_digest`."""
    facts: list[Any] = [SELECTION, config.source, sorted(text.HELD_OUT_SHARE.items())]
    if config.source == "embedded":
        facts += [file_digest(text.package_data(text.PARTS[name][0])) for name in config.files or ("boolq",) if name in text.PARTS]
    elif config.source == "files":
        facts += [config.column, [file_digest(p) for p in text.matching_files(config.files)], sorted(text.protected_digests())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def evaluation_digest(config: RunConfig) -> str:
    """sha256 (hex) of the evaluation data: the text of each protocol, the files of each task, and what is held out."""
    from lbllm_core.data import protocols
    from lbllm_core.data.tasks import sources

    facts: list[Any] = [SELECTION, sorted(text.HELD_OUT_SHARE.items())]
    for name in config.evaluation.protocols:
        protocol = protocols.parse(name)
        facts.append([protocol.name, [file_digest(p) for p in protocols.protocol_files(protocol.text)]])
    for task in config.evaluation.tasks:
        facts.append([task, [[split, file_digest(p)] for source in sources(task) for split, p in sorted(source.files.items())]])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

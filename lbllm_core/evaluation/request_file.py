"""Log-likelihood requests and their answers as files, so that a machine without lm-eval and without the tasks' data can score them.

    here    lm-eval asks for log p(continuation | context); the questions become a file of token ids
    there   a model answers every one (`request_scores.py`); the answers become a file
    here    lm-eval asks again, is answered from that file, and computes its metrics (`offline_tasks.py`)

A **requests file** is safetensors: `contexts` and `continuations`, token ids end to end (uint16 where the vocabulary allows it), their
`*_lengths`, and `context_of`, the context of each continuation: a context that four choices share is kept once. A **scores file** holds
`values` (float64, summed log-likelihoods in nats) and `greedy` (uint8), one a request in the file's order. Both carry `facts`, a JSON object in
UTF-8 bytes, with a CRC-32 of every tensor in it. A scores file names the sha256 of the requests file that it answers.

The tokenizer is identified by what it does, not by how a library version writes it down (transformers 5.17 and 5.23 read another end token
out of one GGUF file, which no request holds): its vocabulary, its first token and the ids of a probe text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_core.config import ModelConfig
from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import ArtifactError, DataError
from lbllm_core.model.load import DATA_VARIABLE, data_root
from lbllm_core.model.packed_file import checksum

Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation
SCHEMA = 1
FACTS = "facts"
BUILD = "python -m lbllm_core.evaluation.offline_tasks build"
PROBE = "Question: Don't 1234567 apples   cost $3.50?\n\nAnswer: naïve café 東京 – no\t\r\n  <|im_start|> x_{i+1} != 0x1F"


@dataclass(frozen=True)
class Requests:
    """The content of a requests file. `digest`: sha256 of the file."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    digest: str

    def __len__(self) -> int:
        return int(self.tensors["context_of"].numel())

    @property
    def tokens(self) -> int:
        """Token ids in the file, shared contexts once."""
        return int(self.tensors["contexts"].numel() + self.tensors["continuations"].numel())

    def pairs(self) -> list[Pair]:
        """Every request in order; those with one context share its list."""
        contexts = _split(self.tensors["contexts"], self.tensors["contexts_lengths"])
        continuations = _split(self.tensors["continuations"], self.tensors["continuations_lengths"])
        return [(contexts[i], y) for i, y in zip(self.tensors["context_of"].tolist(), continuations, strict=True)]


@dataclass(frozen=True)
class Scores:
    """Answers to every request of a file: summed log-likelihoods `(n,)` float64, and whether the continuation is the greedy one `(n,)` uint8."""

    values: Tensor
    greedy: Tensor
    facts: Mapping[str, Any]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of what decides the ids of a request: vocabulary, the token that stands for an empty context, the cut of the probe text."""
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    facts = [sorted(tokenizer.get_vocab().items()), prefix, ids]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def require_tokenizer(requests: Requests, tokenizer: Any, model: ModelConfig) -> None:
    """DataError when the requests were cut by another tokenizer than this model's, or otherwise begun: their ids would mean other words."""
    if requests.facts.get("tokenizer") != tokenizer_digest(tokenizer):
        raise DataError(f"the requests were built with the tokenizer of {requests.facts.get('model')}, {model.name} has another one; build them for {model.name}: {BUILD}")
    if requests.facts.get("add_bos") != model.add_bos:
        raise DataError(f"the requests were built with model.add_bos={requests.facts.get('add_bos')}, {model.name} has model.add_bos={model.add_bos}; build them for {model.name}: {BUILD}")


def located(requests: str) -> Path:
    """The file that `evaluation.requests` means: absolute, or relative to LBLLM_DATA. Raises DataError when it is not there."""
    given, root = Path(requests), data_root()
    if not given.is_absolute() and root is None:
        raise DataError(f"evaluation.requests={requests} is relative to {DATA_VARIABLE}, which is not set; set it or give an absolute path")
    path = given if given.is_absolute() or root is None else root / given
    if not path.is_file():
        raise DataError(f"evaluation.requests: there is no file {path}; build it: {BUILD} --out {path}")
    return path


def requests_tensors(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """The tensors of a requests file for these requests, each context once, in order of appearance."""
    places: dict[tuple[int, ...], int] = {}
    context_of = [places.setdefault(tuple(context), len(places)) for context, _ in pairs]
    made = {"context_of": torch.tensor(context_of, dtype=torch.int32)}
    for name, parts in (("contexts", list(places)), ("continuations", [tuple(y) for _, y in pairs])):
        flat = torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        made[name] = flat.to(torch.uint16) if not flat.numel() or int(flat.max()) < 1 << 16 else flat
        made[f"{name}_lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return made


def write_requests(path: Path, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], facts: Mapping[str, Any]) -> Requests:
    """Write a requests file, whole or not at all, and read it back."""
    _write(path, requests_tensors(pairs), {**facts, "requests": len(pairs)})
    return read_requests(path)


def read_requests(path: Path) -> Requests:
    """A requests file. Raises DataError (absent) or ArtifactError (truncated, altered, something else)."""
    if not path.is_file():
        raise DataError(f"there is no requests file {path}; build it: {BUILD} --out {path}")
    content = path.read_bytes()
    tensors, facts = _read(path, content, "requests", ("contexts", "contexts_lengths", "continuations", "continuations_lengths", "context_of"), f"build it again: {BUILD}")
    consistent = all(int(tensors[f"{name}_lengths"].sum()) == tensors[name].numel() for name in ("contexts", "continuations"))
    if not consistent or facts.get("requests") != tensors["context_of"].numel() or tensors["continuations_lengths"].numel() != tensors["context_of"].numel():
        raise ArtifactError(f"{path}: its lengths and its ids do not belong together; build it again: {BUILD}")
    return Requests(tensors, facts, hashlib.sha256(content).hexdigest())


def write_scores(path: Path, scores: Scores) -> None:
    """Write a scores file, whole or not at all."""
    _write(path, {"values": scores.values.double(), "greedy": scores.greedy.to(torch.uint8)}, scores.facts)


def read_scores(path: Path, requests: Requests | None = None) -> Scores:
    """A scores file, which must answer all of `requests` where they are given. Raises DataError (absent) or ArtifactError."""
    remedy = "score the requests again: python -m lbllm_core.evaluation.offline_tasks score"
    if not path.is_file():
        raise DataError(f"there is no scores file {path}; {remedy}")
    tensors, facts = _read(path, path.read_bytes(), "scores", ("values", "greedy"), remedy)
    values, greedy = tensors["values"], tensors["greedy"]
    if requests is not None and facts.get("requests_digest") != requests.digest:
        raise ArtifactError(f"{path} answers another requests file (sha256 {str(facts.get('requests_digest'))[:16]}, given {requests.digest[:16]}); name that one, or {remedy}")
    if values.shape != greedy.shape or (requests is not None and values.numel() != len(requests)):
        raise ArtifactError(f"{path} holds {values.numel()} scores and {greedy.numel()} marks for {len(requests) if requests is not None else 'its'} requests; it is incomplete, {remedy}")
    return Scores(values, greedy, facts)


def _split(flat: Tensor, lengths: Tensor) -> list[list[int]]:
    ids, found, start = flat.tolist(), [], 0
    for length in lengths.tolist():
        found.append(ids[start : start + length])
        start += length
    return found


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    told = {**facts, "schema": SCHEMA, "crc32": {name: checksum(t) for name, t in sorted(tensors.items())}}
    written = torch.frombuffer(bytearray(json.dumps(told, sort_keys=True).encode()), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({**tensors, FACTS: written}))


def _read(path: Path, content: bytes, what: str, wanted: Sequence[str], remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(content)
        facts: dict[str, Any] = json.loads(bytes(tensors.pop(FACTS).tolist()))
        recorded = facts.pop("crc32")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read as a {what} file ({type(error).__name__}: {error}); it is truncated or something else, {remedy}") from error
    if facts.get("schema") != SCHEMA or sorted(tensors) != sorted(wanted):
        raise ArtifactError(f"{path} is no {what} file of schema {SCHEMA} (schema {facts.get('schema')}, tensors {', '.join(sorted(tensors))}); {remedy}")
    altered = [name for name, tensor in tensors.items() if checksum(tensor) != recorded.get(name)]
    if altered:
        raise ArtifactError(f"{path}: the bytes of {altered[0]} are not those that were written (CRC-32 differs); {remedy}")
    return tensors, facts

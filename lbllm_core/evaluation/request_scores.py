"""Answering a requests file with a model: what a machine without lm-eval does, with torch and transformers alone.

Requests are taken context by context, longest first, in chunks of CHUNK_TOKENS tokens; a chunk is scored as `choice_scores.py` does
it (choices of one context in one row, right-padded batches within a token budget, logits at the continuations alone) and
recorded in a ledger, so that a run that died goes on after its last chunk. Chunks are fixed by the file, so a resumed run gives the
numbers of an uninterrupted one; they are alike in tokens, so that the time left is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_core.config import RunConfig
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.errors import ArtifactError
from lbllm_core.evaluation.choice_scores import score
from lbllm_core.evaluation.last_states import WAVE_TOKENS, Model, Streamed, teacher_of
from lbllm_core.evaluation.request_file import Pair, Requests, Scores, read_scores, require_tokenizer, write_scores

CHUNK_TOKENS = 1 << 16
NAME = "zero_shot requests"


def chunks(context_of: Sequence[int], pairs: Sequence[Pair], tokens: int = CHUNK_TOKENS) -> list[list[int]]:
    """Places of the requests, those of one context together, contexts by falling length, in runs of about `tokens` tokens."""
    together: dict[int, list[int]] = {}
    for place, context in enumerate(context_of):
        together.setdefault(context, []).append(place)
    sizes = {context: len(pairs[members[0]][0]) + sum(len(pairs[i][1]) - 1 for i in members) for context, members in together.items()}
    found: list[list[int]] = []
    room = 0
    for context in sorted(together, key=lambda c: (-sizes[c], c)):
        if room < sizes[context] or not found:
            found.append([])
            room = tokens
        found[-1] += together[context]
        room -= sizes[context]
    return found


def score_requests(
    model: Model, requests: Requests, max_length: int, batch_tokens: int, ledger: Ledger, report: Report = silent, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """(values `(n,)` float64, greedy `(n,)` uint8) of every request. Finished chunks of `ledger` are not scored again.

    `max_length`: the model's context; what is longer loses its first tokens. Raises NumericalError when a likelihood is not finite.
    """
    pairs = requests.pairs()
    parts = chunks(requests.tensors["context_of"].tolist(), pairs, chunk_tokens)
    values, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.uint8)
    intact = ledger.finished(len(parts))
    report(Progress(NAME, intact, len(parts), "chunk"))
    for index, part in enumerate(parts):
        if index >= intact:
            answers = score(model, [pairs[i] for i in part], max_length, batch_tokens)
            made = {"values": torch.tensor([v for v, _ in answers], dtype=torch.float64), "greedy": torch.tensor([g for _, g in answers], dtype=torch.uint8)}
            ledger.save(index, made, {})
            report(Progress(NAME, index + 1, len(parts), "chunk"))
        made = ledger.load(index)
        values[part], greedy[part] = made["values"], made["greedy"]
    return values, greedy


def scores_file(path: Path, model: Model, requests: Requests, facts: Mapping[str, Any], batch_tokens: int, report: Report = silent) -> Scores:
    """The scores file at `path`: as it is when it is whole and answers for the same model, else scored (or continued) now.

    `facts`: `model_digest`, `max_length`, and whatever else should stand in the file. Chunks lie beside it until it is written.
    """
    told = {**facts, "requests_digest": requests.digest}
    if path.is_file():
        try:
            found = read_scores(path, requests)
        except ArtifactError as error:
            raise ArtifactError(f"{error}. It would be overwritten: remove it or name another file") from error
        if any(found.facts.get(key) != told[key] for key in ("model_digest", "max_length")):
            raise ArtifactError(f"{path} holds the scores of another model ({str(found.facts.get('model_digest'))[:16]}); remove it or name another file")
        return found
    chunk = 3 * WAVE_TOKENS // 4 if isinstance(model, Streamed) else CHUNK_TOKENS  # a streamed model is read for every chunk: one wave, padding included
    ledger = Ledger(path.parent, f"{path.stem}_{str(facts['model_digest'])[:12]}_{requests.digest[:12]}_{facts['max_length']}_{chunk}")
    values, greedy = score_requests(model, requests, int(facts["max_length"]), batch_tokens, ledger, report, chunk)
    write_scores(path, Scores(values, greedy, told))
    for leftover in path.parent.glob(f"{ledger.name}_*"):
        leftover.unlink()
    return read_scores(path, requests)


def score_model(config: RunConfig, home: Path, requests: Requests, out: Path, packed: Path | None, report: Report = silent) -> Scores:
    """Score the requests with a packed folder, or with the config's teacher in float32, into `out`; a run that died is continued."""
    from lbllm_core.engine.hardware import resolve
    from lbllm_core.evaluation.packed_model import packed_of
    from lbllm_core.model.load import CONTENT, teacher_digest, teacher_tokenizer
    from lbllm_core.model.store import folder_digest
    from lbllm_core.report.records import device_name, versions

    device = resolve(config.hardware).device
    model, tokenizer = teacher_of(config, home) if packed is None else (packed_of(config, home, packed), teacher_tokenizer(config.model, home))
    require_tokenizer(requests, tokenizer, config.model)
    facts = {
        "model_digest": teacher_digest(config.model, home) if packed is None else folder_digest(packed, CONTENT),
        "max_length": int(tokenizer.model_max_length),
        "packed": packed is not None,
        "dtype": "fp32" if packed is None else "packed",
        "device": device_name() if device.type == "cuda" else device_name().rpartition("; ")[2],
        "versions": versions(),
    }
    return scores_file(out, model, requests, facts, config.evaluation.batch_tokens, report)

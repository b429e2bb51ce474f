"""Text that the teacher writes itself: calibration data for a model whose training text nobody has.

Each sequence starts with a token drawn evenly from the vocabulary (after the BOS, for models trained with one) and goes on with

    x_t ~ softmax(logits(x_<t) / temperature)

Special tokens are never drawn, so a sequence is plain text of full length. A uniform start costs one odd token a sequence and buys
variety: from the BOS alone a small model tells few stories. A token is where the cumulated distribution passes an even number, and
each batch of sequences draws its numbers beforehand with a generator of its own: on a CPU the same seed gives the same tokens, and more
sequences begin with the fewer ones, however many are written side by side over one KV cache. In float32.

A step of a GPU costs the same for few sequences as for many (launches), so a *wave* of them goes side by side, as many as fit: the largest power of
two, up to 512, whose bytes are no more than a quarter of what is free and no more than 24 GiB; at least one. Bytes of a sequence are known
(`sequence_bytes`): keys and values of all its tokens, made once (`model/cache.py`), and a few rows of logits. When the device runs out of memory all
the same (others use it too), the wave is halved and written again. Waves of other sizes round otherwise, so on a GPU the tokens of two runs may
differ, as the text of two devices does. A CPU writes one batch at a time.

It is all of the text (`dataset.source=self_generated`), or what follows behind other text where that is not enough (`dataset.generated`).

The token ids `(sequences, seq_len)` are kept, not the text, which would be cut into other tokens when it is read again:

    $LBLLM_HOME/texts/self_generated-<key16>/    tokens.safetensors · text.jsonl (to read) · figures.json · files.json (sha256)

Their sha256 is what a step's key holds. Whoever asks for the digest makes the text; the pipeline asks after the teacher has passed
its gate (`pipeline.check_gate` follows the first step), so a broken teacher writes nothing. A model can also pass the gate and
still sample badly, at a low temperature above all: it repeats itself. Two shares tell, and the smaller is compared with
`dataset.min_distinct`:

    distinct_4         distinct 4-grams of a sequence over all its 4-grams, mean over sequences
    distinct_sequences distinct sequences, first token left out, over all sequences

Sources: LLM-QAT (arXiv 2305.17888) for the idea; distinct-n (arXiv 1510.03055) for the measure.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_core.config import DatasetConfig, RunConfig
from lbllm_core.engine import machine, memory
from lbllm_core.engine.hardware import resolve
from lbllm_core.errors import DataError, MemoryShortage
from lbllm_core.model.cache import roomy_cache, share_heads
from lbllm_core.model.inspect import Shapes, architecture_shapes
from lbllm_core.model.load import load_teacher, teacher_digest
from lbllm_core.model.store import file_digest, published

RECIPE = 2  # raise it when other tokens come from the same settings: it is part of the folder's key
BATCH = 16  # sequences that share a generator
LARGEST_WAVE = 512  # sequences that a GPU writes side by side
WAVE_SHARE = 0.25  # of the device memory that is free
WAVE_BYTES = 24 << 30
LOGIT_ROWS = 5  # of a sequence at once: the model's (of two tokens at first), divided, softmax, its sums
NGRAM = 4
log = logging.getLogger(__name__)


def wanted(data: DatasetConfig) -> int:
    """How many sequences the teacher writes."""
    return data.sequences if data.source == "self_generated" else data.generated


def generated_tokens(config: RunConfig, home: Path) -> Tensor:
    """The sampled token ids `(wanted(dataset), dataset.seq_len)`, int64; sampled now when they are not in the home folder."""
    from safetensors.torch import load_file

    ids: Tensor = load_file(_folder(config, home) / "tokens.safetensors")["ids"].clone()  # not a view of the mapped file
    return ids


def generated_digest(config: RunConfig, home: Path) -> str:
    """sha256 (hex) of the sampled tokens' file. Raises DataError when the text is degenerate."""
    folder = _folder(config, home)
    figures: dict[str, float] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    require_distinct(figures, config)
    return file_digest(folder / "tokens.safetensors")


def distinct_shares(ids: Tensor) -> dict[str, float]:
    """`distinct_4` and `distinct_sequences` (0..1) of token ids `(sequences, tokens)`."""
    rows = ids.tolist()
    shares = []
    for row in rows:
        grams = [tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1)]
        shares.append(len(set(grams)) / len(grams))
    return {f"distinct_{NGRAM}": sum(shares) / len(shares), "distinct_sequences": len({tuple(row[1:]) for row in rows}) / len(rows)}


def require_distinct(figures: dict[str, float], config: RunConfig) -> None:
    """DataError when the text repeats itself: with the share, the limit, and what to try."""
    name, share = min(figures.items(), key=lambda item: item[1])
    limit = config.dataset.min_distinct
    if share < limit:
        raise DataError(
            f"the text that {config.model.name} wrote at temperature {config.dataset.temperature:g} is degenerate: {name} is {share:.3f}, "
            f"the limit dataset.min_distinct is {limit:g}; raise dataset.temperature, take another seed, or choose dataset=embedded or local files"
        )


def sequence_bytes(shapes: Shapes, tokens: int) -> int:
    """Bytes that a sequence of so many tokens takes while it is written: its cache, its logits, and what passes through one block."""
    cache = 2 * shapes.blocks * shapes.kv_heads * shapes.head_dim * tokens
    passing = 2 * (4 * shapes.hidden + 3 * shapes.ffn + 4 * shapes.heads * shapes.head_dim)  # of two tokens at most
    return 4 * (cache + LOGIT_ROWS * shapes.vocabulary + passing)


def needed_bytes(shapes: Shapes, data: DatasetConfig, on_device: bool) -> tuple[float, float]:
    """Bytes of host and device memory below which the teacher cannot write: itself in float32, and one sequence (on a CPU: one batch of them)."""
    teacher, each = 4.0 * shapes.parameters, sequence_bytes(shapes, data.seq_len)
    return (teacher, teacher + each) if on_device else (teacher + BATCH * each, 0.0)


def wave_size(device: torch.device, each: int, free: int) -> int:
    """How many sequences of `each` bytes are written side by side, with `free` bytes of device memory."""
    if device.type != "cuda":
        return BATCH
    wave, room = LARGEST_WAVE, min(WAVE_SHARE * free, WAVE_BYTES)
    while wave > 1 and wave * each > room:
        wave //= 2
    return wave


@torch.no_grad()
def sample(model: Any, first: Tensor, length: int, temperature: float, allowed: Tensor, draws: Tensor) -> Tensor:
    """Continue `first (batch, n)` to `(batch, length)` token ids over a KV cache. `allowed (vocabulary,)` bool: what may be drawn;
    draws `(batch, length - n)`: numbers from 0 to 1, one for each token."""
    ids = first.new_empty((len(first), length))
    ids[:, : first.shape[1]] = last = first
    closed, draws, cache = ~allowed.to(first.device), draws.to(first.device), roomy_cache(model.config, length)
    for at, numbers in enumerate(draws.unbind(1), first.shape[1]):
        last = _drawn(model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1], temperature, closed, numbers)
        ids[:, at] = last[:, 0]
    return ids


def _drawn(logits: Tensor, temperature: float, closed: Tensor, numbers: Tensor) -> Tensor:
    """The next tokens `(batch, 1)` for logits `(batch, vocabulary)` and even numbers `(batch,)`."""
    cumulated = (logits.float() / temperature).masked_fill_(closed, float("-inf")).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, numbers[:, None] * cumulated[:, -1:], right=True).clamp_max(logits.shape[1] - 1)


def is_written(config: RunConfig, home: Path) -> bool:
    """Whether the text of this configuration lies in the home folder already; nothing is sampled to find out."""
    return _place(config, home).exists()


def _place(config: RunConfig, home: Path) -> Path:
    d = config.dataset
    facts = [RECIPE, teacher_digest(config.model, home), config.model.add_bos, config.model.context, config.seed, wanted(d), d.seq_len, d.temperature, resolve(config.hardware).device.type]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return home / "texts" / f"self_generated-{key[:16]}"


def _folder(config: RunConfig, home: Path) -> Path:
    """The published folder of this configuration's text."""
    return published(_place(config, home), lambda part: _write(config, home, part))


def _write(config: RunConfig, home: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    d = config.dataset
    log.info("self_generated: %s writes %d sequences of %d tokens", config.model.name, wanted(d), d.seq_len)
    teacher, hardware = load_teacher(config.model, home), resolve(config.hardware)
    tokenizer, model = teacher.tokenizer, teacher.model.to(hardware.device)
    memory.settle(hardware.device)
    ids = _generate(config, model, tokenizer, machine.limits(hardware, home).device_free)
    del teacher, model
    memory.release()
    save_file({"ids": ids}, folder / "tokens.safetensors")
    lines = (json.dumps({"text": tokenizer.decode(row)}, ensure_ascii=False) for row in ids.tolist())
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(distinct_shares(ids), sort_keys=True), encoding="utf-8")


def _generate(config: RunConfig, model: Any, tokenizer: Any, free: int = 0) -> Tensor:
    """All sequences. `free`: bytes of device memory, where the model is on a GPU. Raises DataError, MemoryShortage."""
    from lbllm_core.data.tokens import bos_of, require_context

    require_context(config, tokenizer)
    d, device = config.dataset, next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[: len(tokenizer)] = True
    allowed[[i for i in tokenizer.all_special_ids if i < rows]] = False
    starts, bos = allowed.nonzero().squeeze(1), bos_of(config.model, tokenizer)
    wave = wave_size(device, sequence_bytes(architecture_shapes(model.config, 0), d.seq_len), free)
    if device.type == "cuda":
        share_heads(model)
    made, count, begin = [], wanted(d), 0
    whole = -(-count // BATCH) * BATCH  # the last batch too: products of fewer rows round otherwise
    while begin < count:
        first, draws = _numbers(config, begin, min(begin + wave, whole), starts, bos)
        try:
            made.append(sample(model, first.to(device), d.seq_len, d.temperature, allowed, draws).cpu())
        except torch.OutOfMemoryError as error:
            reason = memory.shortage(error)
        else:
            begin += len(first)
            log.info("self_generated: %d of %d sequences", min(begin, count), count)
            continue
        wave = _halved(wave, d, reason)
        memory.settle(device)
    return torch.cat(made)[:count].contiguous()


def _halved(wave: int, data: DatasetConfig, reason: str) -> int:
    """A smaller wave, with a word in the log. MemoryShortage when there is none."""
    if wave == 1:
        raise MemoryShortage(f"the device has no memory to write one sequence of {data.seq_len} tokens ({reason}). Try shorter sequences (dataset.seq_len), a device with more free memory, or hardware.device=cpu")
    log.warning("self_generated: the device ran out of memory; %d sequences are now written side by side instead of %d", wave // 2, wave)
    return wave // 2


def _numbers(config: RunConfig, begin: int, end: int, starts: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """First tokens and numbers, as `_batch` has them, of the sequences from `begin` to before `end`."""
    at = begin - begin % BATCH
    firsts, draws = zip(*(_batch(config, index, starts, bos) for index in range(at, end, BATCH)), strict=True)
    part = slice(begin - at, end - at)
    return torch.cat(firsts)[part], torch.cat(draws)[part]


def _batch(config: RunConfig, index: int, starts: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """First tokens `(BATCH, 1 or 2)` and numbers for all others of the batch that begins with sequence `index`."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    first = starts[torch.randint(len(starts), (BATCH, 1), generator=generator)]
    first = first if bos is None else torch.cat([torch.full((BATCH, 1), bos), first], 1)
    return first, torch.rand(BATCH, config.dataset.seq_len - first.shape[1], generator=generator)

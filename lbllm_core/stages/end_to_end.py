"""Stage 4, end-to-end refinement (ours): all blocks at once against the teacher's logits.

Blocks were trained one by one, each to repair its own output; what matters is the distribution over the next token. The few
parameters beside the codes (levels or tables, row scales, clips, knees, norms: some percent of the model) are trained together, and
with `lr_weight` also the latent weights behind the codes, on

    L = KL(softmax(teacher logits) || softmax(student logits)),   mean over tokens

with activations and cache as they will be at inference. In EfficientQAT (arXiv 2407.11062) the same move took LLaMA-2-7B at two bits
from 7.94 to 7.17. Gradients of micro-batches add up; a checkpoint of the parameters and of the optimizer is written every few
steps, and a resumed run is bit-equal on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lbllm_core.config import EndToEndConfig, SchemeConfig
from lbllm_core.engine.block_sweep import sample_error
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import Progress, Report
from lbllm_core.engine.recorded_step import RecordedStep
from lbllm_core.engine.train_block import cosine
from lbllm_core.errors import NumericalError
from lbllm_core.model.blocks import Decoder, linears_of
from lbllm_core.model.fused_block import run_block
from lbllm_core.model.linear import LearningRates, weights_held
from lbllm_core.model.student import BlockState
from lbllm_core.model.student_block import Mode, build_block, constrain, parameter_groups, quant_linears, read_state
from lbllm_core.stages.divergence import divergence, fused_head

ERROR_TOKENS = 2048  # on which the error of each block is taken, before and after


@dataclass(frozen=True)
class Refinement:
    """What a run of stage 4 needs beside the blocks."""

    decoder: Decoder
    config: EndToEndConfig
    scheme: SchemeConfig
    hardware: Hardware
    seed: int


def learning_rates(config: EndToEndConfig) -> LearningRates:
    """What learns, and how fast."""
    rates = {"weight": config.lr_weight, "norms": config.lr_norms, "clips": config.lr_clips, "knees": config.lr_knees}
    return LearningRates(levels=config.lr_levels, row_scale=config.lr_levels, **rates)


def last_hidden(r: Refinement, blocks: Sequence[nn.Module], ids: Tensor, around: dict[str, Any], recompute: bool) -> Tensor:
    """Hidden states after the last block, float32, `(batch, tokens, hidden)`; `around` are the decoder's surroundings."""
    hidden = r.decoder.embed(ids).float()
    for index, block in enumerate(blocks):

        def run(h: Tensor, block: nn.Module = block, index: int = index) -> Tensor:
            return run_block(r.decoder, block, h, around, r.hardware, index)

        hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False) if recompute else run(hidden)
    return hidden


@torch.no_grad()
def block_errors(r: Refinement, blocks: Sequence[nn.Module], ids: Tensor, around: dict[str, Any]) -> list[float]:
    """Relative error of the student's hidden states after each block, both streams from the embedding on; ids `(sequences, tokens)`."""
    ids = ids[: max(1, ERROR_TOKENS // ids.shape[1])]
    ours = theirs = r.decoder.embed(ids).float()
    found = []
    for index, (block, teacher) in enumerate(zip(blocks, r.decoder.blocks, strict=True)):
        ours, theirs = (run_block(r.decoder, b, h, around, r.hardware, index) for b, h in ((block, ours), (teacher, theirs)))
        found.append(sample_error(ours, theirs, r.hardware.ranks))
    return found


@dataclass(frozen=True)
class Refined:
    """What stage 4 made: the states, the figures of each step (`loss`, `step`), the error of each block before and after (empty when nothing learned)."""

    states: list[BlockState]
    history: list[dict[str, float]]
    error_before: list[float]
    error_after: list[float]


def refine(r: Refinement, ids: Tensor, states: Iterable[BlockState], ledger: Ledger, report: Report) -> Refined:
    """Train all blocks. ids `(sequences, tokens)`.

    The weights behind the codes are not handed on: this is the last stage. `states` may be a generator: one at a time is in memory.
    """
    c = r.config
    blocks, starts = [], []
    for teacher, state in zip(r.decoder.blocks, states, strict=True):
        mode: Mode = "nearest" if c.lr_weight and state.latents else "frozen"
        blocks.append(build_block(teacher, state, mode, r.scheme.kv_bits, r.scheme.trained_family))
        starts.append(replace(state, linears={}, latents={}))  # what the new block does not hold itself
    groups = [group for block in blocks for group in parameter_groups(block, learning_rates(c))]
    if not groups:
        return Refined([replace(read_state(block, start), latents={}) for block, start in zip(blocks, starts, strict=True)], [], [], [])
    for linear in (m for teacher in r.decoder.blocks for m in linears_of(teacher).values()):
        linear.weight.data = linear.weight.data.to(r.hardware.compute_dtype)  # as autocast would cast it in every pass
    around = r.decoder.surroundings(r.decoder.embed(ids[:1]).float())
    before = block_errors(r, blocks, ids, around)
    head = fused_head(r.decoder, r.hardware)
    update = RecordedStep(groups, lambda batch: _accumulate(r, blocks, around, head, batch), lambda: _constrain(blocks), c.grad_clip, ids.device)
    batches = _batches(len(ids), c, r.seed)
    history, first = _restore(ledger, c, update)
    started = time.monotonic()
    report(Progress("end_to_end", first, c.steps, "step", begins=True))
    for step in range(first, c.steps):
        loss = float(update(cosine(step, c.steps, c.lr_final), ids[batches[step].to(ids.device)]))
        if not math.isfinite(loss):
            last = history[-1]["loss"] if history else math.nan
            raise NumericalError(f"stage 4, step {step}: the loss became {loss}; last finite loss {last:.6g}. The checkpoint before it is kept. Try end_to_end.lr_levels ten times lower")
        history.append({"loss": loss, "step": float(step)})
        seconds = time.monotonic() - started
        rate = (step + 1 - first) * c.batch_size * ids.shape[1] / max(seconds, 1e-9)
        now = {"loss": loss, "loss_before": history[0]["loss"], "tokens_per_s": rate, "seconds": seconds}
        report(Progress("end_to_end", step + 1, c.steps, "step", now))
        if (step + 1) % c.checkpoint_every == 0 and step + 1 < c.steps:
            _checkpoint(ledger, step // c.checkpoint_every, update, history)
    after = block_errors(r, blocks, ids, around)
    made = [replace(read_state(block, start), latents={}) for block, start in zip(blocks, starts, strict=True)]
    return Refined(made, history, before, after)


def _batches(n: int, c: EndToEndConfig, seed: int) -> list[Tensor]:
    """Sequence indices of every step: passes over a shuffled set, each pass in its own order."""
    generator = torch.Generator().manual_seed(seed * 100_003 + 77_777)
    wanted = c.steps * c.batch_size
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-wanted // n))])
    return [order[i : i + c.batch_size] for i in range(0, wanted, c.batch_size)]


def _accumulate(r: Refinement, blocks: list[nn.Module], around: dict[str, Any], head: Tensor | None, ids: Tensor) -> Tensor:
    """Forward and backward of one batch in micro-batches; returns the mean loss."""
    total = torch.zeros((), device=ids.device)
    micro = r.config.micro_batch
    pieces = [ids[i : i + micro] for i in range(0, len(ids), micro)]
    with weights_held([linear for block in blocks for linear in quant_linears(block).values()]):
        for piece in pieces:
            with torch.no_grad():
                target = last_hidden(r, r.decoder.blocks, piece, around, False)
            student = last_hidden(r, blocks, piece, around, r.config.gradient_checkpointing)
            loss = divergence(r.decoder, r.hardware, student, target, r.config.logit_share, head) * (len(piece) / len(ids))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    return total


def _constrain(blocks: list[nn.Module]) -> None:
    for block in blocks:
        constrain(block)


def _checkpoint(ledger: Ledger, index: int, update: RecordedStep, history: list[dict[str, float]]) -> None:
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(update.parameters):
        moments = update.optimizer.state.get(p)
        if not moments:  # it never had a gradient: the knees of uniform codes
            continue
        tensors |= {f"{i}.value": p.detach(), f"{i}.exp_avg": moments["exp_avg"], f"{i}.exp_avg_sq": moments["exp_avg_sq"], f"{i}.step": moments["step"]}
    ledger.save(index, {k: v.cpu().contiguous() for k, v in tensors.items()}, {"history": history})


def _restore(ledger: Ledger, c: EndToEndConfig, update: RecordedStep) -> tuple[list[dict[str, float]], int]:
    """Put the newest checkpoint back; returns the history so far and the next step."""
    done = ledger.finished((c.steps - 1) // c.checkpoint_every)
    if not done:
        return [], 0
    tensors = ledger.load(done - 1)
    with torch.no_grad():
        for i, p in enumerate(update.parameters):
            if f"{i}.value" not in tensors:
                continue
            p.copy_(tensors[f"{i}.value"])
            moments = {k: tensors[f"{i}.{k}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
            update.optimizer.state[p] = {"step": tensors[f"{i}.step"].to(p.device), **moments}
    return list(ledger.figures(done - 1)["history"]), done * c.checkpoint_every

"""Is the packed model that will be shipped the model that was trained? Two questions, asked on real inputs.

1. **Integers.** Every packed linear is run with the tokens it really sees, by the path that dispatch chose for this machine and by the
   reference: codes, scales, zero points and int32 sums must be equal, bit by bit. One mismatch is a fault of a kernel. Both regimes
   are checked, all tokens at once (prefill) and a single one (decode), because they take different code.
2. **Meaning.** The packed model against the fake-quantized one (dequantized weights, emulated activations), as
   `SQNR = 10 log10( sum y^2 / sum (y - y_packed)^2 )` in dB, in three views: each linear on equal inputs (float rounding alone, about
   120 dB); each block's contribution on equal inputs, and the logits that follow from the last of them (`logits_sqnr_db`), as the SQNR
   that nine of ten tokens reach; and both models running free (`free_logits_sqnr_db`). The tolerance bounds the first three
   (`lowest_db`). Where an activation lies within one rounding of a decision point, the two models take different 4-bit codes. On equal
   inputs that is one token of hundreds, about 16 dB from its twin while the others are 120 (docs/log.md, entry 46); a fault of packing is
   in most of them. Running free, thirty blocks amplify it: that figure is reported only, for it is a property of the model, not of
   packing, and two equally valid float orders of the *same* model differ by as much.

Memory: one packed and one fake-quantized block at a time, and three hidden states of the few tokens of the check: packed, fake-quantized on
equal inputs, and fake-quantized running free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lbllm_kernels import dispatch, reference
from lbllm_kernels.activation import quantize_activations
from torch import Tensor, nn

from lbllm_core.errors import GateError
from lbllm_core.model.blocks import LAYERS, Decoder
from lbllm_core.model.packed import PackedLinear, packed_linears


@dataclass(frozen=True)
class IntegerCheck:
    """`mismatches`: integers (codes, zero points, sums) and scales that differ from the reference; `first`: the linear where."""

    linears: int
    compared: int
    mismatches: int
    first: str
    paths: tuple[str, ...]  # "path: reason", distinct
    exact_paths: bool  # False when all linears took the reference itself, so that nothing was compared with anything


@dataclass(frozen=True)
class LogitCheck:
    """Packed against fake-quantized, SQNR in dB; `worst_*`: the block and the linear that differ most on equal inputs."""

    logits_sqnr_db: float
    free_logits_sqnr_db: float
    worst_block: str
    worst_block_sqnr_db: float
    worst_linear: str
    worst_linear_sqnr_db: float

    @property
    def lowest_db(self) -> float:
        """The figure that the tolerance bounds: logits, worst block and worst linear on equal inputs."""
        return min(self.logits_sqnr_db, self.worst_block_sqnr_db, self.worst_linear_sqnr_db)


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    """`10 log10(signal / noise)`; infinity for equal tensors, -infinity where `actual` is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return -math.inf
    noise = (expected.double() - actual.double()).square().sum().item()
    signal = expected.double().square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def most_tokens_db(expected: Tensor, actual: Tensor) -> float:
    """The SQNR that nine of ten tokens reach, `(..., channels)`; of fewer than ten tokens all. -infinity where `actual` is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return -math.inf
    noise = (expected.double() - actual.double()).square().sum(-1).flatten()
    signal = expected.double().square().sum(-1).flatten()
    each = torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))
    return float(each.sort().values[len(each) // 10])


def compare_integers(linear: PackedLinear, x: Tensor) -> tuple[int, int]:
    """(compared, mismatches) of one packed linear on tokens `x (M, in)`: the chosen path against the reference."""
    prepared, values = linear.prepared, linear.site.values
    assert values is not None
    x, _ = reference.split_outliers(x, linear.packed())
    q, scale, zero = quantize_activations(x, values)
    acc = dispatch.accumulate(q, prepared)
    compared, wrong = acc.numel(), int((acc != reference.accumulate(q, prepared.packed)).sum())
    route = prepared.route(x.shape[0])
    if route.path.name != "reference":
        ours, our_scale, our_zero = route.path.in_order(dispatch.quantize(x, values, route))
        same_scale = (our_scale == scale) | (torch.isnan(our_scale) & torch.isnan(scale))
        wrong += int((ours != q).sum()) + int((our_zero != zero).sum()) + int((~same_scale).sum())
        compared += q.numel() + 2 * scale.numel()
    return compared, wrong


@torch.no_grad()
def check(packed: Decoder, ids: Tensor, teacher: Decoder | None = None, fake_block: Callable[[int], nn.Module] | None = None) -> tuple[IntegerCheck, LogitCheck | None]:
    """Both questions on token ids `(batch, tokens)`; the second where the fake-quantized model is given: `teacher` with other blocks.

    Linears with unquantized activations have no integers and are passed over. Every block is asked for once, in order, and let go.
    """
    integers, meaning = _Integers(), _Meaning()
    hidden = packed.embed(ids).float()
    around = packed.surroundings(hidden)
    free = theirs = hidden if teacher is None else teacher.embed(ids).float()
    if teacher is not None:
        teacher.embedded()
    for index in range(len(packed.blocks)):
        fake = None if fake_block is None else fake_block(index)
        block = packed.blocks[index]
        with _watching(block, f"{LAYERS}.{index}", fake, integers, meaning):
            ours = packed.run_block(block, hidden, around, index)
        if teacher is not None and fake is not None:
            theirs = teacher.run_block(fake, hidden, around, index)
            meaning.block = min(meaning.block, (most_tokens_db(theirs - hidden, ours - hidden), f"{LAYERS}.{index}"))
            free = teacher.run_block(fake, free, around, index)
        hidden = ours
        del block, fake, ours
    if teacher is None:
        return integers.found(), None
    logits = packed.logits(hidden)
    return integers.found(), meaning.found(most_tokens_db(teacher.logits(theirs), logits), sqnr_db(teacher.logits(free), logits))


@contextmanager
def _watching(block: nn.Module, name: str, fake: nn.Module | None, integers: _Integers, meaning: _Meaning) -> Iterator[None]:
    """Compare every packed linear that runs inside, on the input that it sees."""

    def hook(path: str) -> Any:
        def see(linear: PackedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            integers.see(f"{name}.{path}", linear, inputs[0])
            if fake is not None:
                meaning.linear = min(meaning.linear, (sqnr_db(fake.get_submodule(path)(inputs[0]), output), f"{name}.{path}"))

        return see

    handles = [linear.register_forward_hook(hook(path)) for path, linear in packed_linears(block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Integers:
    """What has been counted so far for question 1."""

    linears: int = 0
    compared: int = 0
    mismatches: int = 0
    first: str = ""
    paths: dict[str, None] = field(default_factory=dict)

    def see(self, name: str, linear: PackedLinear, x: Tensor) -> None:
        choice = linear.prepared.choice
        self.paths[f"{choice.path}: {choice.reason}"] = None
        self.linears += 1
        if linear.site.variant == "none":
            return
        flat = x.reshape(-1, x.shape[-1])
        ends = [route.up_to for route in linear.prepared.routes if route.up_to is not None]
        for part in (flat, flat[:1], *(flat[:end] for end in ends)):  # one number of tokens for every path that the layer may take
            seen, wrong = compare_integers(linear, part)
            self.compared, self.mismatches = self.compared + seen, self.mismatches + wrong
            self.first = self.first or (name if wrong else "")

    def found(self) -> IntegerCheck:
        exact = any(not path.startswith("reference") for path in self.paths)
        return IntegerCheck(self.linears, self.compared, self.mismatches, self.first, tuple(self.paths), exact)


@dataclass
class _Meaning:
    """The worst linear and block so far for question 2: dB and name."""

    linear: tuple[float, str] = (math.inf, "")
    block: tuple[float, str] = (math.inf, "")

    def found(self, forced: float, free: float) -> LogitCheck:
        return LogitCheck(forced, free, self.block[1], self.block[0], self.linear[1], self.linear[0])


def require(integers: IntegerCheck, logits: LogitCheck | None, min_sqnr_db: float) -> None:
    """GateError when an integer differs, or the logits fall below the tolerance; it names the linear."""
    if integers.mismatches:
        raise GateError(
            f"packed inference: {integers.mismatches} of {integers.compared} integers differ from the reference, first in {integers.first} "
            f"({'; '.join(integers.paths)}); set LBLLM_KERNEL_PATH=reference and report this"
        )
    if logits is not None and not logits.lowest_db >= min_sqnr_db:
        raise GateError(
            f"the packed model is {logits.lowest_db:.1f} dB from the fake-quantized one, below pack.min_sqnr_db={min_sqnr_db:g}; on equal inputs "
            f"{logits.worst_linear} differs most ({logits.worst_linear_sqnr_db:.1f} dB), of the blocks {logits.worst_block} "
            f"({logits.worst_block_sqnr_db:.1f} dB); the logits are {logits.logits_sqnr_db:.1f} dB apart"
        )

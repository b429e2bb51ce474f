"""Is the packed model that will be shipped the model that was trained? Two questions, asked on real inputs.

1. **Integers.** Every packed linear is run with the tokens it really sees, by the path that dispatch chose for this machine and by the
   reference: codes, scales, zero points and int32 sums must be equal, bit by bit. One mismatch is a fault of a kernel. Both regimes
   are checked, all tokens at once (prefill) and a single one (decode), because they take different code.
2. **Meaning.** The packed model against the fake-quantized one (dequantized weights, emulated activations), as
   `SQNR = 10 log10( sum y^2 / sum (y - y_packed)^2 )` in dB, in three views: each linear on equal inputs (float rounding alone, about
   120 dB); each block's contribution on equal inputs, and the logits that follow from the last of them (`logits_sqnr_db`); and both
   models running free (`free_logits_sqnr_db`). The tolerance bounds the first three (`lowest_db`). The last is reported only: it is a
   property of the model, not of packing. Where an activation lies within one rounding of a decision point, the two models take
   different 4-bit codes, and thirty blocks amplify that; two equally valid float orders of the *same* model differ by as much.

Memory: the inputs and outputs of every block for the few tokens of the check; linears one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lbllm_kernels import dispatch, reference
from lbllm_kernels.activation import quantize_activations
from torch import Tensor, nn

from lbllm_core.errors import GateError
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


@contextmanager
def _watching(model: nn.Module, see: Callable[[str, PackedLinear, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(name, linear, input, output)` for every packed linear that runs inside the block."""

    def hook(name: str) -> Any:
        return lambda module, inputs, output: see(name, module, inputs[0], output)

    with _hooked([linear.register_forward_hook(hook(name)) for name, linear in packed_linears(model)]):
        yield


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
def check_integers(model: nn.Module, ids: Tensor) -> IntegerCheck:
    """Question 1 on token ids `(batch, tokens)`. Linears with unquantized activations have no integers and are passed over."""
    compared = mismatches = linears = 0
    first, paths = "", dict[str, None]()

    def see(name: str, linear: PackedLinear, x: Tensor, _: Tensor) -> None:
        nonlocal compared, mismatches, linears, first
        choice = linear.prepared.choice
        paths[f"{choice.path}: {choice.reason}"] = None
        linears += 1
        if linear.site.variant == "none":
            return
        flat = x.reshape(-1, x.shape[-1])
        ends = [route.up_to for route in linear.prepared.routes if route.up_to is not None]
        for part in (flat, flat[:1], *(flat[:end] for end in ends)):  # one number of tokens for every path that the layer may take
            seen, wrong = compare_integers(linear, part)
            compared, mismatches = compared + seen, mismatches + wrong
            first = first or (name if wrong else "")

    with _watching(model, see):
        model(ids, use_cache=False)
    exact = any(not path.startswith("reference") for path in paths)
    return IntegerCheck(linears, compared, mismatches, first, tuple(paths), exact)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_logits(packed: nn.Module, fake_quant: nn.Module, ids: Tensor) -> LogitCheck:
    """Question 2. `fake_quant` has the packed model's module names; its linears take what the packed ones take."""
    blocks = list(dict.fromkeys(name.partition(".self_attn.")[0] for name, _ in packed_linears(packed) if ".self_attn." in name))
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    linear, block = (math.inf, ""), (math.inf, "")

    def see(name: str, _: PackedLinear, x: Tensor, y: Tensor) -> None:
        nonlocal linear
        linear = min(linear, (sqnr_db(fake_quant.get_submodule(name)(x), y), name))

    def keep(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            inputs[name], outputs[name] = arguments[0], _hidden(output)

        return hook

    def force(name: str) -> Any:
        return lambda _, arguments: (inputs[name], *arguments[1:])

    def compare(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal block
            block = min(block, (sqnr_db(_hidden(output) - inputs[name], outputs[name] - inputs[name]), name))

        return hook

    with _watching(packed, see), _hooked([packed.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]):
        ours = packed(ids, use_cache=False).logits
    free = sqnr_db(fake_quant(ids, use_cache=False).logits, ours)
    theirs = [(fake_quant.get_submodule(name), name) for name in blocks]
    with _hooked([m.register_forward_pre_hook(force(n)) for m, n in theirs] + [m.register_forward_hook(compare(n)) for m, n in theirs]):
        forced = sqnr_db(fake_quant(ids, use_cache=False).logits, ours)
    return LogitCheck(forced, free, block[1], block[0], linear[1], linear[0])


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

"""NF4 and INT8 of bitsandbytes, as controls: the teacher with the linears of its blocks replaced. The only place that imports that library.

| control | module         | weights                                                                  | activations                               |
|---------|----------------|--------------------------------------------------------------------------|-------------------------------------------|
| `nf4`   | `Linear4bit`   | 16 levels times the largest of 64 weights, which is kept in float32      | float32, as the products                  |
| `int8`  | `Linear8bitLt` | -127..127 times the largest of a row, of weights that were in fp16 first | INT8 by token, without outlier channels   |

Outlier channels (LLM.int8) are those that hold a value of THRESHOLD or more; they are multiplied in floating point by the INT8 weights.
They are chosen over all tokens of a forward pass, so that the figures of `int8` depend a little on `evaluation.batch_tokens`.
Double quantization of NF4's scales is off. Embedding, norms and head stay the teacher's, so that the rows differ from it and from ours in
the linears alone. A decoder that is read block by block is quantized block by block, each time a block is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import nn

from lbllm_core.errors import ConfigError
from lbllm_core.model.blocks import Decoder, linears_of
from lbllm_core.quant.bits import NF4_BLOCK, Bits, add, library_bits

THRESHOLD = 6.0


def library() -> Any:
    """The package, without its complaints of kernels that nobody asked for. Raises ConfigError when it is not there."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError([f"evaluation.baselines holds nf4 or int8, which need the package bitsandbytes ({error}); run `make install`, or leave them out"]) from error
    return bitsandbytes


def quantized_linear(linear: nn.Linear, control: str) -> nn.Module:
    """The linear `(out, in)` as `nf4` or `int8` of bitsandbytes, on the same device. Raises ConfigError as `library`."""
    made: Any = library().nn
    shape: dict[str, Any] = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": linear.bias is not None, "device": "meta"}
    weight = linear.weight.detach().cpu()  # both are quantized where they arrive, when they come from the host
    if control == "nf4":
        layer = made.Linear4bit(**shape, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
        layer.support_avx512bf16_for_cpu = False  # else some processors compute in bf16, others not
        layer.weight = made.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=NF4_BLOCK, compress_statistics=False, module=layer)
    else:
        layer = made.Linear8bitLt(**shape, has_fp16_weights=False, threshold=THRESHOLD)
        layer.weight = made.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to(linear.weight.device).eval()  # type: ignore[no-any-return]


def replace_linears(decoder: Decoder, control: str) -> Bits:
    """Put the decoder's linears into the control's format, in place or as they are read; what they cost. Raises ConfigError as `library`."""
    shapes = [linear.weight.shape for linear in linears_of(decoder.blocks[0]).values()]
    if decoder.streamed:
        decoder.blocks = _QuantizedBlocks(decoder.blocks, control)
    else:
        for block in decoder.blocks:
            _quantize_block(block, control)
    return add(len(decoder.blocks) * [library_bits(out, columns, control) for out, columns in shapes])


def _quantize_block(block: nn.Module, control: str) -> nn.Module:
    for path, linear in linears_of(block).items():
        block.set_submodule(path, quantized_linear(linear, control))
    return block


class _QuantizedBlocks(Sequence[nn.Module]):
    """Streamed blocks, each quantized when it has been read."""

    def __init__(self, blocks: Sequence[nn.Module], control: str):
        self.blocks, self.control = blocks, control

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        return _quantize_block(self.blocks[index], self.control)  # type: ignore[arg-type]

"""Embedding and output head kept in the 16 bits they are stored in, for models that compute in fp32 on a CPU.

**Problem.** After packing, the head is most of a small model: SmolLM2-135M's is 28 of 134 million parameters, and as fp32 it is three
quarters of what a decode step reads (113 of 147 MB). Its values are fp16 numbers (packing stores them so), so an fp32 copy holds no more.

**How.** The weight stays fp16 or bf16. The embedding widens the rows it looks up: the very values of an fp32 table. The head widens
weights in registers for a few tokens (`kernels/csrc/half_linear.cpp`) and a band of rows at a time for many. Products are the same,
and sums are fp32; only their order may differ from a plain fp32 linear, as it may between any two of torch's own products.

**A tied head** has no weight of its own: it asks the embedding. The weight is a buffer, so that a model's `dtype` still is what it
computes in. A change of type or a move off the CPU gives an ordinary weight of the model's type.
"""

from __future__ import annotations

from typing import Any

import torch
from lbllm_kernels import cpu
from torch import Tensor, nn

BAND = 8192  # rows of the head widened at a time


class _Half(nn.Module):
    """A module with a 16-bit `weight` buffer and the type it computes in."""

    compute: torch.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> _Half:
        held = self._buffers.pop("weight", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if held is not None:
            asked = fn(torch.empty(0, dtype=self.compute, device=held.device))
            wide = asked.dtype != self.compute or asked.device.type != "cpu"
            self._buffers["weight"] = held.to(asked.device, asked.dtype) if wide else held.to(asked.device)
            self.compute = asked.dtype
        return self


class HalfEmbedding(_Half, nn.Embedding):
    """`ids (...)` -> `(..., hidden)` in the computing type."""

    def __init__(self, plain: nn.Embedding, weight: Tensor, compute: torch.dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = plain.num_embeddings, plain.embedding_dim, plain.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.compute = compute
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).to(self.compute)


class HalfHead(_Half, nn.Linear):
    """`x (..., hidden)` -> logits `(..., vocabulary)` in x's dtype. `tied`: the embedding that owns the weight."""

    def __init__(self, plain: nn.Linear, weight: Tensor, compute: torch.dtype, tied: HalfEmbedding | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = plain.in_features, plain.out_features, compute
        self._tied = (tied,)  # in a tuple: it is a module of the decoder, not of the head
        if tied is None:
            self._buffers["weight"] = weight
        self.bias = plain.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The 16-bit weight `(vocabulary, hidden)`."""
        owner = self._tied[0]
        held = self._buffers["weight"] if owner is None else owner.weight
        assert held is not None
        return held

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype == x.dtype:
            return nn.functional.linear(x, weight, self.bias)
        few = x.numel() <= cpu.FUSED_UP_TO * self.in_features
        if few and x.dtype is torch.float32 and x.is_cpu and not torch.compiler.is_compiling() and cpu.library().half:
            y = cpu.half_linear(x, weight)
        else:
            bands = [nn.functional.linear(x, band.to(x.dtype)) for band in torch.split(weight, BAND)]
            y = bands[0] if len(bands) == 1 else torch.cat(bands, dim=-1)
        return y if self.bias is None else y + self.bias


def exact_half(weight: Tensor) -> Tensor | None:
    """The matrix in fp16 or bf16 when that keeps every value, else None. Works in bands: no second fp32 copy."""
    for dtype in (torch.float16, torch.bfloat16):
        if weight.dtype == dtype or all(torch.equal(band.to(dtype).to(band.dtype), band) for band in torch.split(weight, BAND)):
            return weight.to(dtype)
    return None


@torch.no_grad()
def keep_half(model: Any, wanted: bool = True) -> None:
    """Put 16-bit modules in place of embedding and head where the model computes in fp32 on a CPU and no value changes.

    Where it does not, or they are not `wanted`, a weight that was loaded in its stored type gets the model's.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    compute = model.model.norm.weight.dtype
    if not wanted or compute != torch.float32 or embedding.weight.device.type != "cpu" or not cpu.library().half:
        _widen(embedding, head, compute)
        return
    tied = head.weight is embedding.weight
    made: HalfEmbedding | None = None
    if type(embedding) is nn.Embedding and (half := exact_half(embedding.weight.detach())) is not None:
        made = HalfEmbedding(embedding, half, compute)
        model.set_input_embeddings(made)
    if type(head) is nn.Linear and (made is not None or not tied):
        own = made.weight if tied and made is not None else exact_half(head.weight.detach())
        if own is not None:
            model.set_output_embeddings(HalfHead(head, own, compute, made if tied else None))
    _widen(model.get_input_embeddings(), model.get_output_embeddings(), compute)


def _widen(embedding: nn.Module, head: nn.Module, compute: torch.dtype) -> None:
    """Ordinary modules whose weight was loaded in its stored type get the type that the model computes in."""
    for module in (embedding, head):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dtype != compute:
            weight.data = weight.data.to(compute)

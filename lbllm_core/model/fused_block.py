"""A block's forward and backward pass with everything between its matrix products fused, on a GPU.

transformers computes a Llama block as some eighty small operations on float32 hidden states of 67 MB (4096 tokens of LLaMA-2-7B); at the
speed of memory these cost a quarter of a training step there, and most of it in a model of narrow blocks. Here norms (with the residual sum before them), rotary embedding and gate are
one kernel each way (`lbllm_kernels/triton_block.py`), attention is torch's fused one, and products are cuBLAS's.

The function is the block's own up to rounding: hidden states in float32, what enters a product in the compute type. Only blocks whose parts
are exactly these are taken (`suits`); everything else runs as transformers wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.hardware import Hardware
from lbllm_core.fused import between_products
from lbllm_core.model.blocks import NORMS, SITE_OF, Decoder
from lbllm_core.quant.kv_cache import fake_quantize_kv

SILU = ("SiLU", "SiLUActivation")  # torch's and transformers'
LARGE = 1 << 25  # weights of a block from which passes over memory, not launches, are what costs


def weights_of(block: nn.Module) -> int:
    """Weights in a block's linears."""
    total = 0
    for path in SITE_OF:
        module: Any = block.get_submodule(path)
        module = module[1] if isinstance(module, nn.Sequential) else module
        weight = getattr(module, "weight", None)
        total += weight.numel() if isinstance(weight, Tensor) else module.numel()
    return total


def suits(block: nn.Module, surroundings: dict[str, Any], hardware: Hardware) -> bool:
    """Whether `run` computes this block: a plain block, causal attention over everything, on a GPU."""
    if hardware.device.type != "cuda" or hardware.compute_dtype != torch.bfloat16 or between_products() is None:
        return False
    return plain(block, surroundings)


def run_block(decoder: Decoder, block: nn.Module, hidden: Tensor, surroundings: dict[str, Any], hardware: Hardware, index: int) -> Tensor:
    """A block alone on `(batch, tokens, hidden)` in the compute type, fused where that suits; the result is float32."""
    with hardware.autocast():
        if suits(block, surroundings, hardware):
            return run(block, hidden, surroundings, hardware.compute_dtype)
        return decoder.run_block(block, hidden, surroundings, index).float()


def plain(block: nn.Module, surroundings: dict[str, Any]) -> bool:
    """Whether a block has the parts that `run` knows, and sees all tokens before its own."""
    parts: Any = block
    norms = [_norm(parts, name)[0] for name in NORMS]
    known = all(hasattr(norm, "variance_epsilon") for norm in norms) and type(parts.mlp.act_fn).__name__ in SILU
    whole = all(mask is None for mask in surroundings["masks"].values())
    return known and whole and hasattr(parts.self_attn, "scaling")


def run(block: nn.Module, hidden: Tensor, surroundings: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """One block: hidden `(batch, tokens, hidden)` float32 -> the same."""
    parts: Any = block
    attention, mlp = parts.self_attn, parts.mlp
    cos, sin = (angle[0].float().contiguous() for angle in surroundings["position_embeddings"])
    norm, after = _norm(parts, NORMS[0])
    x = after(_Norm.apply(hidden, norm.weight, norm.variance_epsilon, dtype))  # type: ignore[no-untyped-call]
    q, k, v = (getattr(attention, name)(x).unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q).to(dtype), attention.k_norm(k).to(dtype)
    q, k = (_Rotated.apply(heads, cos, sin).transpose(1, 2) for heads in (q, k))  # type: ignore[no-untyped-call]
    v = v.transpose(1, 2)
    if getattr(attention, "kv_bits", 16) == 4:
        k, v = fake_quantize_kv(k), fake_quantize_kv(v)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1])
    delta = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    norm, after = _norm(parts, NORMS[1])
    hidden, x = _AddNorm.apply(hidden, delta, norm.weight, norm.variance_epsilon, dtype)  # type: ignore[no-untyped-call]
    x = after(x)
    made: Tensor = hidden + mlp.down_proj(_Gated.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-untyped-call]
    return made


def _norm(block: Any, name: str) -> tuple[Any, Any]:
    """A norm, and the activation quantizer behind it (or nothing)."""
    module = getattr(block, name)
    return (module[0], module[1]) if isinstance(module, nn.Sequential) else (module, nn.Identity())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        hidden = hidden.contiguous()
        _, out, inverse = between_products().norm_forward(hidden, None, weight, eps, dtype)
        ctx.save_for_backward(hidden, weight, inverse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        to_hidden = between_products().norm_backward(hidden, weight, inverse, grad, None)[0] if ctx.needs_input_grad[0] else None
        return to_hidden, _to_norm(hidden, weight, inverse, grad) if ctx.needs_input_grad[1] else None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        summed, out, inverse = between_products().norm_forward(hidden.contiguous(), delta.contiguous(), weight, eps, dtype)
        ctx.save_for_backward(summed, weight, inverse)
        return summed, out

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        summed, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        to_x, to_delta = between_products().norm_backward(summed, weight, inverse, grad, grad_sum.contiguous())
        return to_x, to_delta, _to_norm(summed, weight, inverse, grad) if ctx.needs_input_grad[2] else None, None, None


def _to_norm(value: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a norm's weight: what entered it `(..., width)`, its weight, 1 / rms `(...)`, gradient of its output."""
    return (grad.float() * value * inverse[..., None]).flatten(0, -2).sum(0).to(weight.dtype)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return between_products().rotated(heads.contiguous(), cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return between_products().rotated(grad.contiguous(), *ctx.saved_tensors, back=True), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return between_products().gated(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return between_products().gated_backward(*ctx.saved_tensors, grad.contiguous())  # type: ignore[no-any-return]

"""KV4: keys and values in four bits.

During generation the cache of keys and values grows with every token. Each (token, head) vector is stored as asymmetric
4-bit codes with a float16 scale and a float16 minimum: `4 + 32 / head_dim` bits an element, 4.5 at head size 64. Keys are
quantized after the rotary embedding, and the current token's own key and value pass through the same rounding, so what a
model scores in one long pass is what it would score token by token. Stage 1 makes keys flat for it beforehand (`model/key_smoothing.py`).

It is switched on by name: transformers looks attention functions up in a registry, `lbllm` is one of them, and it does
nothing but round keys and values before handing over to the standard one. No model code is touched. A real 4-bit cache
(`lbllm_core/model/cache.py`) marks what it returns, and that is not rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "lbllm"
STEPS = 15
CACHED = "from_kv4_cache"  # attribute of tensors that a 4-bit cache made (lbllm_core/model/cache.py)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys or values `(batch, heads, tokens, head_dim)` -> codes u8 `(..., ceil(head_dim / 2))`, two in a byte, low one first; scale, minimum fp16."""
    codes, scale, low = _codes(x)
    codes = nn.functional.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale, low


def dequantize_kv(packed: Tensor, scale: Tensor, low: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """What `quantize_kv` stored, as floats: `code * scale + low` in fp32, rounded once to `dtype`."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :head_dim]
    return (codes.float() * scale.float() + low.float()).to(dtype)


def _codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 as floats; scale and minimum fp16."""
    wide = x.float()
    low = wide.amin(-1, keepdim=True).half()
    scale = ((wide.amax(-1, keepdim=True) - low.float()) / STEPS).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((wide - low.float()) / scale.float()).round().clamp(0, STEPS), scale, low


def fake_quantize_kv(x: Tensor) -> Tensor:
    """Four-bit round trip of keys or values `(batch, heads, tokens, head_dim)`, same shape and type; straight-through gradient."""
    codes, scale, low = _codes(x.detach())
    made = codes * scale.float() + low.float()
    return made.to(x.dtype) + (x - x.detach())  # the value is `made` to the bit


def rounding(standard: Callable[..., Any]) -> Callable[..., Any]:
    """`standard` attention on keys and values as a 4-bit cache would return them, where the module asks for it."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        if getattr(module, "kv_bits", 16) == 4 and not hasattr(key, CACHED):
            key, value = fake_quantize_kv(key), fake_quantize_kv(value)
        return standard(module, query, key, value, attention_mask, **kwargs)

    return attention


def register() -> None:
    """Make `attn_implementation="lbllm"` known to transformers; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    registry = AttentionInterface()
    if NAME not in registry:
        AttentionInterface.register(NAME, rounding(registry["sdpa"]))
        AttentionMaskInterface.register(NAME, sdpa_mask)


def set_kv_bits(model: nn.Module, bits: int) -> None:
    """Choose 4 or 16 bits for the cache of a whole transformers model, or of blocks that belong to one."""
    register()
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            module.kv_bits = bits  # type: ignore[assignment]
            config: Any = module.config
            config._attn_implementation = NAME

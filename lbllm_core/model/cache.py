"""The cache of keys and values that a model generates with: four bits, or floats that grow in place.

**Four bits** (`KV4Layer`, where the scheme says `kv_bits=4`). Each (token, head) vector of keys, after the rotary embedding, and of values is
stored as codes, two in a byte, with an fp16 scale and an fp16 minimum: `4 + 32 / head_dim` bits an element, 4.5 at head size 64. Attention
gets floats made from them at each step. They are the floats that `kv_cache.fake_quantize_kv` makes, to the bit, so a model scores a
text in one pass as it would have generated it token by token.

**Floats** (`GrowingLayer`). transformers' own dynamic cache copies all keys and values for each new token; here a new token is written
into room that was made for it, a quarter more than needed whenever it runs out, or all of it at once where the length is known beforehand
(`roomy_cache`). A tensor that is one token longer at each step is also what a GPU's allocator keeps worst: no piece that was freed fits the
next one, so pieces of every length pile up, until the device is full of them.

**Grouped queries.** Attention of one new token makes such tensors too, in float32 where several query heads share keys: no fused kernel of
torch takes both, and all keys and values are repeated for every query head first. `share_heads` lets the query heads of a group stand as
queries of one head instead, which for a single token is the same sum and copies nothing.

**Where they come from.** `install_cache` adds a hook to the decoder that puts these layers into the empty dynamic cache of a new
generation. A cache that the caller filled, or of another kind (sliding windows, static, offloaded), is left as it is.

**Shapes.** keys and values `(batch, heads, tokens, head_dim)`; codes `(batch, heads, tokens, head_dim / 2)` u8.
**Trade-off.** Floats are made anew from all codes at each step: memory is what four bits save here, not time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from lbllm_core.quant.kv_cache import CACHED, dequantize_kv, quantize_kv

GROWTH = 4  # a full room is made anew with 1/4 more than is needed
LEAST = 64  # tokens
SHARED = "lbllm_shared_heads"  # the name under which transformers knows attention of `share_heads`


def appended(held: Tensor, room: Tensor, new: Tensor, least: int = LEAST) -> tuple[Tensor, Tensor]:
    """`held` with `new` behind it along dim -2, and its room, of at least `least` tokens. `held` is used in place when it is the beginning of `room`."""
    seen, total = held.shape[-2], held.shape[-2] + new.shape[-2]
    fits = room.shape[-2] >= total and room.shape[:-2] == new.shape[:-2] and held.data_ptr() == room.data_ptr() and held.shape[:-2] == room.shape[:-2]
    if not fits:
        grown = new.new_empty((*new.shape[:-2], max(least, total + total // GROWTH), new.shape[-1]))
        if seen:
            grown[..., :seen, :] = held
        room = grown
    room[..., seen:total, :] = new
    return room[..., :total, :], room


def emptied(layer: Any) -> None:
    """Drop keys and values; transformers 5.17 only zeroes them."""
    layer.keys = layer.values = None
    layer.is_initialized = False


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Float keys and values; a new token is written, not everything copied. `room`: tokens that there is room for at once."""

    def __init__(self, room: int = LEAST, **kwargs: Any):
        super().__init__(**kwargs)
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, heads, new, head_dim)`; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self.key_room, self.value_room = self.keys, self.values
        self.keys, self.key_room = appended(self.keys, self.key_room, key_states, self.room)
        self.values, self.value_room = appended(self.values, self.value_room, value_states, self.room)
        return self.keys, self.values

    def reset(self) -> None:
        """Empty, as new."""
        super().reset()
        emptied(self)
        for room in ("key_room", "value_room"):
            self.__dict__.pop(room, None)


def roomy_cache(config: Any, tokens: int) -> Any:
    """An empty dynamic cache for the transformers configuration, whose room for `tokens` tokens is made with the first of them.

    A sliding window that is shorter than that stays transformers' own layer.
    """
    cache = DynamicCache(config=config)
    made = []
    for layer in cache.layers:
        ours = type(layer) is DynamicLayer or (layer.is_sliding and layer.sliding_window >= tokens)
        made.append(GrowingLayer(tokens) if ours else layer)
        made[-1].is_sliding = layer.is_sliding  # decides which mask the block is given
    cache.layers = made
    return cache


def sharing(standard: Callable[..., Any]) -> Callable[..., Any]:
    """`standard` attention, where one unmasked query `(batch, heads, 1, head_dim)` meets `(batch, kv_heads, tokens, head_dim)` by groups of heads."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any) -> Any:
        heads, groups = query.shape[1], key.shape[1]
        if query.shape[2] != 1 or attention_mask is not None or heads == groups:
            return standard(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        folded = query.reshape(query.shape[0], groups, heads // groups, query.shape[-1])
        made = nn.functional.scaled_dot_product_attention(folded, key, value, scale=scaling)
        return made.reshape(query.shape[0], 1, heads, value.shape[-1]), None

    return attention


def share_heads(model: Any) -> None:
    """Let a transformers causal LM that attends with `sdpa`, and is not trained, generate without copies of keys and values; harmless to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    registry = AttentionInterface()
    if model.config._attn_implementation != "sdpa":
        return
    if SHARED not in registry:
        AttentionInterface.register(SHARED, sharing(registry["sdpa"]))
        AttentionMaskInterface.register(SHARED, sdpa_mask)
    model.config._attn_implementation = SHARED


PARTS = ("keys", "key_scale", "key_low", "values", "value_scale", "value_low")


class KV4Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in four bits. `keys` and `values` hold the codes, so that a count of their tokens is right."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, heads, new, head_dim)`, rounded to four bits; all keys and values as floats of the same type."""
        new = dict(zip(PARTS, (*quantize_kv(key_states), *quantize_kv(value_states)), strict=True))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = {name: part[..., :0, :] for name, part in new.items()}
            for name, part in self.rooms.items():
                setattr(self, name, part)
        for name, part in new.items():
            held, self.rooms[name] = appended(getattr(self, name), self.rooms[name], part)
            setattr(self, name, held)
        width = key_states.shape[-1]
        keys = dequantize_kv(self.keys, self.key_scale, self.key_low, width, self.dtype)
        values = dequantize_kv(self.values, self.value_scale, self.value_low, value_states.shape[-1], self.dtype)
        for made in (keys, values):
            setattr(made, CACHED, True)  # attention must not round them a second time
        return keys, values

    def _each(self, change: Any) -> None:
        if self.get_seq_length() > 0:
            for name in PARTS:
                setattr(self, name, change(getattr(self, name)))

    def reset(self) -> None:
        """Empty, as new."""
        super().reset()
        emptied(self)
        self.rooms = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            self._each(lambda part: part[..., :tokens_to_remove, :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order (beam search)."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times."""
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self._each(lambda part: part[indices, ...])

    def offload(self) -> None:
        """Move to the CPU."""
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back."""
        self._each(lambda part: part.to(self.device, non_blocking=True))


def cache_bytes(cache: Any) -> int:
    """Bytes that the cached tokens take (without the room that waits for more)."""
    total = 0
    for layer in cache.layers:
        parts = [getattr(layer, name) for name in PARTS] if isinstance(layer, KV4Layer) else [layer.keys, layer.values]
        total += sum(p.numel() * p.element_size() for p in parts)
    return total


def install_cache(model: Any, kv_bits: int) -> None:
    """Let a causal LM generate with the layers above; harmless to repeat. Attention rounds what no cache has rounded (`set_kv_bits`)."""
    base = model.model
    base.kv_cache_layer = KV4Layer if kv_bits == 4 else GrowingLayer
    if not any(hook is _fill_empty_cache for hook in base._forward_pre_hooks.values()):
        base.register_forward_pre_hook(_fill_empty_cache, with_kwargs=True)


def _fill_empty_cache(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    cache: Any = kwargs.get("past_key_values")
    config: Any = base.config
    wanted = kwargs.get("use_cache")
    if cache is None and (config.use_cache if wanted is None else wanted) and len(args) < 4:
        cache = DynamicCache(config=config)
        kwargs = {**kwargs, "past_key_values": cache, "use_cache": True}
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or any(layer.is_initialized for layer in cache.layers):
        return None if cache is None else (args, kwargs)
    kind: Any = base.kv_cache_layer
    if not cache.layers:
        cache.layer_class_to_replicate = kind
    cache.layers = [kind() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return args, kwargs

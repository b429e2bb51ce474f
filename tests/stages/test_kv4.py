"""KV4: what four bits do to keys and values, and that one long pass scores what decoding token by token scores."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from lbllm_core.model.blocks import Decoder
from lbllm_core.quant.kv_cache import NAME, fake_quantize_kv, register, set_kv_bits

IDS = torch.randint(1, 60, (2, 18), generator=torch.Generator().manual_seed(0))


def keys(seed=0, dtype=torch.float32, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 40, size, generator=g) * torch.exp(2 * torch.randn(2, 3, 40, 1, generator=g))
    x[0, 0, 0] = 0
    x[0, 0, 1] = 2.5
    x[0, 1] = x[0, 1].abs() + 1
    return x.to(dtype)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_error_is_half_a_step_of_each_vector(size):
    x = keys(size=size)
    made = fake_quantize_kv(x)
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    coarse = 2**-10 * x.abs().amax(-1, keepdim=True)  # scale and minimum are float16
    assert bool(((made - x).abs() <= 0.5 * spread / 15 + coarse + 1e-6).all())
    assert max(len(v.unique()) for v in made.flatten(0, 2)) <= 16
    assert bool((made[0, 0, 0] == 0).all())
    assert bool((made[0, 0, 1] == 2.5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_changes_little(dtype):
    """A value that comes back from the cache is rounded to itself, up to float16 scale and minimum."""
    once = fake_quantize_kv(keys(dtype=dtype))
    twice = fake_quantize_kv(once)
    assert once.dtype == twice.dtype == dtype
    size = once.float().abs().amax(-1, keepdim=True)
    assert float(((twice.float() - once.float()).abs() / size.clamp_min(1e-6)).max()) < (2e-3 if dtype == torch.float32 else 1e-2)


def test_vectors_are_independent():
    x = keys()
    made = fake_quantize_kv(x)
    assert torch.equal(fake_quantize_kv(x[:, 1:2, 5:9]), made[:, 1:2, 5:9])


def test_gradient_is_straight_through():
    x = keys().requires_grad_()
    weight = keys(seed=1)
    (grad,) = torch.autograd.grad((fake_quantize_kv(x) * weight).sum(), x)
    assert torch.equal(grad, weight)


def test_switching_on_and_off(make_model, family):
    model = make_model(family)
    before = model(IDS, use_cache=False).logits
    set_kv_bits(model, 4)
    four = model(IDS, use_cache=False).logits
    assert 1e-3 < float((four - before).abs().max()) < 3
    assert torch.equal(Decoder(model).forward(IDS), four)
    set_kv_bits(model, 16)
    assert torch.allclose(model(IDS, use_cache=False).logits, before, atol=1e-6)


def test_a_single_block_can_be_switched(make_model):
    model = make_model("llama")
    before = model(IDS, use_cache=False).logits
    both = make_model("llama")
    set_kv_bits(both, 4)
    set_kv_bits(model.model.layers[1], 4)
    logits = model(IDS, use_cache=False).logits
    assert not torch.allclose(logits, before, atol=1e-3)
    assert not torch.allclose(logits, both(IDS, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 16])
def test_one_long_pass_is_decoding_token_by_token(make_model, family, bits):
    model = make_model(family)
    set_kv_bits(model, bits)
    whole = model(IDS, use_cache=False).logits
    cache, pieces = None, []
    for first, last in [(0, 5), *((i, i + 1) for i in range(5, IDS.shape[1]))]:  # a prompt, then one at a time
        out = model(IDS[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    decoded = torch.cat(pieces, 1)
    # a key that lies on a boundary may fall either way between two float32 orders of addition; hardly any does
    close = (decoded - whole).abs().amax((0, 2)) < 1e-4
    assert int(close.sum()) >= IDS.shape[1] - 1
    assert float((decoded - whole).abs().max()) < 0.05


@pytest.mark.parametrize("bits", [4, 16])
def test_keys_and_values_are_rounded_and_queries_are_not(bits):
    register()
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=g) for heads in (4, 4, 4))
    module = torch.nn.Module()
    module.kv_bits, module.is_causal, module.num_key_value_groups = bits, True, 1
    made, _ = AttentionInterface()[NAME](module, query, key, value, None)
    stored = (fake_quantize_kv(key), fake_quantize_kv(value)) if bits == 4 else (key, value)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *stored, is_causal=True).transpose(1, 2)
    assert torch.allclose(made, expected, atol=1e-6)

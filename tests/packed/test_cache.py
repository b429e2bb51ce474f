"""The caches of generation: four bits as the fake quantizer rounds them, floats that grow in place, and the memory both take."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from lbllm_core.model.cache import GrowingLayer, KV4Layer, appended, cache_bytes, roomy_cache, sharing
from lbllm_core.model.packed_folder import load_packed, pack_student
from lbllm_core.quant.kv_cache import dequantize_kv, fake_quantize_kv, quantize_kv

IDS = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[4, 16])
def model(request, scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher("qwen3")
    pack_student(teacher, make_student(teacher, scheme), tmp_path, dataclasses.replace(scheme, kv_bits=request.param))
    made = load_packed(tmp_path)
    made.bits = request.param
    return made


def plain(model):
    """The model with transformers' own cache: the fake quantizer rounds in attention."""
    twin = copy.deepcopy(model)
    twin.model._forward_pre_hooks.clear()
    return twin


@torch.no_grad()
def in_steps(model, ids, sizes, cache=None):
    """Logits of every token, fed in pieces."""
    parts, at = [], 0
    for size in sizes:
        out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache, at = out.past_key_values, at + size
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("head_dim", [1, 7, 12, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_give_what_the_fake_quantizer_gives(head_dim, dtype):
    x = (torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(head_dim)) * 3).to(dtype)
    x[0, 0, 0] = 2.5  # a constant vector has no range
    packed, scale, low = quantize_kv(x)
    assert packed.shape == (2, 3, 5, -(-head_dim // 2))
    assert torch.equal(dequantize_kv(packed, scale, low, head_dim, dtype), fake_quantize_kv(x))


def test_steps_are_one_pass(model):
    """Token by token, in pieces, and in one pass without a cache: the same model. Float orders differ between them, codes may not."""
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    for sizes in ([20], [7, 13], [19, 1], [1] * 20):
        logits, cache = in_steps(model, IDS, sizes)
        assert cache.get_seq_length() == 20
        expected, _ = in_steps(plain(model), IDS, sizes)
        if model.bits == 16:
            assert torch.equal(logits, expected)
        if sizes == [20]:
            assert torch.equal(logits, whole)


def test_four_bits_are_the_fake_quantizer_to_the_bit(model):
    """A cache that stores floats which were rounded before gives attention the same floats as one that stores codes."""
    if model.bits != 4:
        pytest.skip("four bits only")

    class Rounded(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            keys, values = super().update(fake_quantize_kv(key_states), fake_quantize_kv(value_states))
            keys, values = keys.clone(), values.clone()
            keys.from_kv4_cache = True
            return keys, values

    for sizes in ([12, 8], [12, *[1] * 8]):
        reference = DynamicCache()
        reference.layers = [Rounded() for _ in range(2)]
        logits, _ = in_steps(model, IDS, sizes)
        assert torch.equal(logits, in_steps(plain(model), IDS, sizes, reference)[0])


def test_generate_takes_the_cache_by_itself(model):
    kinds = {4: KV4Layer, 16: GrowingLayer}
    out = model.generate(IDS, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0, eos_token_id=None)
    assert all(type(layer) is kinds[model.bits] for layer in out.past_key_values.layers)
    assert out.past_key_values.get_seq_length() == 31
    tokens = IDS
    for logits in out.logits:  # greedy, step by step
        tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(out.sequences, tokens)
    beams = model.generate(IDS, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    if model.bits == 16:
        assert torch.equal(beams, plain(model).generate(IDS, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None))


def test_memory_is_what_is_claimed(model):
    _, cache = in_steps(model, IDS, [20])
    elements = 2 * 2 * IDS.numel() * 2 * 12  # keys and values, blocks, tokens, heads, head size
    assert 8 * cache_bytes(cache) == (4 * elements + 32 * elements // 12 if model.bits == 4 else 32 * elements)


def test_head_size_64_takes_four_and_a_half_bits():
    layer = KV4Layer()
    layer.update(torch.randn(1, 3, 100, 64), torch.randn(1, 3, 100, 64))
    cache = DynamicCache()
    cache.layers = [layer]
    assert 8 * cache_bytes(cache) == 4.5 * 2 * 3 * 100 * 64


def test_room_grows_now_and_then():
    rooms = set()
    layer = GrowingLayer()
    for _ in range(200):
        layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        rooms.add(layer.key_room.data_ptr())
    assert len(rooms) <= 8
    assert layer.keys.shape == (1, 2, 200, 8)


@pytest.mark.parametrize("window", [0, 8, 20, 40])
def test_room_for_all_tokens_at_once(make_teacher, window):
    """The same logits as with transformers' own cache, and one room; a window that is shorter stays transformers' own."""
    teacher = make_teacher("mistral" if window else "llama")
    if window:
        teacher.config.sliding_window = window
    own, _ = in_steps(teacher, IDS, [3, *[1] * 17], DynamicCache(config=teacher.config))
    cache = roomy_cache(teacher.config, 20)
    made, _ = in_steps(teacher, IDS, [3, *[1] * 17], cache)
    assert torch.equal(made, own)
    assert [type(layer) is GrowingLayer for layer in cache.layers] == [not 0 < window < 20] * 2
    assert window == 8 or all(layer.key_room.shape[-2] == 20 for layer in cache.layers)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_that_share_keys_attend_as_before(kv_heads):
    g = torch.Generator().manual_seed(kv_heads)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // kv_heads, True
    standard = AttentionInterface()["sdpa"]
    for tokens, queries in ((1, 1), (7, 1), (7, 7)):
        query, key, value = (torch.randn(3, heads, n, 16, generator=g) for heads, n in ((4, queries), (kv_heads, tokens), (kv_heads, tokens)))
        for mask in (None, torch.ones(3, 1, queries, tokens, dtype=torch.bool).tril(tokens - queries)):
            wanted, _ = standard(module, query, key, value, mask, scaling=0.3)
            made, _ = sharing(standard)(module, query, key, value, mask, scaling=0.3)
            assert made.shape == wanted.shape == (3, queries, 4, 16)
            assert (made - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [GrowingLayer, KV4Layer])
def test_every_operation_of_a_cache_layer(kind):
    """Against transformers' own layer on the same tensors (rounded first, for four bits)."""
    g = torch.Generator().manual_seed(0)

    def new(tokens, batch):
        return torch.randn(batch, 2, tokens, 8, generator=g), torch.randn(batch, 2, tokens, 8, generator=g)

    ours, theirs = kind(), DynamicLayer()

    def step(tokens, batch=3):
        k, v = new(tokens, batch)
        mine = ours.update(k, v)
        other = theirs.update(fake_quantize_kv(k), fake_quantize_kv(v)) if kind is KV4Layer else theirs.update(k, v)
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)

    step(5), step(1)
    for change in (
        lambda c: c.crop(-2), lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), lambda c: c.batch_select_indices(torch.tensor([0, 2, 2])),
        lambda c: c.offload(), lambda c: c.prefetch(), lambda c: c.crop(0),
    ):  # fmt: skip
        change(ours), change(theirs)
        step(1)
        step(70)
    ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
    step(1, batch=6)
    if kind is KV4Layer:  # the other's crop is transformers' own
        with pytest.raises(ValueError, match="negative"):
            ours.crop(3)
    twin = copy.deepcopy(ours)
    step(1, batch=6)
    assert twin.get_seq_length() == ours.get_seq_length() - 1
    ours.reset()
    theirs = DynamicLayer()  # what its own reset leaves differs between releases
    step(3, batch=1)


def test_appending_never_writes_into_what_others_hold():
    room = torch.zeros(1, 1, 0, 2)
    held, room = appended(room, room, torch.ones(1, 1, 3, 2))
    twin = held.clone()
    other, _ = appended(twin, room, torch.full((1, 1, 1, 2), 2.0))
    assert other.shape[-2] == 4
    assert torch.equal(held, torch.ones(1, 1, 3, 2))


def test_other_caches_are_left_alone(model):
    filled = DynamicCache()
    with torch.no_grad():
        plain(model)(IDS[:, :4], past_key_values=filled, use_cache=True)
        model(IDS[:, 4:6], past_key_values=filled, use_cache=True)
        assert all(type(layer) is DynamicLayer for layer in filled.layers)
        static = StaticCache(config=model.config, max_cache_len=32)
        out = model(IDS[:1], past_key_values=static, use_cache=True)
    assert out.past_key_values is static
    assert model(IDS, use_cache=False).past_key_values is None

"""Smoothed keys: the same function in other numbers, flatter vectors for a 4-bit cache, and a step of its own in the cache of results."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lbllm_core.config import PtqInitConfig, RunConfig, SchemeConfig, config_from_dict
from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import HiddenStates
from lbllm_core.errors import ModelError
from lbllm_core.model.blocks import Decoder, linears_of
from lbllm_core.model.key_smoothing import KEY, QUERY, KeyTransform, fit, fold, foldable, query_energy, rotated, score_error, turned
from lbllm_core.pipeline import SPECS, baseline_steps, spec_of
from lbllm_core.quant.kv_cache import fake_quantize_kv
from lbllm_core.stages import ptq_init
from lbllm_core.stages.ptq_init import collect_keys, quantize_block, smooth_keys

CPU = Hardware(torch.device("cpu"), torch.float32)
FOLDED = ("llama", "qwen2", "mistral")
SCHEME = SchemeConfig(level_mode="explicit", group_size=8, kv_bits=4)
ROUNDED = PtqInitConfig(method="rtn", error_compensation=False, smoothing_exponent=0.0)


def job_of(model, index=1, tokens=24, sequences=4):
    hidden = torch.randn(sequences, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden[..., 7] += 4  # keys get a mean, as those of trained models have one
    view = Decoder(model)
    return BlockJob(index, view.blocks[index], HiddenStates.of(hidden), None, view, view.surroundings(hidden[:1]), CPU)


def values(block):
    linears = linears_of(block)
    return {p: m.weight.detach().clone() for p, m in linears.items()}, {p: m.bias.detach().clone() for p, m in linears.items() if m.bias is not None}


def with_values(block, weights, biases):
    made = copy.deepcopy(block)
    for path, linear in linears_of(made).items():
        linear.weight.data = weights[path]
        if path in biases:
            linear.bias.data = biases[path]
    return made


def random_transform(heads=2, pairs=4):
    g = torch.Generator().manual_seed(5)
    return KeyTransform(torch.exp(torch.randn(heads, pairs, generator=g)), 3 * torch.randn(heads, pairs, generator=g))


def spiked(tokens=300, heads=2, head_dim=8):
    """Keys with means of both signs, large in two pairs, and queries' energy."""
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(tokens, heads, head_dim, generator=g)
    keys[..., 1] += 12
    keys[..., 6] -= 9
    return keys, torch.rand(heads, head_dim // 2, generator=g) + 0.5


@pytest.mark.parametrize("family", FOLDED)
def test_block_computes_the_same_with_any_transform(make_model, family):
    """GQA (four query heads on two key heads) and, in Qwen2, biases."""
    job = job_of(make_model(family))
    block = job.teacher_block
    weights, biases = values(block)
    folded, shifted = fold(weights, biases, random_transform())
    assert (KEY in shifted) == (QUERY in shifted) == (family == "qwen2")
    before, after = (job.run(b, job.inputs.whole()) for b in (block, with_values(block, folded, shifted)))
    change = (before - job.inputs.whole()).square().mean().sqrt()
    assert float((after - before).square().mean().sqrt()) < 1e-5 * float(change)
    for path in linears_of(block):
        assert torch.equal(folded[path], weights[path]) == (path not in (KEY, QUERY))
    assert all(torch.equal(a, linear.weight) for a, linear in zip(weights.values(), linears_of(block).values(), strict=True))  # inputs stay


def test_pairs_that_are_not_tied_would_be_another_function(make_model):
    """The test above can fail: neighbours (0, 1), (2, 3) turned instead of (i, i + head_dim / 2)."""
    job = job_of(make_model("llama"))
    weights, biases = values(job.teacher_block)
    order = torch.arange(8).reshape(4, 2).T.reshape(-1)
    rows = torch.cat([order + 8 * head for head in range(4)])
    mixed = {path: weights[path][rows[: len(weights[path])]] for path in (KEY, QUERY)}
    folded, _ = fold(mixed, {}, random_transform())
    back = {path: torch.empty_like(w).index_copy_(0, rows[: len(w)], w) for path, w in folded.items()}
    assert ptq_init._moved(job, weights | back, biases) > 0.01
    assert ptq_init._moved(job, *fold(weights, biases, random_transform())) < 1e-8


def test_rotation_is_that_of_transformers_and_can_be_swapped_with_turning():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 11, 2, 8, generator=g)
    angles = torch.rand(1, 11, 4, generator=g).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    assert torch.allclose(rotated(x, cos, sin).transpose(1, 2), expected, atol=1e-6)
    t = random_transform()
    assert torch.allclose(turned(rotated(x, cos, sin), t.scale, t.angle), rotated(turned(x, t.scale, t.angle), cos, sin), atol=1e-4)


def test_fit_finds_a_flatter_vector_and_says_by_how_much():
    keys, energy = spiked()
    transform, left = fit(keys, energy)
    none = KeyTransform(torch.ones(2, 4), torch.zeros(2, 4))
    assert torch.allclose(left.log(), score_error(keys, energy, transform) - score_error(keys, energy, none), atol=1e-5)
    assert float(left.max()) < 0.35
    assert torch.allclose(transform.scale.log().mean(-1), torch.zeros(2), atol=1e-5)
    scaled_only = KeyTransform(transform.scale, torch.zeros(2, 4))
    assert bool((score_error(keys, energy, transform) < score_error(keys, energy, scaled_only) - 0.2).all())  # turning has its part


def test_left_over_error_is_what_rounding_measures():
    """`left` against the squared error of real scores under the cache's own rounding."""
    keys, _ = spiked(tokens=400)
    queries = torch.randn(200, 2, 8, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 0.5, 2.0, 1.0] * 2)
    transform, left = fit(keys, query_energy(queries, 2))

    def error(k, q):
        rounded = fake_quantize_kv(k.transpose(0, 1)[None])[0]  # (heads, tokens, head_dim)
        return (torch.einsum("qhd,hkd->hqk", q, rounded) - torch.einsum("qhd,khd->hqk", q, k)).square().mean((1, 2))

    found = error(turned(keys, 1 / transform.scale, transform.angle), turned(queries, transform.scale, transform.angle)) / error(keys, queries)
    assert torch.allclose(found, left, rtol=0.25)


def test_a_head_without_gain_is_left_alone():
    """Flat keys; the fit is stopped at its start, which takes a pair's one early large value for its height."""
    flat = torch.rand(300, 2, 8, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    flat[0, 0, 1] = 20
    transform, left = fit(flat, torch.ones(2, 4) * torch.tensor([1.0, 50.0, 1.0, 1.0]), steps=0)
    assert float(left[0]) == 1
    assert torch.equal(transform.scale[0], torch.ones(4))
    assert torch.equal(transform.angle[0], torch.zeros(4))


def test_fit_is_the_same_every_time_and_takes_dead_channels():
    keys, energy = spiked()
    keys[:, :, [2, 6]] = 0
    energy[:, 2] = 0
    (a, left), (b, _) = fit(keys, energy), fit(keys, energy)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.angle, b.angle)
    assert bool(torch.isfinite(left).all())
    assert bool(torch.isfinite(a.scale).all())
    assert math.isfinite(float(a.angle.sum()))


def test_energy_is_a_mean_over_query_heads_and_tokens():
    q = torch.randn(50, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = (q[:, :2, 1] ** 2 + q[:, :2, 5] ** 2).mean()
    assert float(query_energy(q, 2)[0, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_collected_keys_are_those_of_attention(make_model, monkeypatch):
    """At positions that are not spread: what the block's own attention is given."""
    job = job_of(make_model("qwen2"))
    monkeypatch.setattr(ptq_init, "POSITIONS", 24)
    seen = []

    def watch(module, query, key, value, mask, **kwargs):
        seen.append(key)
        return torch.zeros_like(query).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("watched", watch)
    monkeypatch.setattr(job.teacher_block.self_attn.config, "_attn_implementation", "watched")
    job.run(job.teacher_block, job.inputs.whole())
    keys, _ = collect_keys(job)
    assert torch.allclose(keys, seen[0].transpose(1, 2).flatten(0, 1), atol=1e-5)


def test_collected_keys_are_spread_over_positions(make_model):
    job = job_of(make_model("llama"))
    keys = collect_keys(job)[0].reshape(4, 24, 2, 8)
    x = job.teacher_block.input_layernorm(job.inputs.whole())
    raw = job.teacher_block.self_attn.k_proj(x).reshape(4, 24, 2, 8)
    for sequence, offset in ((0, 0), (1, 13), (3, 40)):  # 64 positions
        positions = torch.tensor([0, *range(offset + 1, offset + 24)])[None]
        cos, sin = job.decoder.base.rotary_emb(x, positions)
        assert torch.allclose(keys[sequence], rotated(raw[sequence][None], cos, sin)[0], atol=1e-5)


@pytest.mark.parametrize("family", FOLDED)
def test_stage_1_smooths_keys_for_a_4_bit_cache_only(make_model, family):
    job = job_of(make_model(family))
    four, figures = quantize_block(job, SCHEME, ROUNDED, 0)
    off, without = quantize_block(job, SCHEME, PtqInitConfig(method="rtn", error_compensation=False, smoothing_exponent=0.0, key_smoothing=False), 0)
    sixteen, _ = quantize_block(job, SchemeConfig(level_mode="explicit", group_size=8), ROUNDED, 0)
    assert 0 < figures.pop("key_error_left") < 0.9
    assert figures.keys() == without.keys()
    for path, latent in four.latents.items():
        assert torch.equal(off.latents[path], sixteen.latents[path])
        assert torch.equal(latent, off.latents[path]) == (path not in (KEY, QUERY))
    if family == "qwen2":
        assert not torch.equal(four.biases[KEY], off.biases[KEY])
    made = with_values(job.teacher_block, four.latents, four.biases)  # uncompensated: still the teacher's function
    before, after = (job.run(b, job.inputs.whole()) for b in (job.teacher_block, made))
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_norms_of_keys_are_left_alone(make_model):
    job = job_of(make_model("qwen3"))
    assert not foldable(job.teacher_block.self_attn)
    weights, biases = values(job.teacher_block)
    made, _, figures = smooth_keys(job, weights, biases)
    assert all(torch.equal(made[path], weights[path]) for path in weights)
    assert figures == {}


def test_another_rotary_embedding_is_refused(make_model, monkeypatch):
    """One that pairs neighbours, as some Llama-like models do."""
    from transformers.models.llama import modeling_llama

    def neighbours(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    monkeypatch.setattr(modeling_llama, "rotate_half", neighbours)
    job = job_of(make_model("llama"))
    with pytest.raises(ModelError, match=r"block 1: .*key_smoothing=false"):
        smooth_keys(job, *values(job.teacher_block))


def test_stage_1_depends_on_the_cache_only_where_it_smooths_keys():
    def of(**changes):
        return config_from_dict({"scheme": {"kv_bits": changes.pop("kv_bits", 16)}, "ptq_init": changes})

    assert spec_of("ptq_init", RunConfig()) is SPECS["ptq_init"]
    assert not {"scheme.kv_bits", "ptq_init.key_smoothing", "ptq_init"} & set(SPECS["ptq_init"].fields)
    assert "ptq_init.smoothing_exponent" in SPECS["ptq_init"].fields
    assert spec_of("ptq_init", of(kv_bits=4, key_smoothing=False)) is SPECS["ptq_init"]
    smoothed = spec_of("ptq_init", of(kv_bits=4))
    assert set(smoothed.fields) == {*SPECS["ptq_init"].fields, "scheme.kv_bits", "ptq_init.key_smoothing"}
    assert baseline_steps(of(kv_bits=4), "rtn")[0].spec == smoothed

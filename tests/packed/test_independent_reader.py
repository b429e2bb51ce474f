"""A reader of packed folders written from the drawing in kernels/README.md alone: numpy, safetensors, json, nothing of ours.

If it finds the weights and logits that we compute with, the drawing is complete and true.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file


class Folder:
    """A packed folder as the drawing describes it."""

    def __init__(self, path):
        self.config = json.loads((path / "config.json").read_text())
        self.quantization = self.config["quantization_config"]
        assert self.quantization["quant_method"] == "lbllm"
        assert self.quantization["format_version"] == 1
        self.tensors = load_file(path / "model.safetensors")

    def levels(self, name, channels):
        """Signed levels (out, in): the four bytes of each group's word, picked by each channel's code."""
        group = self.quantization["group_size"]
        packed = self.tensors[f"{name}.codes"]
        codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(packed.shape[0], -1)[:, :channels]
        if self.quantization["level_mode"] == "explicit":
            words = self.tensors[f"{name}.levels"]
        else:
            words = self.tensors[f"{name}.codebook"][self.tensors[f"{name}.group_codes"]]
        of_channel = words.astype("<i4").view(np.int8).reshape(*words.shape, 4)[:, np.arange(channels) // group]
        return np.take_along_axis(of_channel, codes[..., None].astype(np.int64), axis=-1)[..., 0]

    def product(self, name, x, site):
        """One linear of tokens x (n, in), by the equations of "One product", in float64 where they are exact."""
        levels, scale = self.levels(name, x.shape[1]).astype(np.int64), self.tensors[f"{name}.row_scale"]
        bias = self.tensors.get(f"{name}.bias", np.float32(0))
        q, s, z = quantized(x, self.quantization["act_variant"], self.tensors[f"{site}.factors"])
        whole = (q @ levels.T - z * levels.sum(1)).astype(np.float32)
        return (s * scale) * whole + bias


def quantized(x, variant, factors):
    """Sixteen codes a token. Rounding is half to even, everything in float32."""
    clip_max, clip_min, knee_low, knee_high = factors
    top = np.float32(15 if variant == "uniform" else 127)
    low = clip_min * np.minimum(x.min(1, keepdims=True), np.float32(0))
    s = (clip_max * np.maximum(x.max(1, keepdims=True), np.float32(0)) - low) / top
    z = np.clip(np.rint(-low / s), 0, top)
    if variant == "uniform":
        return np.clip(np.rint(x / s) + z, 0, top).astype(np.int64), s, z.astype(np.int64)
    a, b = np.rint(knee_low * z), np.rint(knee_high * (top - z))
    tail, core = np.arange(4, dtype=np.float32), np.arange(8, dtype=np.float32)
    values = np.concatenate([np.rint(tail * (z - a) / 4), z - a + np.rint(core * (a + b) / 7), z + b + np.rint((tail + 1) * (top - z - b) / 4)], axis=1)
    index = (x / s + z)[:, :, None] > (values[:, None, 1:] + values[:, None, :-1]) / 2
    return np.take_along_axis(values, index.sum(-1), axis=1).astype(np.int64), s, z.astype(np.int64)


def logits(folder, ids):
    """A Llama in float32 around those products."""
    c, t = folder.config, folder.tensors
    heads, kv, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    eps, base, n = c["rms_norm_eps"], c["rope_parameters"]["rope_theta"], len(ids)

    def norm(x, name):
        return (x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps)).astype(np.float32) * t[f"{name}.weight"].astype(np.float32)

    angle = np.arange(n)[:, None] / base ** (np.arange(0, d, 2) / d)
    cos, sin = np.cos(np.concatenate([angle, angle], 1)), np.sin(np.concatenate([angle, angle], 1))

    def rotate(x):
        return x * cos[:, None] + np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin[:, None]

    x = t["model.embed_tokens.weight"].astype(np.float32)[ids]
    for i in range(c["num_hidden_layers"]):
        block = f"model.layers.{i}"
        h = norm(x, f"{block}.input_layernorm")
        q, k, v = (folder.product(f"{block}.self_attn.{p}_proj", h, f"{block}.act_sites.qkv").reshape(n, -1, d) for p in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(m, heads // kv, axis=1) for m in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d) + np.triu(np.full((n, n), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v).reshape(n, -1).astype(np.float32)
        x = x + folder.product(f"{block}.self_attn.o_proj", mixed, f"{block}.act_sites.o")
        h = norm(x, f"{block}.post_attention_layernorm")
        gate, up = (folder.product(f"{block}.mlp.{p}_proj", h, f"{block}.act_sites.gate_up") for p in ("gate", "up"))
        x = x + folder.product(f"{block}.mlp.down_proj", (gate / (1 + np.exp(-gate)) * up).astype(np.float32), f"{block}.act_sites.down")
    return norm(x, "model.norm") @ t["model.embed_tokens.weight"].astype(np.float32).T


@pytest.fixture(params=["codebook", "explicit"])
def packed(request, scheme, explicit_scheme, make_teacher, make_student, tmp_path):
    from lbllm_core.model.packed_folder import pack_student

    teacher = make_teacher()
    form = dataclasses.replace(scheme if request.param == "codebook" else explicit_scheme, kv_bits=16)
    pack_student(teacher, make_student(teacher, form), tmp_path, form)
    return tmp_path


def test_every_weight_is_found(packed):
    from lbllm_kernels.format import dequantize

    from lbllm_core.model.packed import packed_linears
    from lbllm_core.model.packed_folder import load_packed

    folder = Folder(packed)
    for name, linear in packed_linears(load_packed(packed)):
        weight = folder.tensors[f"{name}.row_scale"][:, None] * folder.levels(name, linear.in_features).astype(np.float32)
        assert np.array_equal(weight, dequantize(linear.packed()).numpy()), name


def test_the_first_product_is_ours_to_the_bit(packed):
    from lbllm_core.model.packed_folder import load_packed

    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    for path, site in (("self_attn.k_proj", "qkv"), ("mlp.up_proj", "gate_up")):
        ours = load_packed(packed).model.layers[1].get_submodule(path)(torch.from_numpy(x)).numpy()
        assert np.array_equal(Folder(packed).product(f"model.layers.1.{path}", x, f"model.layers.1.act_sites.{site}"), ours)


def test_logits_follow(packed):
    """Float orders differ outside of the products, so a code may flip here and there: close, not equal."""
    from lbllm_core.model.packed_folder import load_packed

    ids = np.arange(1, 15)
    with torch.no_grad():
        ours = load_packed(packed)(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    noise = ours - logits(Folder(packed), ids)
    assert 10 * np.log10((ours**2).sum() / (noise**2).sum()) > 40

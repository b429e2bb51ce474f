"""Small teachers of every supported family, and random students of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_kernels.activation import ActFactors

from lbllm_core.config import SchemeConfig
from lbllm_core.model.blocks import NORMS, SITES, Decoder, linears_of
from lbllm_core.model.student import BlockState
from lbllm_core.quant.weight import QuantizedWeight, n_groups, snap

SHAPE = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 90, "head_dim": 12}


def build_teacher(family: str = "llama", tied: bool = True, seed: int = 0):
    import transformers

    torch.manual_seed(seed)
    config_class = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[family]
    shape = {k: v for k, v in SHAPE.items() if family != "qwen2" or k != "head_dim"}
    config = getattr(transformers, config_class)(**shape, max_position_embeddings=128, tie_word_embeddings=tied, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else 1 + 0.2 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def random_weight(linear, scheme: SchemeConfig, generator) -> QuantizedWeight:
    """Levels near the weight's own range; codes at random: no fit is meant."""
    out, columns = linear.weight.shape
    groups = n_groups(columns, scheme.group_size)
    codes = torch.randint(0, 4, (out, columns), generator=generator, dtype=torch.uint8)
    row_scale = torch.rand(out, generator=generator) * 2e-3 + 1e-3

    def levels(*shape):
        return (torch.randn(*shape, 4, generator=generator) * 60).clamp(-127, 127).sort(-1).values

    if scheme.level_mode == "explicit":
        return snap(QuantizedWeight(codes, row_scale, scheme.group_size, levels=levels(out, groups)))
    entries = min(scheme.codebook_size, 40)
    group_codes = torch.randint(0, entries, (out, groups), generator=generator, dtype=torch.uint8)
    return snap(QuantizedWeight(codes, row_scale, scheme.group_size, group_codes=group_codes, codebook=levels(entries)))


def random_student(teacher, scheme: SchemeConfig, seed: int = 1) -> list[BlockState]:
    g = torch.Generator().manual_seed(seed)
    states = []
    for block in Decoder(teacher).blocks:
        linears = {path: random_weight(linear, scheme, g) for path, linear in linears_of(block).items()}
        norms = {norm: block.get_submodule(norm).weight * 1.1 for norm in NORMS}
        sites = {} if scheme.act_bits == 16 else {site: ActFactors(scheme.act_variant, 0.95, 0.9, 0.3, 0.2) for site in SITES}
        biases = {path: linear.bias + 0.01 for path, linear in linears_of(block).items() if linear.bias is not None}
        states.append(BlockState(linears=linears, norms=norms, biases=biases, sites=sites))
    return states


class FakeLinear(torch.nn.Module):
    """The float emulation: dequantized weight on `s * (q - z)`, straight from the reference quantizer."""

    def __init__(self, weight: QuantizedWeight, bias, factors):
        from lbllm_core.quant.weight import dequantize

        super().__init__()
        self.weight, self.bias, self.factors = dequantize(weight), bias, factors

    def forward(self, x):
        from lbllm_kernels.activation import dequantize_activations, quantize_activations

        hat = x if self.factors is None else dequantize_activations(*quantize_activations(x, self.factors))
        return torch.nn.functional.linear(hat, self.weight, self.bias)


def fake_quant_model(teacher, states):
    """The teacher with emulated linears and the student's norms."""
    import copy

    from lbllm_core.model.blocks import SITE_OF

    model = copy.deepcopy(teacher)
    for block, state in zip(Decoder(model).blocks, states, strict=True):
        for norm, weight in state.norms.items():
            block.get_submodule(norm).weight.copy_(weight)
        for path, weight in state.linears.items():
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, FakeLinear(weight, state.biases.get(path), state.sites.get(SITE_OF[path])))
    return model


@pytest.fixture(scope="session")
def scheme():
    return SchemeConfig(codebook_size=64)


@pytest.fixture(scope="session")
def explicit_scheme(scheme):
    return dataclasses.replace(scheme, level_mode="explicit", group_size=64, act_variant="uniform")


@pytest.fixture(scope="session")
def make_teacher():
    return build_teacher


@pytest.fixture(scope="session")
def make_student():
    return random_student


@pytest.fixture(scope="session")
def make_fake():
    return fake_quant_model

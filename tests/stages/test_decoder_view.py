"""The decoder view computes what transformers computes, and says no to what it cannot take apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lbllm_core.errors import ModelError
from lbllm_core.model.blocks import SITE_OF, SITES, Decoder, linears_of, linears_of_site

IDS = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def test_forward_is_the_model(make_model, family):
    model = make_model(family)
    expected = model(IDS, use_cache=False).logits
    assert torch.allclose(Decoder(model).forward(IDS), expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.3


@pytest.mark.parametrize("window", [6, 19, 20, 64])
def test_mistral_windows(make_model, window):
    model = make_model("mistral", sliding_window=window)
    full = make_model("mistral", sliding_window=None)
    logits = Decoder(model).forward(IDS)
    assert torch.allclose(logits, model(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    differs = not torch.allclose(logits, Decoder(full).forward(IDS), atol=1e-3)
    assert differs == (window < IDS.shape[1])


def test_blocks_with_and_without_a_window(make_model):
    """Qwen2's upper layers may slide while the lower ones do not: each block gets the mask of its own type."""
    model = make_model("qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    expected = model(IDS, use_cache=False).logits
    assert torch.allclose(Decoder(model).forward(IDS), expected, atol=1e-5, rtol=1e-5)
    plain = make_model("qwen2", num_hidden_layers=4)
    assert not torch.allclose(Decoder(plain).forward(IDS), expected, atol=1e-3)


def test_other_blocks_take_their_place(make_model):
    model, other = make_model("llama"), make_model("llama", seed=1)
    mixed = copy.deepcopy(model)
    mixed.model.layers[1] = other.model.layers[1]
    view = Decoder(model)
    logits = view.forward(IDS, [view.blocks[0], other.model.layers[1]])
    assert torch.allclose(logits, mixed(IDS, use_cache=False).logits, atol=1e-5)
    assert not torch.allclose(logits, view.forward(IDS), atol=1e-2)


def test_sites_cover_the_linears(make_model, family):
    block = Decoder(make_model(family)).blocks[0]
    found = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(linears_of(block)) == set(SITE_OF) == found
    assert [path for site in SITES for path in linears_of_site(site)] == list(SITE_OF)
    biased = {path for path, linear in linears_of(block).items() if linear.bias is not None}
    assert biased == ({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} if family == "qwen2" else set())


def refused(name):
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "pad_token_id": 0}
    shapes = {
        "Mixtral": small | {"num_key_value_heads": 2, "num_local_experts": 2},
        "Phi3": small | {"num_key_value_heads": 2},
        "Gemma": small | {"num_key_value_heads": 2, "head_dim": 8},
        "Gemma2": small | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": None},
        "Granite": small | {"num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
        "BitNet": small | {"num_key_value_heads": 2},
        "DiffLlama": small | {"num_key_value_heads": 2},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
        "OPT": {"hidden_size": 32, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "word_embed_proj_dim": 32},
    }
    config = getattr(transformers, f"{name}Config")(**shapes[name])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Mixtral", r"mixtures of experts are not supported"),
        ("Phi3", r"qkv_proj.*fused projections"),
        ("Gemma", r"not proportional to its weight"),
        ("Gemma2", r"unknown parts \[.post_feedforward_layernorm., .pre_feedforward_layernorm.\]; only"),
        ("Granite", r"embedding_multiplier"),
        ("BitNet", r"attn_sub_norm.*smoothing"),
        ("DiffLlama", r"groupnorm.*smoothing"),
        ("GPT2", r"no decoder part `embed_tokens`"),
        ("OPT", r"no decoder part"),
    ],
)
def test_refusals_name_the_reason(name, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        Decoder(refused(name))
    assert name.lower() in str(caught.value).lower()  # which model
    assert "only" in str(caught.value) or "not supported" in str(caught.value)  # and what would be accepted


def test_altered_blocks_are_refused(make_model):
    extra = make_model("llama")
    extra.model.layers[1].mlp.gate_bias = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"block 1 has other linear layers.*mlp\.gate_bias"):
        Decoder(extra)
    normed = make_model("llama")
    normed.model.layers[0].post_attention_layernorm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match=r"block 0 post_attention_layernorm"):
        Decoder(normed)
    empty = make_model("llama")
    empty.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="no decoder blocks"):
        Decoder(empty)


def test_looking_does_not_touch_the_weights(make_model):
    model = make_model("qwen3")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Decoder(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

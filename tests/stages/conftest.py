"""Small random teachers of every family that is accepted, and of some that are not."""

from __future__ import annotations

import pytest
import torch

SHAPE = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def random_model(family: str, seed: int = 0, **changes):
    """A model with weights large enough that every part of it shows in the logits; norm weights and biases are random too."""
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    extra = {"mistral": {"sliding_window": 6}, "qwen3": {"head_dim": 8}}.get(family, {})
    values = SHAPE | {"max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0} | extra | changes
    config = getattr(transformers, f"{names[family]}Config")(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5)
                else:
                    p.copy_(torch.randn_like(p) * 0.3 if name.endswith("bias") else 1 + 0.3 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param

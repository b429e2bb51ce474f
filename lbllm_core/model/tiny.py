"""`tiny`: a two-block Llama that this project trains itself, in seconds, so that tests mean something.

A randomly initialised model cannot show that quantization hurts: it has nothing to lose. This one (hidden 64, ffn 172,
4 heads on 2 key-value heads, 96 symbols, about 0.1 M parameters) learns the second-order language of
`data/synthetic.py` to a perplexity of about 1.8 (unigram: 33), and needs its weights for it: rounding them to two bits
with 32 channels a group multiplies the perplexity by more than six. 172 is divided by no group size, on purpose. The embedding is
tied to the head: an untied pair could hold pair statistics outside of the quantized linears.

Training is 360 steps of 8 x 128 symbols, matrices with orthogonalised momentum (Muon, Jordan et al. 2024: the update is
the momentum matrix with its singular values pushed to one by a Newton-Schulz iteration), the rest with AdamW. AdamW alone
needed three times the steps. One thread, fp32, seeded: equal bytes on equal machines; the folder is cached and known by
its content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lbllm_core.data.synthetic import SYMBOLS, Language

RECIPE = 1  # raise it when the trained weights change: it is part of the cache key
CONTEXT = 128
STEPS = 360
BATCH = 8
LR_MATRIX = 0.04
LR_OTHER = 1e-2
WARMUP = 20
TRAINING_STREAM = 0
END = "<end>"
VOCABULARY = (END, *SYMBOLS, *(c for c in map(chr, range(32, 127)) if c not in SYMBOLS))


def build(folder: Path, seed: int) -> None:
    """Train the model of `seed` and write it with its tokenizer as a transformers folder. About 15 s on one core."""
    model = train(seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> Any:
    """One printable ASCII character, one token; anything else is `<end>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token=END, pad_token=END, model_max_length=CONTEXT)


def architecture() -> Any:
    """The transformers configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, use_cache=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def untrained(seed: int) -> Any:
    """The architecture with seeded weights; the caller's random state is left as it was."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(architecture()).float()


def train(seed: int) -> Any:
    """The trained model of `seed`, fp32 in eval mode."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads adds in another order
    try:
        return _train(untrained(seed), training_symbols(seed))
    finally:
        torch.set_num_threads(threads)


def training_symbols(seed: int) -> Tensor:
    """Token ids `(STEPS * BATCH, CONTEXT)`; a symbol's id is its place in SYMBOLS plus one."""
    return torch.from_numpy(Language(seed).sample(STEPS * BATCH, CONTEXT, TRAINING_STREAM)) + 1


def _train(model: Any, symbols: Tensor) -> Any:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizer = torch.optim.AdamW(others, lr=LR_OTHER, betas=(0.9, 0.98), weight_decay=0.0)
    momenta = [torch.zeros_like(p) for p in matrices]
    for step, batch in enumerate(torch.split(symbols, BATCH)):
        factor = min(1.0, (step + 1) / WARMUP) * max(0.02, 1.0 - step / STEPS)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR_OTHER * factor
        optimizer.step()
        _matrix_step(matrices, momenta, LR_MATRIX * factor)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _matrix_step(matrices: list[Tensor], momenta: list[Tensor], lr: float) -> None:
    for weight, momentum in zip(matrices, momenta, strict=True):
        assert weight.grad is not None
        momentum.lerp_(weight.grad, 0.05)
        update = orthogonalize(weight.grad.lerp(momentum, 0.95))
        weight.add_(update, alpha=-lr * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near one: five steps of X <- aX + (bA + cA^2)X with A = X X^T."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def recipe_key(seed: int) -> str:
    """What the cached folder is called after: everything that decides the weights, as canonical JSON."""
    return json.dumps({"recipe": RECIPE, "seed": seed, "torch": torch.__version__.split("+")[0]}, sort_keys=True)

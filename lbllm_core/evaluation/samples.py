"""Sample texts: what teacher and packed model write after the same words, side by side.

A perplexity is a number; a person wants to see what was lost. Greedy, so that two runs write the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample_texts(models: Mapping[str, Any], tokenizer: Any, prompts: Tensor, tokens: int) -> list[dict[str, str]]:
    """For each prompt `(prompts, n)` a dictionary: `prompt`, and under each model's name up to `tokens` new tokens as text."""
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = []
    for ids in prompts:
        texts = {"prompt": tokenizer.decode(ids)}
        for name, model in models.items():
            given = ids[None].to(model.device)
            made = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, pad_token_id=end, do_sample=False, temperature=None, top_p=None, top_k=None
            )
            texts[name] = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        found.append(texts)
    return found

"""How many tokens of a stream go through a block at a time: what bounds the memory of a pass, and what an estimate counts with.

Enough to make a product worth its weights, few enough for what a block keeps of each. A narrow block on a GPU is done with so few before
the next ones are launched, so there a pass is bounded by its values.
"""

from __future__ import annotations

TOKENS = 8192
VALUES = 1 << 25  # on a GPU: 8192 tokens of LLaMA-2-7B, 58 254 of SmolLM2-135M


def tokens_a_pass(width: int, on_gpu: bool) -> int:
    """Tokens of hidden states with `width` channels."""
    return max(TOKENS, VALUES // width) if on_gpu else TOKENS

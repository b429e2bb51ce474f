"""Foldable smoothing: move outlier channels from activations into weights, at no cost.

A few channels of the residual stream are tens of times larger than the rest. A per-token 4-bit scale must cover them, and
nothing is left for the others. But `(x / s) (s W)` is the same function for any positive per-channel `s`, and the division
can be folded into whatever produced x (SmoothQuant, arXiv 2211.10438):

    site      producer of x                      folded into
    qkv       input_layernorm                    norm weight / s
    gate_up   post_attention_layernorm           norm weight / s
    down      silu(gate) * up                    rows of up_proj / s (and its bias)
    o         attention-weighted values          rows of v_proj / s, one s for a key-value head's channel (shared by its query heads)

    s_j = max|X_j|^a / max|W_j|^(1 - a),   normalised to geometric mean 1

The function of the block is unchanged and nothing is added at inference: no matrix, no rotation, no extra channel. Statistics
of the smoothed inputs follow from those of the raw ones: `X' = X / s` means `H'_ij = H_ij / (s_i s_j)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm_core.model.blocks import SITES, linears_of_site

NORM_OF_SITE = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration measured at a site: `hessian (in, in)` = sum of x x^T, `largest (in,)` = max |x|, `tokens`."""

    hessian: Tensor
    largest: Tensor
    tokens: int


def scales(largest: Tensor, weights: list[Tensor], exponent: float) -> Tensor:
    """`s (in,)` for a site from its inputs' maxima and the weights `(out, in)` that read it."""
    heaviest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    x, w = largest.clamp_min(1e-5), heaviest.clamp_min(1e-5)
    s = x.pow(exponent) / w.pow(1 - exponent)
    return s / s.log().mean().exp()


def share_over_heads(s: Tensor, head_dim: int, repeats: int) -> Tensor:
    """One scale for each channel of a key-value head, used by its `repeats` query heads: `(in,)` -> `(in,)`."""
    grouped = s.reshape(-1, repeats, head_dim)
    return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)


def smooth(
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    norms: dict[str, Tensor],
    statistics: dict[str, SiteStatistics],
    exponent: float,
    head_dim: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, SiteStatistics]]:
    """Fold smoothing into a block's weights, biases and norms, and carry the statistics along. Inputs are not modified."""
    weights, biases, norms, statistics = dict(weights), dict(biases), dict(norms), dict(statistics)
    if exponent == 0:
        return weights, biases, norms, statistics
    for site in SITES:
        readers = linears_of_site(site)
        s = scales(statistics[site].largest, [weights[p] for p in readers], exponent)
        if site == "o":
            repeats = weights["self_attn.o_proj"].shape[1] // weights["self_attn.v_proj"].shape[0]
            s = share_over_heads(s, head_dim, repeats)
        for path in readers:
            weights[path] = weights[path] * s
        _divide_producer(site, s, weights, biases, norms, head_dim)
        old = statistics[site]
        statistics[site] = SiteStatistics(old.hessian / torch.outer(s, s), old.largest / s, old.tokens)
    return weights, biases, norms, statistics


def _divide_producer(site: str, s: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor], norms: dict[str, Tensor], head_dim: int) -> None:
    if site in NORM_OF_SITE:
        norms[NORM_OF_SITE[site]] = norms[NORM_OF_SITE[site]] / s
        return
    producer = "mlp.up_proj" if site == "down" else "self_attn.v_proj"
    if site == "o":
        repeats = s.numel() // weights[producer].shape[0]
        s = s.reshape(-1, repeats, head_dim)[:, 0].reshape(-1)
    weights[producer] = weights[producer] / s[:, None]
    if producer in biases:
        biases[producer] = biases[producer] / s

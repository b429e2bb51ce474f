"""Activations as shares of their token's range, where clips and knees are constants."""

from __future__ import annotations

import torch

from lbllm_core.quant.activation_histogram import BINS, histogram, shares_of_range


def test_shares() -> None:
    x = torch.tensor([[2.0, -4.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 8.0]])
    assert shares_of_range(x).tolist() == [[1.0, -1.0, 0.5, 0.0, -0.25], [0.0] * 5, [0.125, 0.25, 0.375, 0.5, 1.0]]


def test_every_value_is_counted_once_where_it_lies() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    counts, u = histogram(x), shares_of_range(x)
    assert len(counts) == BINS
    assert sum(counts) == x.numel()
    edges = [-1 + 2 * i / BINS for i in range(BINS + 1)]
    by_hand = [sum(int(edges[i] <= v < edges[i + 1]) for v in u.flatten().tolist()) for i in range(BINS - 1)]
    assert sum(abs(a - b) for a, b in zip(counts[:-1], by_hand, strict=True)) <= 4, "float32 at the edges"
    assert counts[-1] >= 300, "the largest value of each token"
    assert counts[0] >= 300


def test_scale_does_not_matter() -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    assert histogram(x * 1024) == histogram(x)

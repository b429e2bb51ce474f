"""Error compensation: the factor of the inverse against float64, and what it buys in the layer's output."""

from __future__ import annotations

import pytest
import torch

from lbllm_core.errors import NumericalError
from lbllm_core.quant.error_compensation import inverse_factor, quantize_columns, sweep_order
from lbllm_core.quant.level_fit import fit_levels
from lbllm_core.quant.weight import dequantize, from_real_levels, nearest_codes, split_groups, take_levels


def correlated(columns, samples, seed=0):
    """Inputs `(samples, columns)` whose channels share a few directions."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, 6, generator=g) @ torch.randn(6, columns, generator=g)
    return mixed + 0.3 * torch.randn(samples, columns, generator=g)


def quantize(w, hessian, size, h, heaviest_first=False, damping=0.01):
    """Explicit levels through the sweep: dequantized weights `(out, in)`, codes, compensated weights, levels."""
    levels = torch.full((len(w), -(-w.shape[1] // size), 4), float("nan"))

    def choose(part, columns, group):
        assert sorted(columns.tolist()) == list(range(w.shape[1]))[group * size :][:size]
        levels[:, group] = fit_levels(part, h[columns])
        return levels[:, group]

    codes, latent = quantize_columns(w, hessian, damping, sweep_order(h, size, heaviest_first), choose)
    return dequantize(from_real_levels(codes, levels, size)), codes, latent, levels


def output_error(w, made, hessian):
    e = (w - made).double()
    return float(torch.trace(e @ hessian.double() @ e.T))


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_factor_against_a_float64_inverse(damping):
    x = correlated(40, 400)
    hessian = x.T @ x
    upper = inverse_factor(hessian, damping)
    h = hessian.double()
    exact = torch.linalg.inv(h + torch.eye(40, dtype=torch.float64) * damping * h.diagonal().mean())
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.double().T @ upper.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_dead_channels_and_singular_hessians():
    x = correlated(32, 10)  # rank 10 of 32
    x[:, [3, 17]] = 0
    upper = inverse_factor(x.T @ x, 0.01)
    assert bool(torch.isfinite(upper).all())
    assert bool((upper.diagonal() > 0).all())
    off = upper.clone().fill_diagonal_(0)
    assert float(off[[3, 17]].abs().max()) == 0  # a channel that is always zero has nobody to repair it, and repairs nobody
    assert float(off[:, [3, 17]].abs().max()) == 0
    assert bool(torch.isfinite(inverse_factor(torch.zeros(8, 8), 0.01)).all())


def test_hopeless_hessian_is_refused():
    with pytest.raises(NumericalError, match=r"ptq_init\.damping"):
        inverse_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 1e-6)
    with pytest.raises(NumericalError):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


@pytest.mark.parametrize("heaviest_first", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(96, 32), (300, 32), (90, 200), (150, 8)])
def test_output_error_falls(columns, size, heaviest_first):
    x = correlated(columns, 600, seed=columns)
    hessian = x.T @ x
    w = torch.randn(24, columns, generator=torch.Generator().manual_seed(1)) * 0.1
    h = hessian.diagonal()
    plain, _, untouched, _ = quantize(w, None, size, h)
    made, codes, latent, levels = quantize(w, hessian, size, h, heaviest_first)
    assert torch.equal(untouched, w)
    assert output_error(w, made, hessian) < 0.6 * output_error(w, plain, hessian)
    # what stage 2 relies on: the codes are the nearest levels of the compensated weights that are handed on
    assert torch.equal(nearest_codes(split_groups(latent, size), levels), split_groups(codes, size))


def test_diagonal_hessian_is_plain_rounding():
    w = torch.randn(12, 100, generator=torch.Generator().manual_seed(2))
    h = torch.rand(100, generator=torch.Generator().manual_seed(3)) + 0.1
    made, codes, latent, _ = quantize(w, torch.diag(h), 32, h, True)
    plain, plain_codes, _, _ = quantize(w, None, 32, h)
    assert torch.equal(codes, plain_codes)
    assert torch.equal(made, plain)
    assert torch.equal(latent, w)


def test_blocks_of_columns_do_not_change_the_result(monkeypatch):
    """Updates to the right may be applied at once or in one product: the same weights to float rounding."""
    x = correlated(160, 500, seed=4)
    w = torch.randn(8, 160, generator=torch.Generator().manual_seed(5))
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5]).expand(8, 4)
    hessian, order = x.T @ x, sweep_order(torch.ones(160), 16, False)
    _, wide = quantize_columns(w, hessian, 0.05, order, lambda *_: levels)
    monkeypatch.setattr("lbllm_core.quant.error_compensation.BLOCK", 16)
    _, narrow = quantize_columns(w, hessian, 0.05, order, lambda *_: levels)
    # a naive float64 sweep, column by column
    slow, u = w.double(), inverse_factor(hessian, 0.05).double()
    for j in range(160):
        q = take_levels(levels.double(), nearest_codes(slow[:, j : j + 1], levels.double()))
        slow[:, j + 1 :] -= (slow[:, j : j + 1] - q) / u[j, j] * u[j, j + 1 :]
    rows = ((wide - slow).abs().amax(1) < 1e-3) & ((narrow - slow).abs().amax(1) < 1e-3)
    assert int(rows.sum()) >= 6  # a tie may fall the other way in a row; more than that is a different algorithm


def test_order_visits_groups_and_columns_by_weight():
    h = torch.tensor([1.0, 2.0, 9.0, 1.0, 3.0, 3.5, 50.0])
    order = sweep_order(h, 2, True)
    assert [group for group, _ in order] == [3, 1, 2, 0]
    assert torch.cat([columns for _, columns in order]).tolist() == [6, 2, 3, 5, 4, 1, 0]
    assert torch.cat([columns for _, columns in sweep_order(h, 2, False)]).tolist() == list(range(7))


def test_heavy_channels_first_leave_less_error():
    """Channels of very different weight, in random order: the output error over a few matrices falls."""
    falls = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = correlated(192, 900, seed) * torch.exp(1.5 * torch.randn(192, generator=g))
        w, hessian = torch.randn(32, 192, generator=g), x.T @ x
        h = hessian.diagonal()
        errors = [output_error(w, quantize(w, hessian, 16, h, first)[0], hessian) for first in (False, True)]
        falls.append(errors[1] / errors[0])
    assert sum(falls) / len(falls) < 0.9, falls

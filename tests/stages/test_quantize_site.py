"""Stage 1 for the rows that share an input: importances reach the fit, modes agree in shape, controls are what they claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lbllm_core.config import PtqInitConfig, SchemeConfig
from lbllm_core.quant.weight import dequantize, group_levels, nearest_codes, snap, split_groups
from lbllm_core.stages.ptq_init import quantize_site

EXPLICIT = SchemeConfig(level_mode="explicit", group_size=32)
TABLE = SchemeConfig(group_size=16, codebook_size=32)
PLAIN = PtqInitConfig(error_compensation=False)


def weights(out=32, columns=144, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, columns, generator=g) * torch.exp(0.5 * torch.randn(out, 1, generator=g)) * 0.05


def uneven(columns=144, seed=1):
    return torch.exp(2.5 * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


def made_of(w, hessian, scheme, config, seed=2):
    return quantize_site(w, hessian, scheme, config, torch.Generator().manual_seed(seed))


def cost(w, q, h):
    return float(((w - dequantize(q)).square() * h).sum())


@pytest.mark.parametrize("scheme", [EXPLICIT, TABLE], ids=["explicit", "codebook"])
def test_levels_are_fitted_where_the_inputs_are(scheme):
    w, h = weights(), uneven()
    aware, _ = made_of(w, torch.diag(h), scheme, PLAIN)
    blind, _ = made_of(w, torch.eye(len(h)), scheme, PLAIN)
    assert cost(w, aware, h) < 0.7 * cost(w, blind, h)
    assert cost(w, blind, torch.ones_like(h)) < cost(w, aware, torch.ones_like(h))


@pytest.mark.parametrize("scheme", [EXPLICIT, TABLE], ids=["explicit", "codebook"])
def test_scale_of_inputs_and_of_rows_does_not_matter(scheme):
    w, h = weights(), uneven()
    small, _ = made_of(w, torch.diag(h), scheme, PLAIN)
    large, _ = made_of(w * 64, torch.diag(h) * 1024, scheme, PLAIN)  # powers of two: exact in float
    assert torch.allclose(dequantize(large), 64 * dequantize(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("scheme", [EXPLICIT, TABLE], ids=["explicit", "codebook"])
def test_handed_on_weights_have_these_codes(scheme, compensated):
    """Stage 2 starts from the compensated weights: their nearest levels are the codes chosen here."""
    w = weights()
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(3)) @ torch.randn(12, 144, generator=torch.Generator().manual_seed(4))
    x += 0.2 * torch.randn(500, 144, generator=torch.Generator().manual_seed(5))
    q, latent = made_of(w, x.T @ x, scheme, PtqInitConfig(error_compensation=compensated))
    levels = group_levels(q) * q.row_scale[:, None, None]
    same = nearest_codes(split_groups(latent, q.group_size), levels) == split_groups(q.codes, q.group_size)
    assert float(same.float().mean()) > 0.9999
    assert torch.equal(latent, w) == (not compensated)
    assert q.codes.shape == w.shape
    assert (q.levels is None) == (scheme is TABLE)


def test_tables_are_stored_on_the_grid():
    q, _ = made_of(weights(), torch.diag(uneven()), TABLE, PtqInitConfig())
    assert torch.equal(snap(q).codebook, q.codebook)
    assert q.codebook.shape == (32, 4)
    assert q.group_codes.dtype == torch.uint8
    assert float(q.codebook.abs().max()) <= 127


@pytest.mark.parametrize("scheme", [EXPLICIT, TABLE], ids=["explicit", "codebook"])
def test_affine_control(scheme):
    w, h = weights(), uneven()
    free, _ = made_of(w, torch.diag(h), scheme, PLAIN)
    affine, _ = made_of(w, torch.diag(h), replace(scheme, level_family="affine"), PLAIN)
    steps = group_levels(affine).diff(dim=-1)
    slack = 1e-3 if scheme is EXPLICIT else 1.001  # a table on the int8 grid is equidistant to a unit
    assert float((steps - steps.mean(-1, keepdim=True)).abs().max()) <= slack
    assert cost(w, free, h) < 0.85 * cost(w, affine, h)


def test_round_to_nearest_is_min_and_max():
    w = weights()
    q, _ = made_of(w, torch.eye(144), EXPLICIT, replace(PLAIN, method="rtn"))
    real = group_levels(q) * q.row_scale[:, None, None]
    grouped = split_groups(w, 32)
    assert torch.allclose(real[..., 0], grouped.amin(-1), rtol=1e-4, atol=1e-7)
    assert torch.allclose(real[..., 3], grouped.amax(-1), rtol=1e-4, atol=1e-7)
    fitted, _ = made_of(w, torch.eye(144), EXPLICIT, PLAIN)
    assert cost(w, fitted, torch.ones(144)) < 0.7 * cost(w, q, torch.ones(144))


def test_inverse_hessian_weights_differ_only_where_inputs_correlate():
    w, h = weights(), uneven()
    config = PtqInitConfig(damping=1e-6)
    a, _ = made_of(w, torch.diag(h), EXPLICIT, config)
    b, _ = made_of(w, torch.diag(h), EXPLICIT, replace(config, fit_weight="inverse_hessian"))
    assert torch.allclose(dequantize(a), dequantize(b), atol=1e-3 * float(w.abs().max()))
    g = torch.Generator().manual_seed(6)
    x = torch.randn(300, 5, generator=g) @ torch.randn(5, 144, generator=g) + 0.3 * torch.randn(300, 144, generator=g)
    c, _ = made_of(w, x.T @ x, EXPLICIT, config)
    d, _ = made_of(w, x.T @ x, EXPLICIT, replace(config, fit_weight="inverse_hessian"))
    assert not torch.allclose(dequantize(c), dequantize(d), atol=1e-3 * float(w.abs().max()))


def test_a_few_giants_do_not_spoil_the_rest():
    """Groups with a huge weight (the makers of massive activations) keep it, and the others keep their precision."""
    w = weights(64)
    clean, _ = made_of(w, torch.eye(144), TABLE, PLAIN)
    giant = w.clone()
    giant[5, 17], giant[40, 100] = 3.0, -4.0
    spoiled, _ = made_of(giant, torch.eye(144), TABLE, PLAIN)
    made = dequantize(spoiled)
    assert float((made[5, 17] - 3.0).abs()) < 0.5
    assert float((made[40, 100] + 4.0).abs()) < 0.7
    others = torch.ones(64, dtype=torch.bool)
    others[[5, 40]] = False
    errors = [float((m[others] - w[others]).square().sum()) for m in (dequantize(clean), made)]
    assert errors[1] < 1.5 * errors[0]


def outlier_case(scheme, columns=150):
    w, h = weights(columns=columns), uneven(columns)
    wanted = torch.tensor([5, 60, columns - 1])
    h[wanted] = h.max() * torch.tensor([2.0, 3.0, 4.0])
    return w, h, wanted, replace(scheme, outlier_channels=3)


@pytest.mark.parametrize("scheme", [EXPLICIT, TABLE], ids=["explicit", "codebook"])
@pytest.mark.parametrize("config", [PLAIN, PtqInitConfig()], ids=["plain", "compensated"])
def test_outlier_channels_are_the_loudest_and_almost_exact(scheme, config):
    w, h, wanted, apart = outlier_case(scheme)
    q, latent = made_of(w, torch.diag(h), apart, config)
    assert q.outliers.channels.tolist() == wanted.tolist()
    assert sorted(q.outliers.perm.tolist()) == list(range(150))
    made = dequantize(q)
    assert made.shape == w.shape
    assert float((made - w)[:, wanted].abs().max()) < 0.01 * float(w.abs().max())
    assert torch.equal(made, q.outliers.placed(dequantize(replace(q, outliers=None))))
    assert int(q.codes[:, -3:].max()) == 0
    assert latent.shape == w.shape
    plain, _ = made_of(w, torch.diag(h), scheme, config)
    assert cost(w, q, h) < 0.7 * cost(w, plain, h)


def test_outlier_columns_take_up_the_errors_of_the_others():
    """With correlated inputs the INT8 columns move away from their weights, and the output gains."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(400, 8, generator=g) @ torch.randn(8, 96, generator=g) + 0.2 * torch.randn(400, 96, generator=g)
    x[:, 10] *= 3
    w, apart = weights(columns=96), replace(EXPLICIT, outlier_channels=1)
    hessian = x.T @ x
    compensated, plain = (dequantize(made_of(w, hessian, apart, c)[0]) for c in (PtqInitConfig(), PLAIN))
    errors = [float(((w - made) @ x.T).square().sum()) for made in (compensated, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert float((compensated - w)[:, 10].abs().max()) > 10 * float((plain - w)[:, 10].abs().max())

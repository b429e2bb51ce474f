"""Level fits against exact answers: a dynamic program for one group, the full search for tables, a grid for affine levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbllm_core.quant.level_fit import choose_entries, fit_codebook, fit_levels, level_masses
from lbllm_core.quant.uniform import (
    as_residual,
    fit_affine,
    fit_int2,
    fit_residual,
    nearest_affine,
    residual_levels,
    round_to_nearest,
    to_family_grid,
)
from lbllm_core.quant.weight import (
    GRID,
    dequantize,
    from_real_levels,
    join_groups,
    nearest_codes,
    snap,
    split_groups,
    take_levels,
    weighted_error,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(kind, n, g, seed=0):
    """Weights and importances of three characters, `(n, g)` each."""
    generator = gen(seed)
    w, h = torch.randn(n, g, generator=generator), torch.rand(n, g, generator=generator) + 0.05
    if kind == "heavy":
        w = w * (1 / torch.rand(n, 1, generator=generator)).clamp_max(20) ** 0.5
        w[torch.rand(n, g, generator=generator) < 0.02] *= 12
        h = torch.exp(2 * torch.randn(n, g, generator=generator))
    if kind == "ties":
        w, h = (w * 3).round() / 3, torch.ones(n, g)
    return w, h


def optimum(w, h):
    """Exact least `sum h (w - level)^2` of four clusters: float64 dynamic program over sorted weights -> `(n,)`."""
    order = w.argsort(dim=-1)
    x, m = (t.gather(1, order).double().numpy() for t in (w, h.expand_as(w)))
    n, g = x.shape
    zero = np.zeros((n, 1))
    s0, s1, s2 = (np.concatenate([zero, (m * x**p).cumsum(1)], 1) for p in (0, 1, 2))

    def span(i, j):  # cost of x[i:j] in one cluster
        mass = np.maximum(s0[:, j] - s0[:, i], 1e-300)
        return np.maximum(s2[:, j] - s2[:, i] - (s1[:, j] - s1[:, i]) ** 2 / mass, 0)

    best = [np.stack([span(0, j) for j in range(g + 1)], 1)]
    for _ in range(3):
        last = best[-1]
        best.append(np.stack([np.min([last[:, i] + span(i, j) for i in range(j + 1)], 0) for j in range(g + 1)], 1))
    return torch.from_numpy(best[-1][:, g])


@pytest.mark.parametrize(
    ("kind", "g", "starts", "within"),
    [("plain", 32, 2, 1.06), ("plain", 64, 2, 1.04), ("plain", 8, 4, 1.10), ("plain", 32, 4, 1.03), ("heavy", 32, 4, 1.15), ("heavy", 32, 2, 2.2)],
)
def test_fit_is_near_the_exact_optimum_and_never_below(kind, g, starts, within):
    w, h = draw(kind, 300, g, seed=g)
    levels = fit_levels(w, h, starts=starts)
    made = weighted_error(w.double(), h.double(), levels.double())
    exact = optimum(w, h)
    assert bool((made >= exact * (1 - 1e-5) - 1e-9).all())
    assert float(made.sum() / exact.sum()) < within
    assert bool((levels.diff(dim=-1) >= 0).all())


def test_more_starts_never_hurt():
    w, h = draw("heavy", 400, 32, seed=5)
    errors = [weighted_error(w, h, fit_levels(w, h, starts=n)) for n in (1, 2, 4)]
    assert bool((errors[1] <= errors[0]).all())
    assert bool((errors[2] <= errors[1]).all())
    assert float(errors[2].sum()) < float(errors[0].sum())


def test_four_distinct_values_are_met_exactly():
    values = torch.tensor([-3.0, -0.5, 0.25, 2.0])
    w = values[torch.randint(0, 4, (50, 24), generator=gen(2))]
    w[:, :4] = values
    assert float(weighted_error(w, torch.ones_like(w), fit_levels(w, torch.ones_like(w), starts=4)).max()) < 1e-9


def test_channels_without_importance_do_not_count():
    w, h = draw("plain", 60, 16, seed=7)
    h[:, 8:] = 0
    other = w.clone()
    other[:, 8:] *= 0.1  # they may move the starting points, not the value of the optimum
    exact = optimum(w[:, :8], h[:, :8])
    for x in (w, other):
        made = weighted_error(x.double(), h.double(), fit_levels(x, h, starts=4).double())
        assert float(made.sum()) < 1.6 * float(exact.sum())
    assert bool(torch.isfinite(fit_levels(w, torch.zeros_like(h))).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))
def test_nearest_codes_are_the_argmin(rows, g, seed):
    w = torch.randn(rows, g, generator=gen(seed)) * 2
    levels = torch.randn(rows, 4, generator=gen(seed + 1)).sort(-1).values
    if seed % 3 == 0:
        levels[:, 2] = levels[:, 1]
    codes = nearest_codes(w, levels)
    least = (w.double()[..., None] - levels.double()[:, None, :]).abs().amin(-1)
    made = (w.double() - take_levels(levels, codes).double()).abs()
    assert codes.dtype == torch.uint8
    assert float((made - least).max()) < 1e-6
    assert bool(torch.isin(take_levels(levels, codes)[0], levels[0]).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
def test_groups_split_and_join(rows, columns, size, seed):
    w = torch.randn(rows, columns, generator=gen(seed))
    grouped = split_groups(w, size)
    assert grouped.shape == (rows, -(-columns // size), size)
    assert torch.equal(join_groups(grouped, columns), w)
    assert torch.equal(grouped[:, 0, : min(size, columns)], w[:, :size])
    assert bool((grouped[:, -1, (columns - 1) % size :] == w[:, -1:]).all())  # padding stays inside the group's range


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_masses_are_sums_over_holders(rows, size, seed):
    w, h = draw("plain", rows, size * 3, seed)
    levels = torch.randn(rows, 4, generator=gen(seed + 9)).sort(-1).values
    mass, moment = level_masses(w, h, levels)
    codes = nearest_codes(w, levels)
    for c in range(4):
        held = (codes == c).double()
        assert torch.allclose(mass[:, c].double(), (held * h).sum(-1), atol=1e-5)
        assert torch.allclose(moment[:, c].double(), (held * h * w).sum(-1), atol=1e-5)


def tables(kind, entries=256, n=3000, g=32):
    """Groups in units of their row's rms, importances, and a table fitted on a part of them."""
    w, h = draw(kind, n, g, seed=11)
    w = w / w.square().mean().sqrt()
    own = fit_levels(w[:1500], h[:1500], rounds=4)
    return w, h, own[torch.randperm(len(own), generator=gen(3))[:entries]]


@pytest.mark.parametrize(("kind", "g"), [("plain", 32), ("heavy", 32), ("heavy", 8), ("ties", 16)])
def test_choice_costs_what_the_full_search_costs(kind, g):
    w, h, table = tables(kind, g=g)
    chosen = choose_entries(w, h, table, shortlist=2)
    cost = weighted_error(w, h, table[chosen]).double()
    full = torch.stack([weighted_error(w, h, e.expand(len(w), 4)) for e in table], dim=-1).double().amin(-1)
    assert bool((cost >= full * (1 - 1e-5) - 1e-6).all())
    assert float(cost.sum() / full.sum()) <= 1.001


def test_full_shortlist_is_the_full_search():
    w, h, table = tables("heavy", entries=24, n=500)
    chosen = choose_entries(w, h, table, shortlist=256)
    full = torch.stack([weighted_error(w, h, e.expand(len(w), 4)) for e in table], dim=-1)
    assert torch.equal(weighted_error(w, h, table[chosen]), full.amin(-1))


def total_cost(w, h, table):
    full = torch.stack([weighted_error(w, h, e.expand(len(w), 4)) for e in table], dim=-1)
    return float(full.amin(-1).sum())


@pytest.mark.parametrize(("kind", "share"), [("plain", 0.97), ("heavy", 0.4)])
def test_fitted_table_beats_a_random_one(kind, share):
    w, h, random = tables(kind, entries=32, n=1500)
    fitted = fit_codebook(w, h, 32, 6, 2, gen(4))
    assert fitted.shape == (32, 4)
    assert bool((fitted.diff(dim=-1) >= 0).all())
    assert total_cost(w, h, fitted) < share * total_cost(w, h, random)


def test_larger_tables_cost_less():
    w, h, _ = tables("plain", n=1500)
    costs = [total_cost(w, h, fit_codebook(w, h, entries, 5, 2, gen(5))) for entries in (4, 16, 64)]
    assert costs[1] < 0.95 * costs[0]
    assert costs[2] < 0.95 * costs[1]


def test_table_is_decided_by_the_seed():
    w, h, _ = tables("plain", n=400)
    assert torch.equal(fit_codebook(w, h, 16, 3, 2, gen(6)), fit_codebook(w, h, 16, 3, 2, gen(6)))


@pytest.mark.parametrize("affine", [False, True])
def test_more_entries_than_groups(affine):
    w, h = draw("plain", 9, 16, seed=8)
    table = fit_codebook(w, h, 64, 4, 2, gen(7), affine)
    assert table.shape == (64, 4)
    assert bool(torch.isfinite(table).all())
    own = (fit_affine if affine else fit_levels)(w, h)
    assert total_cost(w, h, table) <= 1.02 * float(weighted_error(w, h, own).sum())  # every group has its own optimum


def test_affine_table_is_equidistant():
    w, h, _ = tables("heavy", n=800)
    steps = fit_codebook(w, h, 32, 5, 2, gen(8), affine=True).double().diff(dim=-1)
    assert float((steps - steps.mean(-1, keepdim=True)).abs().max()) < 1e-5 * float(steps.max())
    assert bool((steps > 0).all())


def affine_grid(w, h, n=60):
    """Least error of `base + c * step` over a dense grid of both, `(groups,)`."""
    low, width = w.min(-1).values, w.max(-1).values - w.min(-1).values
    best = torch.full((len(w),), torch.inf)
    for step in torch.linspace(0.05, 0.40, n):
        for base in torch.linspace(-0.15, 0.6, n):
            levels = (low + base * width)[:, None] + (step * width)[:, None] * torch.arange(4.0)
            best = torch.minimum(best, weighted_error(w, h, levels))
    return best


def test_affine_fit_against_a_grid():
    w, h = draw("plain", 200, 16, seed=9)
    levels = fit_affine(w, h)
    steps = levels.diff(dim=-1)
    assert float((steps - steps.mean(-1, keepdim=True)).abs().max()) < 1e-5
    made, exact = weighted_error(w, h, levels), affine_grid(w, h)
    assert float(made.sum() / exact.sum()) < 1.06
    assert float(weighted_error(w, h, fit_levels(w, h, starts=4)).sum()) < 0.8 * float(made.sum())
    assert float(made.sum()) < 0.8 * float(weighted_error(w, h, round_to_nearest(w)).sum())


def test_affine_levels_are_a_fixed_point():
    base, step = torch.randn(30, 1, generator=gen(10)), torch.rand(30, 1, generator=gen(11)) + 0.1
    levels = base + step * torch.arange(4.0)
    mass = torch.rand(30, 4, generator=gen(12)) + 0.01
    assert torch.allclose(nearest_affine(levels, mass), levels, atol=1e-5)


def test_round_to_nearest_spans_the_group():
    w, _ = draw("heavy", 100, 24, seed=13)
    levels = round_to_nearest(w)
    assert torch.allclose(levels[:, 0], w.amin(-1))
    assert torch.allclose(levels[:, 3], w.amax(-1), rtol=1e-5)
    half = (levels[:, 3:] - levels[:, :1]) / 6
    assert bool(((w - take_levels(levels, nearest_codes(w, levels))).abs() <= half * 1.0001 + 1e-6).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 50), st.integers(1, 16), st.integers(0, 1000))
def test_snap_is_idempotent_and_errs_by_half_a_grid_step(rows, columns, size, seed):
    groups = -(-columns // size)
    levels = (torch.randn(rows, groups, 4, generator=gen(seed)) * 10 ** (seed % 5 - 2)).sort(-1).values
    if seed % 4 == 0:
        levels[0] = 0
    codes = torch.randint(0, 4, (rows, columns), generator=gen(seed + 1), dtype=torch.uint8)
    real = from_real_levels(codes, levels, size)
    snapped = snap(real)
    assert torch.equal(snap(snapped).levels, snapped.levels)
    assert float(snapped.levels.abs().max()) <= GRID
    assert torch.equal(snapped.levels, snapped.levels.round())
    error = (dequantize(snapped) - dequantize(real)).abs().amax(1)
    assert bool((error <= real.row_scale * 0.5001).all())
    again = from_real_levels(codes, snapped.levels * snapped.row_scale[:, None, None], size)
    assert torch.allclose(dequantize(snap(again)), dequantize(snapped), rtol=1e-5, atol=1e-7)


def test_int2_beats_rounding_and_loses_to_a_free_offset():
    """An integer zero is a restriction of the affine grid; per zero the step is the least-squares one."""
    g = torch.Generator().manual_seed(11)
    w, h = torch.randn(60, 32, generator=g) + 0.3, torch.rand(60, 32, generator=g)
    made = fit_int2(w, h, rounds=20)
    step = (made[:, 3:] - made[:, :1]) / 3
    zero = -made[:, :1] / step
    assert torch.allclose(zero, zero.round(), atol=1e-4)
    assert torch.allclose(made.diff(dim=-1), step.expand(-1, 3), atol=1e-5)
    errors = [weighted_error(w, h, levels).sum() for levels in (fit_affine(w, h, 20), made, round_to_nearest(w))]
    assert errors[0] < errors[1] < errors[2]
    grid = torch.linspace(0.05, 2, 400)
    brute = torch.stack([weighted_error(w, h, s * (torch.arange(4.0) - z).expand(60, 4)) for s in grid for z in range(4)]).amin(0)
    assert float((weighted_error(w, h, made) / brute).median()) < 1.02


def test_residual_binarization_has_the_least_error_of_its_levels():
    """No pair of a grid is better, the published means are worse, four free levels are better."""
    g = torch.Generator().manual_seed(12)
    w, h = torch.randn(60, 32, generator=g), torch.rand(60, 32, generator=g)
    made = weighted_error(w, h, fit_residual(w, h))
    a = (h * w.abs()).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)
    b = (h * (w - a * w.sign()).abs()).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)
    published = weighted_error(w, h, residual_levels(a, b))
    assert bool((made <= published * 1.00001).all())
    assert float(weighted_error(w, h, fit_levels(w, h)).sum()) < float(made.sum()) < float(published.sum())
    scales = torch.linspace(0.01, 2.5, 120)
    brute = torch.full((60,), float("inf"))
    for i, one in enumerate(scales):
        for other in scales[: i + 1]:
            brute = torch.minimum(brute, weighted_error(w, h, residual_levels(one.view(1, 1), other.view(1, 1)).expand(60, 4)))
    assert bool((made <= brute * 1.00001).all())
    assert float((brute / made).mean()) < 1.02


def test_residual_levels_of_groups_that_lack_something():
    """One spike, only zeros, two weights that count for something, no importance, a single size: levels stay ascending, `±a ± b`, finite."""
    w, h = torch.zeros(5, 16), torch.ones(5, 16)
    w[0, 3] = 1.0
    w[2:4] = torch.randn(2, 16, generator=gen(1))
    h[2, 2:], h[3] = 0, 0
    w[4] = 0.5
    made = fit_residual(w, h)
    assert bool(torch.isfinite(made).all())
    assert bool((made.diff(dim=-1) >= 0).all())
    assert torch.allclose(made, -made.flip(-1))
    assert torch.equal(made[1], torch.zeros(4))
    assert torch.allclose(made[4], torch.tensor([-0.5, -0.5, 0.5, 0.5]))
    assert bool((weighted_error(w, h, made)[[0, 2]] < 1e-9).all())
    assert bool((made[3] == fit_residual(w[3:4], torch.ones(16))[0]).all())


@given(st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_grid_of_residual_binarization(rows, seed):
    """Levels on it are two integers' sums and differences; it keeps what is on it, and moves what is near by little."""
    levels = (torch.randn(rows, 4, generator=gen(seed)) * 10 ** (seed % 4)).clamp(-300, 300).sort(-1).values
    made = to_family_grid(levels, "residual")
    a, b = as_residual(made)
    assert torch.equal(residual_levels(a, b), made)
    assert torch.equal(a, a.round())
    assert torch.equal(b, b.round())
    assert bool(((a >= b) & (b >= 0) & (a + b <= GRID)).all())
    assert torch.equal(to_family_grid(made, "residual"), made)
    near = residual_levels(a + 0.3, (b - 0.3).clamp_min(0))
    assert float((to_family_grid(near, "residual") - near).abs().max()) <= 1.01

"""Trainable weights: what they compute is what they would store, and gradients reach levels, tables, gains and bitmaps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lbllm_core.model.blocks import NORMS, SITE_OF, Decoder, linears_of
from lbllm_core.model.linear import FrozenWeight, LatentBitmapWeight, LearningRates, NearestWeight, QuantLinear
from lbllm_core.model.student import BlockState
from lbllm_core.model.student_block import build_block, constrain, parameter_groups, read_state
from lbllm_core.quant.level_fit import fit_levels
from lbllm_core.quant.weight import (
    GRID,
    QuantizedWeight,
    dequantize,
    from_real_levels,
    group_levels,
    join_groups,
    nearest_codes,
    snap,
    split_groups,
)

SHAPES = [(12, 64, 16), (8, 50, 16), (6, 20, 32)]  # the second ends in a short group, the third is one


def latent_of(out, columns, seed=0):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.2


def codes_of(w, q):
    """Nearest levels as they are stored."""
    levels = group_levels(q) * q.row_scale[:, None, None]
    return join_groups(nearest_codes(split_groups(w, q.group_size), levels), w.shape[1]).contiguous()


def explicit(w, size):
    grouped = split_groups(w, size)
    levels = fit_levels(grouped.flatten(0, 1), torch.ones(size)).reshape(*grouped.shape[:2], 4)
    q = snap(from_real_levels(torch.zeros(w.shape, dtype=torch.uint8), levels, size))
    return replace(q, codes=codes_of(w, q))


def from_table(w, size, entries=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    table = torch.randint(-GRID, GRID + 1, (entries, 4), generator=g).sort(-1).values.float()
    groups = -(-w.shape[1] // size)
    group_codes = torch.randint(0, entries, (w.shape[0], groups), generator=g, dtype=torch.uint8)
    scale = torch.rand(w.shape[0], generator=g) * 2e-3 + 2e-3
    q = QuantizedWeight(torch.zeros(w.shape, dtype=torch.uint8), scale, size, group_codes=group_codes, codebook=table)
    return replace(q, codes=codes_of(w, q))


def view_of(kind, w, size, mode):
    q = explicit(w, size) if mode == "explicit" else from_table(w, size)
    table = None if q.codebook is None else torch.nn.Parameter(q.codebook / GRID)
    return (NearestWeight(q, w, table) if kind == "nearest" else FrozenWeight(q, table)), q


def disturb(view, size=0.05, seed=2):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)


@pytest.mark.parametrize(("out", "columns", "size"), SHAPES)
@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("kind", ["nearest", "frozen"])
def test_computes_what_it_stores(kind, mode, out, columns, size):
    view, q = view_of(kind, latent_of(out, columns), size, mode)
    assert torch.allclose(view(), dequantize(q), rtol=1e-6, atol=1e-8)  # unchanged at the start
    assert torch.equal(view.quantized().codes, q.codes)
    disturb(view)
    stored = view.quantized()
    assert torch.equal(dequantize(stored), view())
    assert torch.equal(snap(stored).levels if mode == "explicit" else snap(stored).codebook, stored.levels if mode == "explicit" else stored.codebook)
    assert not torch.allclose(view(), dequantize(q), atol=1e-3)
    assert (stored.codebook is None) == (mode == "explicit")


@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("kind", ["nearest", "frozen"])
def test_gradients_are_those_of_a_gather(kind, mode):
    """To levels, tables and gains: autograd of `scale * table[group code][code]` in float64."""
    out, columns, size = 8, 50, 16
    view, _ = view_of(kind, latent_of(out, columns), size, mode)
    upstream = torch.randn(out, columns, generator=torch.Generator().manual_seed(5))
    (view() * upstream).sum().backward()
    stored, store = view.quantized(), view.store
    source = (store.levels if mode == "explicit" else store.table).detach().double().requires_grad_()
    gain = torch.zeros(out, dtype=torch.float64, requires_grad=True)
    units = (source if mode == "explicit" else source[stored.group_codes.long()]) * GRID
    grouped = units.gather(-1, split_groups(stored.codes, size).long())
    weight = join_groups(grouped, columns) * (store.row_scale.double() * gain.exp())[:, None]
    (weight * upstream).sum().backward()
    made = store.levels.grad if mode == "explicit" else store.table.grad
    assert torch.allclose(made.double(), source.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(store.gain.grad.double(), gain.grad, rtol=1e-4, atol=1e-5)
    assert float(source.grad.abs().max()) > 0
    if kind == "nearest":
        assert torch.equal(view.latent.grad, upstream)


def test_levels_that_cross_are_put_in_order():
    view, _ = view_of("nearest", latent_of(6, 32), 16, "explicit")
    disturb(view, 0.6)
    stored = view.quantized()
    assert bool((stored.levels.diff(dim=-1) >= 0).all())
    assert torch.equal(dequantize(stored), view())


def test_latent_weights_take_new_codes():
    view, q = view_of("nearest", latent_of(10, 64), 16, "explicit")
    with torch.no_grad():
        view.latent.neg_()
    changed = (view.quantized().codes != q.codes).float().mean()
    assert float(changed) > 0.5


@pytest.mark.parametrize(("out", "columns", "size"), SHAPES)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("pairing", ["low_high", "outer_inner"])
def test_bitmap_view_computes_what_it_stores(out, columns, size, soft, pairing):
    w = latent_of(out, columns)
    q = explicit(w, size)
    view = LatentBitmapWeight(q, w, soft, pairing)
    assert torch.allclose(view(), dequantize(q), atol=1e-6)  # starts as the nearest-level weight
    disturb(view, 0.3)
    view.constrain()
    assert torch.allclose(dequantize(view.quantized()), view(), atol=1e-6)
    assert bool((group_levels(view.quantized()).diff(dim=-1) >= 0).all())


def test_pairing_decides_what_a_bit_can_flip():
    """Flipping every bitmap bit moves a weight to the other pair: past its neighbour, or, nearly always, to its neighbour inside or outside."""
    w = latent_of(12, 64)
    reached = {}
    for pairing in ("low_high", "outer_inner"):
        view = LatentBitmapWeight(explicit(w, 16), w, False, pairing)
        before = view.quantized().codes.long()
        with torch.no_grad():
            view.bitmap.copy_(1 - view.bitmap)
        reached[pairing] = list(zip(before.flatten().tolist(), view.quantized().codes.flatten().tolist(), strict=True))
    assert set(reached["low_high"]) == {(0, 2), (1, 2), (2, 1), (3, 1)}
    assert {(0, 1), (1, 0), (2, 3), (3, 2)} <= set(reached["outer_inner"]) <= {(a, b) for a, b in itertools.product(range(4), repeat=2) if (a in (0, 3)) != (b in (0, 3))}
    assert sum(abs(a - b) == 1 for a, b in reached["outer_inner"]) > 0.9 * len(reached["outer_inner"])


@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("kind", ["nearest", "frozen"])
def test_levels_off_the_grid_while_they_train(kind, mode):
    """`real`: what is stored is what was trained, unrounded; packing it is one snap."""
    w = latent_of(10, 64)
    _, q = view_of(kind, w, 16, mode)
    table = None if q.codebook is None else torch.nn.Parameter(q.codebook / GRID)
    view = NearestWeight(q, w, table, "real") if kind == "nearest" else FrozenWeight(q, table, "real")
    disturb(view, 0.02)
    stored = view.quantized()
    assert torch.equal(dequantize(stored), view())
    assert float((group_levels(stored) - group_levels(snap(stored))).abs().max()) > 0.1
    assert float(group_levels(stored).abs().max()) <= GRID
    (view() * torch.randn(10, 64, generator=torch.Generator().manual_seed(1))).sum().backward()
    holder = view.store.levels if table is None else table
    assert float(holder.grad.abs().max()) > 0


def test_bitmap_gradients():
    w = latent_of(8, 50)
    view = LatentBitmapWeight(explicit(w, 16), w, soft=True)
    upstream = torch.randn(8, 50, generator=torch.Generator().manual_seed(6))
    (view() * upstream).sum().backward()
    assert torch.equal(view.latent.grad, upstream)
    levels = view.levels.detach().double().requires_grad_()
    codes = split_groups(view.quantized().codes, 16).long()
    (join_groups((levels * view.unit.double()).gather(-1, codes), 50) * upstream).sum().backward()
    assert torch.allclose(view.levels.grad.double(), levels.grad, rtol=1e-4, atol=1e-6)
    # the bitmap: what the weight would gain by the other pair, times the upstream gradient
    with torch.no_grad():
        chosen = view.bitmap.clone()
        view.bitmap.fill_(1.0)
        high = view()
        view.bitmap.fill_(0.0)
        low = view()
        view.bitmap.copy_(chosen)
    expected = (high - low) * upstream
    assert torch.allclose(join_groups(view.bitmap.grad, 50), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("soft", [True, False])
def test_training_a_bitmap(soft):
    """From a soft start some bits flip towards another target; from a hard start at this rate none does."""
    w = latent_of(16, 64)
    view = LatentBitmapWeight(explicit(w, 16), w, soft)
    before = view.bitmap.detach() > 0.5
    target = latent_of(16, 64, seed=9) * 0.5 + w
    optimizer = torch.optim.Adam([view.bitmap], lr=5e-3)
    first = None
    for _ in range(25):
        loss = (view() - target).square().mean()
        first = first if first is not None else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        view.constrain()
    flipped = float(((view.bitmap.detach() > 0.5) != before).float().mean())
    assert (flipped > 0.005) == soft
    assert (float(loss.detach()) < first) == soft


@pytest.mark.parametrize("beta", [20.0, 8.0, 2.0])
def test_polarization(beta):
    w = latent_of(8, 64)
    hard = LatentBitmapWeight(explicit(w, 16), w, soft=False)
    soft = LatentBitmapWeight(explicit(w, 16), w, soft=True)
    assert float(hard.polarization(beta).detach()) == 0
    value = soft.polarization(beta)
    assert 0 < float(value.detach()) <= 1
    value.backward()
    moved = soft.bitmap.detach() - 1e-3 * soft.bitmap.grad.sign()
    undecided = (soft.bitmap.detach() - 0.5).abs() > 1e-3
    away = (moved - 0.5).abs() >= (soft.bitmap.detach() - 0.5).abs()
    assert bool(away[undecided].all())  # descent pushes every entry away from one half
    with torch.no_grad():
        soft.bitmap.fill_(0.5)
    assert float(soft.polarization(beta).detach()) == 1
    with torch.no_grad():
        soft.bitmap.fill_(0.75)
    assert float(soft.polarization(beta).detach()) == pytest.approx((1 - 0.5**beta) ** 2)


def test_polarization_leaves_out_what_fills_up_a_short_group():
    w = latent_of(8, 50)
    view = LatentBitmapWeight(explicit(w, 16), w, soft=True)
    with torch.no_grad():
        view.bitmap.fill_(1.0)
        view.bitmap[:, -1, 2:] = 0.5  # two of the last sixteen are weights
    value = view.polarization(2.0)
    value.backward()
    assert float(value.detach()) == 0
    assert bool((view.bitmap.grad[:, -1, 2:] == 0).all())
    with torch.no_grad():
        view.bitmap[:, 0, 0] = 0.5
    assert float(view.polarization(2.0).detach()) == pytest.approx(1 / 50)


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.1, 0.0])
def test_polarization_as_printed_has_a_slope_everywhere(beta):
    """The published beta falls from 1 to 0; below 1 the slope at one half is infinite."""
    w = latent_of(8, 64)
    view = LatentBitmapWeight(explicit(w, 16), w, soft=True)
    with torch.no_grad():
        view.bitmap[0] = 0.5
    view.polarization(torch.tensor(beta)).backward()
    assert bool(view.bitmap.grad.isfinite().all())
    assert bool((view.bitmap.grad[0] == 0).all())


def state_of(block, mode, size=16):
    """A block state whose linears of a site share a table (codebook) or have their own levels."""
    linears, latents = {}, {}
    tables = {site: torch.randint(-GRID, GRID + 1, (5, 4), generator=torch.Generator().manual_seed(i)).sort(-1).values.float() for i, site in enumerate(("qkv", "o", "gate_up", "down"))}
    for path, linear in linears_of(block).items():
        q = explicit(linear.weight, size) if mode == "explicit" else from_table(linear.weight, size)
        if mode == "codebook":
            q = replace(q, group_codes=q.group_codes % 5, codebook=tables[SITE_OF[path]].clone())
            q = replace(q, codes=codes_of(linear.weight, q))
        linears[path], latents[path] = q, linear.weight.clone()
    biases = {p: m.bias.clone() for p, m in linears_of(block).items() if m.bias is not None}
    return BlockState(linears, {n: block.get_submodule(n).weight.clone() for n in NORMS}, biases, latents=latents)


def test_shared_tables_are_one_parameter(make_model):
    teacher_block = Decoder(make_model("qwen2")).blocks[0]
    block = build_block(teacher_block, state_of(teacher_block, "codebook"), "frozen")
    groups = {g["kind"]: g for g in parameter_groups(block, LearningRates(levels=1e-3, row_scale=2e-3))}
    assert set(groups) == {"levels", "row_scale"}
    assert len(groups["levels"]["params"]) == 4  # one table a site
    assert len(groups["row_scale"]["params"]) == 7
    assert groups["row_scale"]["lr"] == 2e-3
    linears = {p: block.get_submodule(p) for p in SITE_OF}
    assert all(isinstance(m, QuantLinear) for m in linears.values())
    assert linears["self_attn.q_proj"].weight_view.store.table is linears["self_attn.v_proj"].weight_view.store.table
    assert linears["self_attn.q_proj"].weight_view.store.table is not linears["self_attn.o_proj"].weight_view.store.table
    # and its gradient is the sum over the linears that share it
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    table = linears["self_attn.q_proj"].weight_view.store.table
    parts = [torch.autograd.grad(linears[f"self_attn.{n}_proj"](x).square().sum(), table)[0] for n in "qkv"]
    whole = sum(linears[f"self_attn.{n}_proj"](x).square().sum() for n in "qkv")
    assert torch.allclose(torch.autograd.grad(whole, table)[0], sum(parts), rtol=1e-4)


def test_only_what_has_a_rate_learns(make_model):
    teacher_block = Decoder(make_model("llama")).blocks[0]
    block = build_block(teacher_block, state_of(teacher_block, "explicit"), "nearest")
    groups = parameter_groups(block, LearningRates(weight=1e-4))
    assert [g["kind"] for g in groups] == ["weight"]
    learns = {name.rpartition(".")[2] for name, p in block.named_parameters() if p.requires_grad}
    assert learns == {"latent"}
    assert parameter_groups(block, LearningRates()) == []
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("mode", ["nearest", "latent_soft", "latent_hard", "frozen"])
@pytest.mark.parametrize("levels", ["explicit", "codebook"])
def test_a_block_reads_back_as_it_computes(make_model, mode, levels):
    """Train a few steps, read the state, build it fixed: the same outputs."""
    if mode.startswith("latent") and levels == "codebook":
        pytest.skip("the latent bitmap has levels of its own")
    view = Decoder(make_model("qwen2"))
    teacher_block = view.blocks[1]
    start = state_of(teacher_block, levels)
    block = build_block(teacher_block, start, mode)
    hidden = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(3))
    around = view.surroundings(hidden)
    before = view.run_block(block, hidden, around, 1)
    fixed = build_block(teacher_block, start, "fixed")
    assert torch.allclose(before, view.run_block(fixed, hidden, around, 1), atol=1e-4)
    optimizer = torch.optim.Adam(parameter_groups(block, LearningRates(1e-2, 1e-2, 1e-2, 1e-2)))
    for _ in range(5):
        optimizer.zero_grad()
        view.run_block(block, hidden, around, 1).square().mean().backward()
        optimizer.step()
        constrain(block)
    after = view.run_block(block, hidden, around, 1)
    assert not torch.allclose(after, before, atol=1e-2)
    read = read_state(block, start)
    if mode == "frozen":
        assert all(torch.equal(read.linears[p].codes, start.linears[p].codes) for p in SITE_OF)
    again = view.run_block(build_block(teacher_block, read, "fixed"), hidden, around, 1)
    snapped = BlockState({p: snap(q) for p, q in read.linears.items()}, read.norms, read.biases)
    assert torch.allclose(view.run_block(build_block(teacher_block, snapped, "fixed"), hidden, around, 1), again, atol=1e-5)
    # what was trained is what is packed; the paper's parameterisation trains real-valued levels and loses a little to the grid
    lost = float((again - after).detach().norm() / after.detach().norm())
    assert lost < (0.02 if mode.startswith("latent") else 1e-5)


def test_building_does_not_touch_the_teacher(make_model):
    view = Decoder(make_model("qwen3"))
    block = view.blocks[0]
    before = {k: v.clone() for k, v in block.state_dict().items()}
    made = build_block(block, state_of(block, "explicit"), "nearest", kv_bits=4)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


@pytest.mark.parametrize("family", ["affine", "int2", "residual"])
def test_controls_stay_in_their_family_while_they_train(family):
    """After any disturbance the levels are base + c * step with both on the grid, or step * (c - zero), or ±a ± b: never four free ones."""
    view, q = view_of("nearest", latent_of(10, 64), 16, "explicit")
    view = NearestWeight(q, view.latent.detach(), family=family)
    disturb(view, 0.2)
    stored = view.quantized()
    assert torch.equal(dequantize(stored), view())
    base, steps = stored.levels[..., :1], stored.levels.diff(dim=-1)
    if family == "affine":
        assert bool((steps == steps[..., :1]).all())
        assert bool((steps[..., 0] >= 0).all())
    elif family == "residual":
        assert torch.equal(stored.levels, -stored.levels.flip(-1))
        assert bool((steps >= 0).all())
        assert torch.equal(stored.levels[..., 2:].sum(-1) % 2, torch.zeros(10, 4))  # a is a whole number
    else:
        step = (stored.levels[..., 3:] - base) / 3
        zero = (-base / step.clamp_min(1e-6)).round()
        assert bool(((zero >= 0) & (zero <= 3)).all())
        assert float((stored.levels - step * (torch.arange(4) - zero)).abs().max()) <= 1.01  # rounding into the container
    assert len({tuple(s) for s in stored.levels.flatten(0, 1).tolist()}) > 5
    (view() * torch.randn(10, 64, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert float(view.store.levels.grad.abs().max()) > 0


def test_latent_weights_start_inside_the_cells_of_their_codes():
    _, q = view_of("nearest", latent_of(10, 64), 16, "explicit")
    other = replace(q, codes=(3 - q.codes))
    assert torch.equal(NearestWeight(other, latent_of(10, 64)).quantized().codes, other.codes)


def test_norms_learn_when_they_have_a_rate(make_model):
    teacher_block = Decoder(make_model("llama")).blocks[0]
    start = state_of(teacher_block, "explicit")
    block = build_block(teacher_block, start, "nearest")
    kinds = {g["kind"]: g["params"] for g in parameter_groups(block, LearningRates(norms=1e-3))}
    assert list(kinds) == ["norms"]
    assert len(kinds["norms"]) == 2
    with torch.no_grad():
        kinds["norms"][0].mul_(1.5)
    read = read_state(block, start)
    assert torch.allclose(read.norms[NORMS[0]], start.norms[NORMS[0]] * 1.5)
    assert torch.equal(read.norms[NORMS[1]], start.norms[NORMS[1]])
    assert set(read.latents) == set(SITE_OF)

"""Stage 1: codes and levels from calibration statistics alone, no gradients.

Block by block, on the inputs that the already quantized prefix produces:

1. run the block once and collect, at each of its four sites, `H = sum x x^T` and `max |x|`;
2. where the cache will hold four bits, fold a transform of the keys into q and k (`model/key_smoothing.py`); then fold smoothing into
   the weights and carry H along (`model/smoothing.py`);
3. for the linears that share a site, fit levels (four-means, or a table of quadruples) and quantize column by column with
   error compensation (`quant/error_compensation.py`). Their rows are stacked: same input, same H, one sweep.

The importance of channel i in the level fit is `H_ii` (or `1 / [H^-1]_ii`). In codebook mode the linears of a site share one
table: k and v projections are too small to pay for their own. Weights are handed on as compensated, because stage 2 starts
from them: their nearest levels are exactly the codes chosen here.

Source: BWA (arXiv 2504.05352). Its INT8 outlier channels are optional (`scheme.outlier_channels`): the channels of a site with the
largest mean square are put last, take up the errors of all other columns, and are rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.config import PtqInitConfig, SchemeConfig
from lbllm_core.engine.block_sweep import BlockJob, passes
from lbllm_core.errors import ModelError, NumericalError
from lbllm_core.model.blocks import NORMS, SITE_OF, SITES, linears_of, linears_of_site
from lbllm_core.model.key_smoothing import KEY, QUERY, TOKENS, fit, fold, foldable, query_energy, rotated
from lbllm_core.model.smoothing import SiteStatistics, smooth
from lbllm_core.model.student import BlockState
from lbllm_core.quant.error_compensation import inverse_factor, quantize_columns, sweep_order
from lbllm_core.quant.level_fit import choose_entries, fit_codebook, fit_levels
from lbllm_core.quant.uniform import FITS, round_to_nearest, to_family_grid
from lbllm_core.quant.weight import (
    GRID,
    QuantizedWeight,
    dequantize,
    from_real_levels,
    n_groups,
    split_groups,
    to_outliers,
    weighted_error,
)

LARGEST = 8.0  # in units of the row's root mean square
POSITIONS = 2048  # that their sequences are laid over: calibration sequences may be shorter than what the model will read
UNCHANGED = 0.01  # of the energy that a block adds to its inputs, the most that folding may move: other roundings, not another function
GRID_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17)  # of the largest entry, tried as the end of the int8 grid


@torch.no_grad()
def collect_statistics(job: BlockJob) -> dict[str, SiteStatistics]:
    """Second moments and maxima of the inputs of each site, over all of `job.inputs`; float32 on the job's device."""
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    tokens = 0

    def hook(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):  # second moments are float32, whatever the block computes in
                sums[site] = sums.get(site, 0) + x.T @ x
            peak = x.abs().amax(0)
            largest[site] = torch.maximum(largest[site], peak) if site in largest else peak

        return collect

    first = {site: linears_of_site(site)[0] for site in SITES}
    handles = [job.teacher_block.get_submodule(path).register_forward_pre_hook(hook(site)) for site, path in first.items()]
    try:
        for hidden in job.inputs.batches(passes(job.inputs)):
            job.run(job.teacher_block, hidden)
            tokens += hidden.shape[:2].numel()
    finally:
        for handle in handles:
            handle.remove()
    ranks, device = job.hardware.ranks, job.inputs.device
    ranks.sum_(*sums.values())
    ranks.largest_(*largest.values())
    tokens = round(ranks.mean(tokens, device) * ranks.size)
    for site, h in sums.items():
        if not bool(torch.isfinite(h).all()):
            raise NumericalError(f"block {job.index}: the inputs of `{site}` are not finite; try hardware.compute_dtype=fp32 or other calibration text")
    return {site: SiteStatistics(sums[site], largest[site], tokens) for site in SITES}


@torch.no_grad()
def collect_keys(job: BlockJob) -> tuple[Tensor, Tensor]:
    """What `key_smoothing.fit` reads: keys behind the rotary embedding `(tokens, key heads, head_dim)` of the first sequences, and the energy of queries.

    The sequences are spread over the positions that the model will see: the angle at which a slow pair lies depends on the position, and short sequences would
    show only the first ones. A sequence's first token stays at position 0, since its key is found nowhere else.
    """
    parts: Any = job.teacher_block
    attention, length = parts.self_attn, min(job.inputs.shape[1], TOKENS)
    count = min(len(job.inputs), max(1, TOKENS // length))
    room = max(0, min(POSITIONS, int(job.decoder.config.max_position_embeddings)) - length)
    keys, energies = [], []
    for index, hidden in enumerate(job.inputs.batches([slice(i, i + 1) for i in range(count)])):
        with job.hardware.autocast():
            x = parts.input_layernorm(hidden[:, :length])
            q, k = (getattr(attention, name)(x).float().unflatten(-1, (-1, attention.head_dim)) for name in ("q_proj", "k_proj"))
        positions = torch.arange(length, device=hidden.device)
        positions[1:] += room * index // max(1, count - 1)
        cos, sin = (angle.float() for angle in job.decoder.base.rotary_emb(hidden, positions[None]))
        keys.append(rotated(k, cos, sin)[0])
        energies.append(query_energy(q[0], k.shape[-2]))
    return torch.cat(keys), torch.stack(energies).mean(0)


@torch.no_grad()
def smooth_keys(job: BlockJob, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Weights and biases with smoothed keys, and the share of the scores' squared error that is expected to be left; as they are where nothing can be folded.

    Raises ModelError when the block is another function afterwards.
    """
    if not foldable(job.teacher_block.self_attn):  # type: ignore[arg-type]
        return weights, biases, {}
    transform, left = fit(*collect_keys(job), job.hardware.ranks.mean_)
    weights, biases = fold(weights, biases, transform)
    moved = _moved(job, weights, biases)
    if not moved < UNCHANGED:
        raise ModelError(
            f"block {job.index}: smoothing its keys moves {moved:.1%} of what the block computes, so its rotary embedding does not pair channels i and "
            "i + head_dim / 2 as Llama's does; set ptq_init.key_smoothing=false"
        )
    return weights, biases, {"key_error_left": float(left.mean())}


def _moved(job: BlockJob, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> float:
    """How much of what the block adds to one sequence changes with these q and k, as a share of its energy, without the first token, whose activations are massive."""
    block, hidden = job.teacher_block, job.inputs[slice(0, 1)]
    changed = {f"{path}.weight": weights[path] for path in (QUERY, KEY)} | {f"{path}.bias": biases[path] for path in (QUERY, KEY) if path in biases}
    changed = {name: value.to(block.get_parameter(name).dtype) for name, value in changed.items()}

    def folded(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(block, changed, args, kwargs)

    with job.hardware.autocast():
        before, after = (job.decoder.run_block(made, hidden, job.surroundings, job.index).double() for made in (block, folded))  # type: ignore[arg-type]
    return float((after - before)[:, 1:].square().sum() / (before - hidden)[:, 1:].square().sum().clamp_min(1e-30))


@torch.no_grad()
def quantize_block(job: BlockJob, scheme: SchemeConfig, config: PtqInitConfig, seed: int) -> tuple[BlockState, dict[str, float]]:
    """Stage 1 of one block. Figures: weighted relative error of each linear, and what the snap to int8 added; with smoothed keys what is left of the scores' error."""
    linears = linears_of(job.teacher_block)
    for path, linear in linears.items():
        if scheme.outlier_channels and scheme.outlier_channels >= linear.in_features:
            raise ModelError(f"scheme.outlier_channels={scheme.outlier_channels} leaves none of the {linear.in_features} input channels of {path}; choose fewer")
    statistics = collect_statistics(job)
    parts: Any = job.teacher_block
    weights = {path: linear.weight.detach().float() for path, linear in linears.items()}
    biases = {path: linear.bias.detach().float() for path, linear in linears.items() if linear.bias is not None}
    figures: dict[str, float] = {}
    if scheme.kv_bits == 4 and config.key_smoothing:
        weights, biases, figures = smooth_keys(job, weights, biases)
    weights, biases, norms, statistics = smooth(
        weights,
        biases,
        {name: getattr(parts, name).weight.detach().float() for name in NORMS},
        statistics,
        config.smoothing_exponent,
        int(parts.self_attn.head_dim),
    )
    made: dict[str, QuantizedWeight] = {}
    latents: dict[str, Tensor] = {}
    for index, site in enumerate(SITES):
        paths = linears_of_site(site)
        stacked = torch.cat([weights[p] for p in paths])
        generator = torch.Generator().manual_seed((seed * 1009 + job.index) * 10 + index)
        quantized, latent = quantize_site(stacked, statistics[site].hessian, scheme, config, generator)
        importance = statistics[site].hessian.diagonal()
        start = 0
        for path in paths:
            rows = slice(start, start + weights[path].shape[0])
            start = rows.stop
            part = _rows(quantized, rows)
            made[path], latents[path] = _snapped(part, scheme.level_family), latent[rows].clone()
            error, snapped = (_relative_error(weights[path], dequantize(q), importance) for q in (part, made[path]))
            figures[f"weight_error/{path}"] = snapped
            figures[f"snap_error/{path}"] = snapped / max(error, 1e-30) - 1
    order = {path: made[path] for path in SITE_OF}
    return BlockState(linears=order, norms=norms, biases=biases, latents={path: latents[path] for path in SITE_OF}), figures


def _sample(w: Tensor, h: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`size` groups that stand for all: the heaviest quarter surely, the rest at random with their importance scaled up.

    A plain random sample misses rare groups of great weighted energy, the table then has no entry for them, and the model can be
    ruined with hardly any error on average (docs/log.md, entry 2).
    """
    if len(w) <= size:
        return w, h
    energy = (h * w.square()).sum(-1)
    sure = energy.topk(size // 4).indices
    rest = torch.ones(len(w), dtype=torch.bool, device=w.device)
    rest[sure] = False
    others = rest.nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), generator=generator)[: size - len(sure)].to(w.device)]
    scale = len(others) / len(drawn)
    return torch.cat([w[sure], w[drawn]]), torch.cat([h[sure], h[drawn] * scale])


def _on_grid(table: Tensor, w: Tensor, h: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """The table as it will be stored: entries are multiples of one unit, at most 127 of them.

    A few groups that hold outlier columns make a few entries large; a unit that covers them is too coarse for the rest. So
    the unit of least error on the sample is taken, and what lies beyond it is clipped. Returns the table and the unit.
    """
    largest = table.abs().max().clamp_min(1e-12)
    best, best_unit, best_error = table, largest / GRID, float("inf")
    for share in GRID_SHARES:
        unit = largest * share / GRID
        candidate = to_family_grid(table / unit, family) * unit
        error = float(weighted_error(w, h, candidate[choose_entries(w, h, candidate, shortlist=1)]).sum())
        if error < best_error:
            best, best_unit, best_error = candidate, unit, error
    return best, best_unit


def _snapped(q: QuantizedWeight, family: str) -> QuantizedWeight:
    """Explicit levels as their family will store them; a table is on its grid already."""
    return q if q.levels is None else replace(q, levels=to_family_grid(q.levels, family))


def _relative_error(w: Tensor, made: Tensor, importance: Tensor) -> float:
    return float(((w - made).square() * importance).sum() / (w.square() * importance).sum().clamp_min(1e-30))


def _rows(q: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some rows of a stacked weight; explicit levels get their own row scales, a table stays shared."""
    codes, outliers = q.codes[rows].contiguous(), q.outliers and q.outliers.rows(rows)
    if q.levels is not None:
        return replace(from_real_levels(codes, q.levels[rows] * q.row_scale[rows, None, None], q.group_size), outliers=outliers)
    assert q.group_codes is not None
    return QuantizedWeight(
        codes, q.row_scale[rows].clone(), q.group_size, group_codes=q.group_codes[rows].contiguous(), codebook=q.codebook, outliers=outliers
    )


def quantize_site(w: Tensor, hessian: Tensor, scheme: SchemeConfig, config: PtqInitConfig, generator: torch.Generator) -> tuple[QuantizedWeight, Tensor]:
    """Stacked rows that share an input: w `(out, in)`, hessian `(in, in)` -> quantized weight and compensated weights.

    With outlier channels both are in the order of the columns, outliers last.
    """
    if not scheme.outlier_channels:
        return _two_bits(w, hessian, scheme, config, generator)
    perm = hessian.diagonal().argsort(stable=True)
    perm = torch.cat([perm[: -scheme.outlier_channels].sort().values, perm[-scheme.outlier_channels :].sort().values])
    quantized, latent = _two_bits(w[:, perm], hessian[perm][:, perm], scheme, config, generator)
    return replace(quantized, outliers=to_outliers(latent[:, -scheme.outlier_channels :], perm)), latent


def _two_bits(w: Tensor, hessian: Tensor, scheme: SchemeConfig, config: PtqInitConfig, generator: torch.Generator) -> tuple[QuantizedWeight, Tensor]:
    """All columns but the last `outlier_channels`."""
    curvature = hessian if config.error_compensation else None
    importance = hessian.diagonal().clamp_min(0) / hessian.diagonal().mean().clamp_min(1e-12)
    if config.fit_weight == "inverse_hessian" and curvature is not None:
        precision = 1 / inverse_factor(curvature, config.damping).square().sum(0).clamp_min(1e-20)  # 1 / [H^-1]_ii, since H^-1 = U^T U
        importance = precision / precision.mean()
    if scheme.level_mode == "codebook":
        return _with_codebook(w, curvature, importance, scheme, config, generator)
    return _with_explicit_levels(w, curvature, importance, scheme, config)


def _with_explicit_levels(w: Tensor, hessian: Tensor | None, importance: Tensor, scheme: SchemeConfig, config: PtqInitConfig) -> tuple[QuantizedWeight, Tensor]:
    levels = torch.zeros(w.shape[0], n_groups(w.shape[1], scheme.group_size), 4, device=w.device)

    def choose(w: Tensor, columns: Tensor, group: int) -> Tensor:
        h = importance[columns]
        if config.method == "rtn":
            made = round_to_nearest(w)
        elif scheme.level_family != "free":
            made = FITS[scheme.level_family](w, h)
        else:
            made = fit_levels(w, h, config.em_rounds, config.em_starts)
        levels[:, group] = made
        return made

    order = sweep_order(importance[: w.shape[1] - scheme.outlier_channels], scheme.group_size, config.heaviest_first)
    codes, latent = quantize_columns(w, hessian, config.damping, order, choose)
    return from_real_levels(codes, levels, scheme.group_size), latent


def _with_codebook(
    w: Tensor, hessian: Tensor | None, importance: Tensor, scheme: SchemeConfig, config: PtqInitConfig, generator: torch.Generator
) -> tuple[QuantizedWeight, Tensor]:
    """Fit the table on a sample of groups, then let each group pick its entry on the compensated weights.

    Rows are brought to unit root mean square first, so that one table serves all of them; a row with a single huge weight is
    brought to a largest weight of `LARGEST` instead, so that it does not stretch the int8 grid of everybody's table.
    """
    fitted = w[:, : w.shape[1] - scheme.outlier_channels]
    unit = torch.maximum(fitted.square().mean(1, keepdim=True).sqrt(), fitted.abs().amax(1, keepdim=True) / LARGEST).clamp_min(1e-12)
    grouped = split_groups(fitted / unit, scheme.group_size)
    padded = nn.functional.pad(importance[: fitted.shape[1]], (0, -fitted.shape[1] % scheme.group_size))  # what fills a short last group counts for nothing
    weight = padded.view(1, -1, scheme.group_size) * unit[:, :, None].square() / unit.square().mean()
    flat, flat_weight = grouped.flatten(0, 1), weight.expand_as(grouped).flatten(0, 1)
    flat, flat_weight = _sample(flat, flat_weight, config.codebook_sample, generator)
    table = fit_codebook(flat, flat_weight, scheme.codebook_size, config.codebook_rounds, config.codebook_shortlist, generator, scheme.level_family == "affine")
    table, table_unit = _on_grid(table, flat[::2], flat_weight[::2], scheme.level_family)
    group_codes = torch.zeros(w.shape[0], n_groups(w.shape[1], scheme.group_size), dtype=torch.uint8, device=w.device)

    def choose(w: Tensor, columns: Tensor, group: int) -> Tensor:
        entry = choose_entries(w / unit, importance[columns], table, config.codebook_shortlist)
        group_codes[:, group] = entry.to(torch.uint8)
        return table[entry] * unit

    order = sweep_order(importance[: w.shape[1] - scheme.outlier_channels], scheme.group_size, config.heaviest_first)
    codes, latent = quantize_columns(w, hessian, config.damping, order, choose)
    row_scale = unit.squeeze(1) * table_unit
    return QuantizedWeight(codes, row_scale, scheme.group_size, group_codes=group_codes, codebook=(table / table_unit).round()), latent

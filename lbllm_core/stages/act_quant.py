"""Stage 3, activation-aware refinement (AAR): 4-bit activations on, codes frozen, a second shallow-to-deep sweep.

Each site starts from clips (and knees, or plane weights) that minimise its own quantization error on calibration inputs, found by a small search, then the
block's levels, clips and knees are trained together against the teacher's output (arXiv 2604.19167, section on AAR). The 4-bit
cache of keys and values, if the scheme has one, is on as well.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from lbllm_kernels.activation import POWERS_OF_TWO, ActFactors
from torch import Tensor, nn

from lbllm_core.config import ActQuantConfig, SchemeConfig
from lbllm_core.engine.block_sweep import BlockJob, error_on_sample, pass_type
from lbllm_core.engine.train_block import TrainingPlan, train_block
from lbllm_core.model.blocks import SITES, linears_of_site
from lbllm_core.model.linear import LearningRates
from lbllm_core.model.student import BlockState
from lbllm_core.model.student_block import build_block, read_state
from lbllm_core.quant.activation import ActQuantizer, fit_planes
from lbllm_core.quant.activation_histogram import histogram

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)
KNEES = (0.15, 0.25, 0.4, 0.55)
SEARCH_TOKENS = 1024
SEARCH_SEQUENCES = 16  # that they come from


def learning_rates(config: ActQuantConfig) -> LearningRates:
    """What learns, and how fast."""
    levels, clips = config.trained in ("both", "levels"), config.trained in ("both", "clips")
    return LearningRates(levels=config.lr_levels * levels, row_scale=config.lr_levels * levels, clips=config.lr_clips * clips, knees=config.lr_knees * clips)


def refine_block(job: BlockJob, start: BlockState, scheme: SchemeConfig, config: ActQuantConfig, seed: int) -> tuple[BlockState, dict[str, Any]]:
    """Stage 3 of one block: search factors, then train them with the levels. Figures also hold the `activations` of each site."""
    samples: dict[str, Tensor] = {}
    untrained = start
    if scheme.act_bits == 4:
        samples = site_inputs(job, start, scheme)
        untrained = replace(start, sites={site: ActFactors(scheme.act_variant) for site in samples})
        start = replace(start, sites=search_factors(job, start, scheme, samples))
    before = error_on_sample(job, build_block(job.teacher_block, untrained, "fixed", scheme.kv_bits, dtype=pass_type(job.hardware)))
    block = build_block(job.teacher_block, start, "frozen", scheme.kv_bits, scheme.trained_family)
    plan = TrainingPlan(
        rates=learning_rates(config), epochs=config.epochs, batch_size=config.batch_size, lr_final=config.lr_final, grad_clip=config.grad_clip, seed=seed
    )
    figures: dict[str, Any] = {"error_before": before, **train_block(block, job, plan)}
    state = read_state(block, start)
    if samples:
        figures["activations"] = {site: {"counts": histogram(x), "searched": _numbers(start.sites[site]), "learned": _numbers(state.sites[site])} for site, x in samples.items()}
    return state, figures


@torch.no_grad()
def site_inputs(job: BlockJob, state: BlockState, scheme: SchemeConfig) -> dict[str, Tensor]:
    """A sample of the inputs of each site, `(SEARCH_TOKENS, channels)` or a little more: tokens at even distances, of sequences at even distances.

    The first token of a sequence, whose activations are those of no other, is left out. Activations before the sites are not quantized.
    """
    block = build_block(job.teacher_block, BlockState(state.linears, state.norms, state.biases), "fixed", scheme.kv_bits, dtype=pass_type(job.hardware))
    sequences = evenly(len(job.inputs), SEARCH_SEQUENCES)
    found: dict[str, list[Tensor]] = {site: [] for site in SITES}
    handles = []
    for site in SITES:

        def collect(_: nn.Module, arguments: tuple[Tensor, ...], site: str = site) -> None:
            x = arguments[0][0, 1:]
            found[site].append(x[evenly(len(x), -(-SEARCH_TOKENS // len(sequences)))].float())

        handles.append(block.get_submodule(linears_of_site(site)[0]).register_forward_pre_hook(collect))
    try:
        for i in sequences:
            job.run(block, job.inputs[slice(i, i + 1)])
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.cat(parts) for site, parts in found.items()}


def evenly(length: int, count: int) -> list[int]:
    """Up to `count` different places of `range(length)` at even distances, the first and the last among them."""
    return torch.linspace(0, length - 1, min(count, length)).round().int().tolist()


@torch.no_grad()
def search_factors(job: BlockJob, state: BlockState, scheme: SchemeConfig, samples: dict[str, Tensor]) -> dict[str, ActFactors]:
    """Clips (and knees, or planes) of each site that lose least on a sample `(tokens, channels)` of its inputs, by grid search."""
    knees = KNEES if scheme.act_variant == "piecewise" else (0.25,)
    found: dict[str, ActFactors] = {}
    for site, x in samples.items():
        found[site], best_error = ActFactors(scheme.act_variant), float("inf")
        outliers = state.linears[linears_of_site(site)[0]].outliers
        if outliers is not None:  # they have codes of their own
            x = x.index_fill(1, outliers.channels.long().to(x.device), 0)
        for clip, knee in itertools.product(CLIPS, knees):
            planes = fit_planes(x, clip) if scheme.act_variant == "planes" else POWERS_OF_TWO
            factors = ActFactors(scheme.act_variant, clip, clip, knee, knee, planes=planes)
            error = float((ActQuantizer(factors).to(x.device)(x) - x).square().sum())
            error = job.hardware.ranks.mean(error, x.device)
            if error < best_error:
                found[site], best_error = factors, error
    return found


def _numbers(f: ActFactors) -> list[float]:
    return [f.clip_max, f.clip_min, f.knee_low, f.knee_high]

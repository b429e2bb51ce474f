"""Stage 2, weight-aware training (WAT): each block learns to reproduce the teacher's, activations in full precision.

    L = |O_T - O_S|^2 + lambda * |1 - |2 G - 1|^beta|^2                               (arXiv 2604.19167, eqs. 4 and 6)

The student block sees what the quantized prefix gives it, the target is the teacher block's output on the teacher's own
stream, so each block also repairs what the ones before it lost. What learns: latent weights (and with them the codes),
levels or table entries and row scales; in the paper's parameterisation also the latent bitmap.

`joint`: stages 2 and 3 as one. Activations and cache are quantized from the first step, clips and knees learn with everything else. The
paper trains apart because this diverges; its evidence is one row.
"""

from __future__ import annotations

from dataclasses import replace

from lbllm_core.config import SchemeConfig, WeightDistillConfig
from lbllm_core.engine.block_sweep import BlockJob, error_on_sample, pass_type
from lbllm_core.engine.train_block import TrainingPlan, train_block
from lbllm_core.model.linear import LearningRates
from lbllm_core.model.student import BlockState
from lbllm_core.model.student_block import Mode, build_block, read_state
from lbllm_core.stages.act_quant import search_factors, site_inputs


def learning_rates(config: WeightDistillConfig) -> LearningRates:
    """What learns, and how fast."""
    weights = config.trained in ("all", "weights", "levels_weights")
    levels = config.trained in ("all", "levels", "levels_weights")
    return LearningRates(
        weight=config.lr_weight * weights,
        levels=config.lr_levels * levels,
        row_scale=config.lr_levels * levels,
        bitmap=config.lr_bitmap * (config.trained == "all"),
        clips=config.lr_clips * config.joint,
        knees=config.lr_knees * config.joint,
    )


def distill_block(job: BlockJob, start: BlockState, scheme: SchemeConfig, config: WeightDistillConfig, seed: int) -> tuple[BlockState, dict[str, float]]:
    """Train one block from stage 1's state."""
    mode: Mode = "nearest"
    if config.parameterization == "latent":
        mode = "latent_soft" if config.bitmap_start == "soft" else "latent_hard"
    if config.joint and scheme.act_bits == 4:
        start = replace(start, sites=search_factors(job, start, scheme, site_inputs(job, start, scheme)))
    kv_bits = scheme.kv_bits if config.joint else 16
    before = error_on_sample(job, build_block(job.teacher_block, start, "fixed", kv_bits, dtype=pass_type(job.hardware)))  # gone before the student comes
    block = build_block(job.teacher_block, start, mode, kv_bits, scheme.trained_family, config.pairing)
    plan = TrainingPlan(
        rates=learning_rates(config),
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr_final=config.lr_final,
        grad_clip=config.grad_clip,
        seed=seed,
        polarize=config.polarize,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
    )
    figures = train_block(block, job, plan)
    return read_state(block, start), {"error_before": before, **figures}

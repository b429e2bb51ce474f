"""Stages on the tiny model, as the steps of the pipeline run them: sweep, ledger, student folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lbllm_core.config import DatasetConfig, ModelConfig, PtqInitConfig, RunConfig, SchemeConfig, WeightDistillConfig
from lbllm_core.data.tokens import calibration_tokens
from lbllm_core.engine.block_sweep import SweepPlan, sweep
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import silent
from lbllm_core.evaluation.perplexity import perplexity, windows
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.load import load_teacher
from lbllm_core.model.student import load_block
from lbllm_core.model.student_block import fake_quant_model
from lbllm_core.stages.ptq_init import quantize_block
from lbllm_core.stages.weight_distill import distill_block

CPU = Hardware(torch.device("cpu"), torch.float32)
A16 = SchemeConfig(codebook_size=32, act_bits=16)
EXPLICIT_64 = SchemeConfig(level_mode="explicit", group_size=64, act_bits=16)
ROUNDED = PtqInitConfig(method="rtn", error_compensation=False, smoothing_exponent=0.0)


class Bench:
    """Teacher, calibration tokens and held-out windows of the tiny model of one seed."""

    def __init__(self, home: Path, seed: int = 0, sequences: int = 64):
        self.config = RunConfig(model=ModelConfig(path=str(seed) if seed else "", context=128), dataset=DatasetConfig(sequences=sequences))
        self.teacher = load_teacher(self.config.model, home)
        self.decoder = Decoder(self.teacher.model)
        self.ids = calibration_tokens(self.config, self.teacher.tokenizer)
        self.windows = windows("ppl_synthetic", self.config, self.teacher.tokenizer)

    def perplexity(self, states=None) -> float:
        model = self.teacher.model if states is None else fake_quant_model(self.teacher.model, states, 16)
        return perplexity(lambda ids: model(ids, use_cache=False).logits, self.windows).ppl

    def sweep(self, folder: Path, work, plan: SweepPlan, ids=None, report=silent):
        return sweep(self.decoder, self.ids if ids is None else ids, work, plan, Ledger(folder), CPU, report)

    def states(self, folder: Path, variant: str = "none"):
        return [load_block(folder, i, variant) for i in range(len(self.decoder.blocks))]

    def stage1(self, folder: Path, scheme: SchemeConfig = A16, config: PtqInitConfig | None = None, seed: int = 0):
        config = config or PtqInitConfig()
        self.sweep(folder, lambda job: quantize_block(job, scheme, config, seed), SweepPlan("ptq_init", False))
        return self.states(folder)

    def stage2(self, start: Path, folder: Path, seed: int = 0, scheme: SchemeConfig = A16, **changes):
        config = replace(WeightDistillConfig(), **changes)
        self.sweep(folder, lambda job: distill_block(job, load_block(start, job.index, "none"), scheme, config, seed), SweepPlan("weight_distill", True))
        return self.states(folder)

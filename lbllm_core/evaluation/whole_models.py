"""Figures that need a model whole in memory: what it writes after the same words, and its speed.

Everything else of packing goes block by block (`packed_check.py`), so a model may come here that fits nowhere. Then the figure is left out and
a sentence in the log says why. A model that was not streamed fits: it has been there.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lbllm_core.engine import machine
from lbllm_core.engine.files import write_atomic
from lbllm_core.engine.hardware import resolve
from lbllm_core.engine.step import StepContext
from lbllm_core.engine.tiers import KEPT_FREE
from lbllm_core.model.blocks import Decoder

log = logging.getLogger(__name__)
PROMPT_TOKENS = 24  # of a sample text


def room(context: StepContext, teacher: Decoder) -> float:
    """Bytes that a whole model may take: on its way to a device it is in host memory too. Infinity where the teacher is whole already."""
    if not teacher.streamed:
        return math.inf
    limits = machine.limits(resolve(context.config.hardware), context.home)
    return KEPT_FREE * min(limits.host_free, limits.device_free or limits.host_free)


def fits(what: str, size: float, there: float) -> bool:
    """Whether models of `size` bytes have room; the log says so when they have not."""
    if size > there:
        log.warning("%s: left out, it needs %.1f GB at once and %.1f GB are free; everything else goes block by block", what, size / 1e9, there / 1e9)
    return size <= there


def write_samples(context: StepContext, teacher: Decoder, tokenizer: Any, held: Mapping[str, float], there: float) -> None:
    """samples.json: what teacher and packed model write. `held`: bytes of each."""
    from lbllm_core.evaluation.samples import sample_texts
    from lbllm_core.model.load import load_teacher
    from lbllm_core.model.packed_folder import load_packed

    c = context.config
    if not c.pack.sample_tokens or not fits("sample texts of teacher and packed model", sum(held.values()), there):
        return
    device = resolve(c.hardware).device
    model = load_teacher(c.model, context.home).model.to(device) if teacher.streamed else teacher.model
    texts = sample_texts({"teacher": model, "packed": load_packed(context.folder / "packed", device)}, tokenizer, _prompts(context, tokenizer), c.pack.sample_tokens)
    write_atomic(context.folder / "samples.json", json.dumps(texts, sort_keys=True, indent=1).encode())


def measure_speed(context: StepContext, held: Mapping[str, float], there: float) -> dict[str, float]:
    """Speed figures of packed model and teacher (`teacher_...`), each in a process of its own."""
    from lbllm_core.evaluation.speed import measure_packed, measure_teacher

    c, found = context.config, dict[str, float]()
    amount = (c.pack.prefill_tokens, c.pack.decode_tokens, c.pack.repeats, resolve(c.hardware).device.type)
    if c.pack.benchmark and fits("speed of the packed model", held["packed"], there):
        found |= measure_packed(context.folder / "packed", *amount)
    if c.pack.benchmark and fits("speed of the teacher", held["teacher"], there):
        found |= {f"teacher_{name}": value for name, value in measure_teacher(c.model, context.home, *amount).items()}
    return found


def _prompts(context: StepContext, tokenizer: Any) -> Tensor:
    """The openings of three calibration sequences, from start, middle and end, `(3, PROMPT_TOKENS)` (fewer where there are fewer)."""
    from lbllm_core.data.tokens import calibration_tokens

    ids = calibration_tokens(context.config, tokenizer, context.home)
    return ids[sorted({0, len(ids) // 2, len(ids) - 1}), : min(PROMPT_TOKENS, context.config.model.context // 2)]

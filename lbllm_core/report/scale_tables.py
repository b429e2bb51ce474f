"""The table of docs/performance.md from `results/scale_*.json`: what was asked, what was measured, and under which circumstances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.report.tables import Cells, markdown, number

Record = Mapping[str, Any]
TITLES = {
    "stage2_mfu": "stage 2, one step: share of 989 TFLOP/s",
    "stage2_tok_s": "stage 2, tokens/s",
    "stage3_tok_s": "stage 3, tokens/s",
    "step_ms": "stage 2, one step, ms",
    "peak_gb": "peak GPU memory, GB",
    "allocated_gb": "most GPU memory in tensors, GB",
    "stage1_s": "stage 1, s a block",
    "block_s": "s a block, everything",
    "work_s": "s a block, the stage's own work",
    "setup_s": "s a stage, making the streams",
    "fixed_s": "s a block, without tokens",
    "projected_hours": "hours of 32 blocks at 16.8 M tokens, projected",
    "host_growth_gb": "growth of host memory, GB a block",
    "linearity": "time over what half of the tokens predict",
    "store_rel_error": "error of stored hidden states",
    "two_gpu_speedup": "two GPUs, batch a GPU fixed: speed-up",
    "preflight_error": "preflight's estimate over the measured value, less 1",
}


def scale_table(records: Sequence[Record]) -> str:
    """Markdown: a line a figure."""
    cells: Cells = [["figure", "shape", "circumstances", "value"]]
    for r in records:
        if r["name"] in TITLES:
            stage = {"ptq_init": "stage 1", "weight_distill": "stage 2", "act_quant": "stage 3", "all": "stages 1 to 3"}.get(str(r.get("stage", "")), "")
            tokens = f"{r['tokens_a_step']} tokens a step" if "tokens_a_step" in r else f"{r['tokens'] / 1e6:.3g} M tokens" if "tokens" in r else ""
            kept = " ".join(str(r[k]) for k in ("tier", "dtype") if k in r)
            words = (stage, {"nearest": "nearest-level codes", "latent": "latent W and G"}.get(str(r.get("parameterization", "")), ""), str(r.get("of", "")), tokens, kept)
            cells.append([TITLES[r["name"]], str(r.get("shape", "")), ", ".join(w for w in words if w), number(float(r["value"]))])
    return markdown(cells)

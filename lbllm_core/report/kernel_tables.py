"""The tables of docs/kernels.md from the benchmarks' records: products by shape and number of tokens, and whole models.

A cell of a product is the time of our fastest path and how many times faster it is than the baseline of the same run (cuBLAS fp16
on a GPU, torch fp32 on a CPU). Up to 16 tokens our time includes the activation quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbllm_core.report.tables import Cells, markdown, number

Record = Mapping[str, Any]


def product_table(records: Sequence[Record], baseline: str) -> str:
    """Markdown: a line a shape and level storage, a column a number of tokens."""
    base = {(r["n"], r["k"], r["m"]): r["value"] for r in records if r["name"] == "kernel_us" and r.get("op") == baseline}
    ours: dict[tuple[Any, ...], dict[int, float]] = {}
    for r in records:
        if r["name"] == "kernel_us" and r.get("op") == "ours":
            line = ours.setdefault((r["n"], r["k"], r["level_mode"], r["group_size"]), {})
            line[r["m"]] = min(r["value"], line.get(r["m"], float("inf")))
    tokens = sorted({m for line in ours.values() for m in line})
    cells: Cells = [["N x K", "levels", *(f"M={m}" for m in tokens)]]
    for (n, k, mode, group), line in ours.items():
        stored = f"table, G={group}" if mode == "codebook" else f"stored, G={group}"
        values = [f"{number(line[m])} us, {base[n, k, m] / line[m]:.2f}x" if m in line and (n, k, m) in base else "" for m in tokens]
        cells.append([f"{n} x {k}", stored, *values])
    return markdown(cells)


BESIDE = {"cublas_fp16": "cuBLAS fp16", "ours_beside": "ours, stored, G=128", "gemlite_a16w2": "GemLite A16W2", "humming_w2": "Humming W2A16"}


def peers_table(records: Sequence[Record]) -> str:
    """Markdown: a line a shape and number of tokens, a column a library; how many times faster than cuBLAS of the same run it is."""
    times: dict[tuple[int, int, int], dict[str, Record]] = {}
    for r in records:
        if r["name"] == "kernel_us" and r.get("op") in BESIDE:
            times.setdefault((r["m"], r["n"], r["k"]), {})[str(r["op"])] = r
    ops = [op for op in BESIDE if any(op in line for line in times.values())]
    cells: Cells = [["N x K", "M", *(BESIDE[op] for op in ops)]]
    for (m, n, k), line in sorted(times.items()):
        values = [f"{number(line[op]['value'])} us" + (f", {line[op]['speedup']:.2f}x" if "speedup" in line[op] else "") if op in line else "" for op in ops]
        cells.append([f"{n} x {k}", str(m), *values])
    return markdown(cells)


MODEL_FIGURES = ("load_s", "weights_gb", "decode_tok_s", "prefill_tok_s", "peak_gb")


def model_table(records: Iterable[Record]) -> str:
    """Markdown: a line a model shape and engine, a column a figure; of several settings of one engine the fastest decode stands."""
    lines: dict[tuple[str, str], list[dict[str, float]]] = {}
    for r in records:
        if r.get("engine") and r["name"] in MODEL_FIGURES:
            runs = lines.setdefault((str(r["shape"]), str(r["engine"])), [])
            if not runs or r["name"] in runs[-1]:
                runs.append({})
            runs[-1][str(r["name"])] = float(r["value"])
    cells: Cells = [["shape", "engine", "load, s", "weights, GB", "decode, tokens/s", "prefill, tokens/s", "peak, GB"]]
    for (shape, engine), runs in lines.items():
        best = max(runs, key=lambda run: run.get("decode_tok_s", 0.0))
        cells.append([shape, engine, *(number(best[name]) if name in best else "" for name in MODEL_FIGURES)])
    return markdown(cells)

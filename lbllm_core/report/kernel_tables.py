"""The tables of docs/kernels.md from the benchmarks' records: products by shape and number of tokens, and whole models.

A cell of a product is the time of our fastest path and how many times faster it is than the baseline of the same run (cuBLAS fp16
on a GPU, torch fp32 on a CPU). Up to 16 tokens our time includes the activation quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbllm_core.report.tables import Cells, markdown, number

Record = Mapping[str, Any]


Shape = tuple[int, int, str, int]


def _products(records: Iterable[Record], baseline: str) -> tuple[dict[tuple[int, int, int], float], dict[Shape, dict[int, float]]]:
    """The baseline's microseconds by (n, k, tokens); ours, the fastest path's, by shape and level storage, then tokens."""
    base: dict[tuple[int, int, int], float] = {}
    ours: dict[Shape, dict[int, float]] = {}
    for r in records:
        if r["name"] != "kernel_us":
            continue
        if r.get("op") == baseline:
            base[r["n"], r["k"], r["m"]] = r["value"]
        if r.get("op") == "ours":
            line = ours.setdefault((r["n"], r["k"], r["level_mode"], r["group_size"]), {})
            line[r["m"]] = min(r["value"], line.get(r["m"], float("inf")))
    return base, ours


def _storage(mode: str, group: int) -> str:
    return f"table, G={group}" if mode == "codebook" else f"stored, G={group}"


def product_table(records: Sequence[Record], baseline: str) -> str:
    """Markdown: a line a shape and level storage, a column a number of tokens."""
    base, ours = _products(records, baseline)
    tokens = sorted({m for line in ours.values() for m in line})
    cells: Cells = [["N x K", "levels", *(f"M={m}" for m in tokens)]]
    for (n, k, mode, group), line in ours.items():
        values = [f"{number(line[m])} us, {base[n, k, m] / line[m]:.2f}x" if m in line and (n, k, m) in base else "" for m in tokens]
        cells.append([f"{n} x {k}", _storage(mode, group), *values])
    return markdown(cells)


def speedups(records: Sequence[Record], baseline: str) -> dict[str, list[tuple[float, float]]]:
    """Points (tokens, times faster) of each shape and level storage that was measured, for a plot."""
    base, ours = _products(records, baseline)
    lines = {
        f"{n} x {k}, {_storage(mode, group)}": [(float(m), base[n, k, m] / line[m]) for m in sorted(line) if (n, k, m) in base]
        for (n, k, mode, group), line in ours.items()
    }
    return {name: points for name, points in lines.items() if points}


BESIDE = {
    "cublas_fp16": "cuBLAS fp16", "ours_beside": "ours, stored, G=128", "gemlite_a16w2": "GemLite A16W2", "humming_w2": "Humming W2A16",
    "cublaslt_int8": "cuBLASLt int8",
}  # fmt: skip


def peers_table(records: Sequence[Record]) -> str:
    """Markdown: a line a shape and number of tokens, a column a library; how many times faster than cuBLAS of the same run it is.

    A row of a library that the time did not reach, or that failed, says so; cuBLASLt's int8 product pads up to 16 tokens to 32.
    """
    cells_of: dict[tuple[int, int, int], dict[str, str]] = {}
    for r in records:
        if r.get("op") not in BESIDE:
            continue
        line = cells_of.setdefault((r["m"], r["n"], r["k"]), {})
        if r["name"] == "kernel_us":
            line[str(r["op"])] = f"{number(r['value'])} us" + (f", {r['speedup']:.2f}x" if "speedup" in r else "")
        elif r["name"] == "not_reached":
            line[str(r["op"])] = "not reached" if r["why"] == "time" else "failed"
    ops = [op for op in BESIDE if any(op in line for line in cells_of.values())]
    cells: Cells = [["N x K", "M", *(BESIDE[op] for op in ops)]]
    cells += [[f"{n} x {k}", str(m), *(line.get(op, "") for op in ops)] for (m, n, k), line in sorted(cells_of.items())]
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

"""What `bench_gpu.py` prints last, from the records that it keeps: plain functions of lists of dictionaries.

`speed_table`: our fastest path beside cuBLAS fp16, with a mark where a target is missed; empty where nothing of ours was timed. `paths_table`: for many tokens every path that was
timed, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Records = Sequence[dict[str, Any]]
TARGETS = {  # ratio to cuBLAS fp16 that a shape must reach, by tokens
    (4096, 4096): {1: 3.0, 4: 3.0, 8: 3.0, 16: 2.5, 128: 0.9, 512: 0.9, 2048: 1.0},
    (11008, 4096): {1: 4.0, 4: 4.0, 8: 4.0, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (4096, 11008): {1: 4.0, 4: 4.0, 8: 4.0, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (8192, 8192): {1: 3.5, 4: 3.5, 8: 3.5, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (8192, 28672): {1: 4.5, 4: 4.5, 8: 4.5, 16: 3.5, 128: 1.0, 512: 1.1, 2048: 1.2},
}


def speed_table(records: Records) -> str:
    """Ours against cuBLAS fp16, one line for each shape and level mode; `!` marks a row under its target."""
    ours = [r for r in records if r["name"] == "kernel_us" and r["op"] == "ours"]
    if not ours:
        return ""
    base = {(r["n"], r["k"], r["m"]): r["value"] for r in records if r.get("op") == "cublas_fp16"}
    tokens = sorted({r["m"] for r in ours})
    lines = ["| N x K | levels | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---|---|" + "---|" * len(tokens)]
    rows = list(dict.fromkeys((r["n"], r["k"], r["level_mode"], r["group_size"]) for r in ours))
    for n, k, mode, group in rows:
        cells = []
        for m in tokens:
            found = [r["value"] for r in ours if (r["n"], r["k"], r["level_mode"], r["group_size"], r["m"]) == (n, k, mode, group, m)]
            if not found:
                cells.append("-")
                continue
            ratio = base[(n, k, m)] / min(found)
            missed = "!" if ratio < TARGETS.get((n, k), {}).get(m, 0) else ""
            cells.append(f"{min(found):.1f} us, {ratio:.2f}x{missed}")
        lines.append(f"| {n} x {k} | {mode} G={group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paths_table(records: Records) -> str:
    """Microseconds of each path above 16 tokens (quantizer apart), cuBLAS fp16 and cuBLASLt int8 beside them; empty where none was timed.

    A path whose output differed from another's is marked, not timed.
    """
    timed = [r for r in records if r["name"] == "kernel_us"]
    ours = [r for r in timed if r["op"] == "ours" and "best" in r]
    wrong = {(r["n"], r["k"], r["level_mode"], r["group_size"], r["m"], r["path"]) for r in records if r["name"] == "wrong_output"}
    others = {(r["op"], r["n"], r["k"], r["m"]): r["value"] for r in timed if r["op"] in ("cublas_fp16", "cublaslt_int8")}
    paths = list(dict.fromkeys([*(r["path"] for r in ours), *(key[-1] for key in wrong)]))
    if not paths:
        return ""
    lines = ["| N x K | levels | M | cuBLAS fp16 | cuBLASLt int8 | " + " | ".join(paths) + " | best |", "|---|---|" + "---:|" * (len(paths) + 4)]
    for n, k, mode, group, m in dict.fromkeys((r["n"], r["k"], r["level_mode"], r["group_size"], r["m"]) for r in ours):
        us = {r["path"]: r["value"] for r in ours if (r["n"], r["k"], r["level_mode"], r["group_size"], r["m"]) == (n, k, mode, group, m)}
        base, int8 = (others.get((op, n, k, m)) for op in ("cublas_fp16", "cublaslt_int8"))
        best = min(us, key=us.__getitem__)
        cells = ["-" if value is None else f"{value:.1f}" for value in (base, int8, *(us.get(path) for path in paths))]
        cells = cells[:2] + ["WRONG" if (n, k, mode, group, m, path) in wrong else cell for path, cell in zip(paths, cells[2:], strict=True)]
        ratio = "" if base is None else f" {base / us[best]:.2f}x" + ("!" if base / us[best] < TARGETS.get((n, k), {}).get(m, 0) else "")
        lines.append(f"| {n} x {k} | {mode} G={group} | {m} | " + " | ".join(cells) + f" | {best}{ratio} |")
    return "\n".join(lines)

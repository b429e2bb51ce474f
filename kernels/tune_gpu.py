"""What the defaults of the CUDA path are chosen from: `bench_gpu.py --only sweep,thresholds`, and plain calls for a profiler (`probe`)."""

from __future__ import annotations

from typing import Any

import torch
from gpu_timing import FACTORS, SHAPES, Clock, graph_us, random_weight, record, rotated, weights_of
from lbllm_kernels import cuda

MODES = (("explicit", 128), ("codebook", 32))


def sweep_section(clock: Clock) -> list[dict[str, Any]]:
    """How decode launches should be cut: every plan for every shape, the best three printed."""
    made = []
    for n, k in SHAPES:
        for mode, group in MODES:
            weights = weights_of(n, k, mode, group)
            for m in (1, 2, 4, 8, 16):
                if clock.over():
                    return made
                x = torch.randn(m, k, dtype=torch.float16, device="cuda")
                found = {}
                for path in ("fused", "decode") if m <= 8 and m * (weights[0].padded + 16) <= cuda.FUSED_BYTES else ("decode",):
                    for rows in (1, 2, 3, 4) if m <= 8 else (1, 2, 3):
                        for warps in (4, 8, 12, 16):
                            for flags in (0, 1, 3) if path == "decode" else (0, 2):
                                plan = cuda.Plan(rows, warps, flags)
                                found[(path, rows, warps, flags)] = graph_us(rotated(weights, lambda w, p=path, q=plan, x=x: cuda.forward(x, w, FACTORS, path=p, plan=q)), 7)
                order = sorted(found, key=found.__getitem__)
                made += [record("sweep", us, n, k, m, group_size=group, level_mode=mode, plan=list(plan)) for plan, us in found.items()]
                for wanted in {plan[3] for plan in found}:
                    best = [p for p in order if p[3] == wanted][:3]
                    clock.say(f"{n:6} x {k:5}  M={m:<3} {mode:8} flags={wanted} " + "   ".join(f"{p[0]} r{p[1]} w{p[2]} {found[p]:.2f}" for p in best))
            del weights
    return made


def thresholds_section(clock: Clock) -> list[dict[str, Any]]:
    """Quantizer and product together by every path over M: where one path should hand over to the next."""
    made = []
    for n, k in ((4096, 4096), (11008, 4096), (8192, 8192)):
        weights = weights_of(n, k, "codebook", 32)
        for m in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            if clock.over():
                return made
            us = {}
            for path in cuda.PATHS:
                if path in ("auto", "library", "hopper") or m > cuda.MOST_TOKENS.get(path, m) or (path.startswith("hopper") and not cuda.is_hopper(0)):
                    continue
                if path == "fused" and m * (weights[0].padded + 16) > cuda.FUSED_BYTES:
                    continue
                us[path] = graph_us(rotated(weights if m <= 16 else weights[:8], lambda w, p=path, x=x: cuda.forward(x, w, FACTORS, path=p)), 7)
            best = min(us, key=us.__getitem__)
            made += [record("threshold", value, n, k, m, path=path, best=path == best) for path, value in us.items()]
            clock.say(f"{n:6} x {k:5}  M={m:<4} best {best:9} " + "  ".join(f"{p} {t:.1f}" for p, t in us.items()))
    return made


def probe_section(clock: Clock) -> list[dict[str, Any]]:
    """A few plain calls of each kernel, for a profiler that is run around this script."""
    for (n, k), m in (((4096, 4096), 1), ((11008, 4096), 1), ((8192, 28672), 1), ((8192, 8192), 16), ((4096, 4096), 128), ((11008, 4096), 2048)):
        weight, x = random_weight(n, k, "codebook", 32), torch.randn(m, k, dtype=torch.float16, device="cuda")
        for _ in range(3):
            cuda.forward(x, weight, FACTORS)
        torch.cuda.synchronize()
        clock.say(f"probe {n} x {k}, M={m}")
    return []

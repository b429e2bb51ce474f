"""The Triton path as `ours_triton`, with the CUDA path (`ours_cuda`) and the reference on the GPU beside it: `bench_gpu.py --only triton`.

Same method as there: quantizer included at M <= 16 and left out above, weights rotated past the L2, CUDA graphs. The weights are those of
the CUDA path, stored and derived anew, and both paths' outputs must agree bit by bit before anything is timed. What dispatch should take
first for how many tokens (`thresholds.json`) is read off these records; the last line says where Triton or the reference was the fastest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_timing import FACTORS, SHAPES, Clock, dense_of, graph_us, record, rotated, weights_of
from lbllm_kernels import cuda, reference, triton_matmul
from lbllm_kernels.format import PackedWeight

MODES = (("explicit", 128), ("codebook", 32))
FEW = 16  # tokens up to which the quantizer counts


def measure(clock: Clock, tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Records of each shape, level mode and number of tokens, cuBLAS fp16 beside them."""
    slower: list[str] = []
    for n, k in SHAPES[:3]:
        dense, base = dense_of(n, k)[:4], {}
        for m in tokens:
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            base[m] = graph_us(rotated(dense, partial(torch.nn.functional.linear, x), 8), 9)
            yield record("cublas_fp16", base[m], n, k, m)
        del dense
        for mode, group in MODES:
            ours = weights_of(n, k, mode, group)
            weights = [triton_matmul.TritonWeight(cuda.stored(weight)) for weight in ours]
            for m in tokens:
                if clock.over():
                    clock.say("time is over: the rest of the Triton path is not measured")
                    return
                x = torch.randn(m, k, dtype=torch.float16, device="cuda")
                quantized = triton_matmul.quantize(x, FACTORS)
                if not torch.equal(triton_matmul.linear(quantized, weights[0], torch.float16), cuda.forward(x, ours[0], FACTORS)):
                    raise SystemExit(f"the Triton path differs from the CUDA path: {n} x {k}, {mode} G={group}, M={m}")
                if m <= FEW:
                    us = graph_us(rotated(weights, lambda w, x=x: triton_matmul.linear(triton_matmul.quantize(x, FACTORS), w, torch.float16)), 9)
                    native = graph_us(rotated(ours, lambda w, x=x: cuda.forward(x, w, FACTORS)), 9)
                else:
                    us = graph_us(rotated(weights, lambda w, t=quantized: triton_matmul.linear(t, w, torch.float16), 8), 9)
                    tokens_of = cuda.quantize(x, FACTORS, path=cuda.planned(m, ours[0])[0])
                    native = graph_us(rotated(ours, lambda w, t=tokens_of: cuda.linear(t, w, torch.float16), 8), 9)
                found = {"ours_triton": us, "ours_cuda": native}
                if mode == "codebook":
                    found["reference_gpu"] = reference_us(cuda.stored(ours[0]), x)
                for name, value in found.items():
                    yield record(name, value, n, k, m, group_size=group, level_mode=mode, speedup=base[m] / value)
                if min(found, key=found.__getitem__) != "ours_cuda":
                    slower.append(f"{n} x {k} {mode} M={m}")
                each = "  ".join(f"{name} {value:8.2f} us {base[m] / value:5.2f}x" for name, value in found.items())
                clock.say(f"{n:6} x {k:5}  M={m:<4} {mode:8} G={group:<4} {each}")
            del ours, weights
            torch.cuda.empty_cache()
    clock.say(f"the CUDA path is the fastest{' but for ' + ', '.join(slower) if slower else ' everywhere'}")


def reference_us(packed: PackedWeight, x: torch.Tensor) -> float:
    """The reference on the GPU, quantizer included, call by call: its many small operations are no graph, and one weight leaves the L2 by itself."""
    weight, times = reference.ReferenceWeight(packed, None), []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        reference.product(reference.quantize(x, FACTORS), weight, torch.float16)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3

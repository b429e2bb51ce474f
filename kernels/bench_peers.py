"""Other 2-bit GPU libraries, as installed packages, for `bench_gpu.py --only peers`: skipped with a word where they are not importable.

GemLite: `A16W2_HQQ_INT`, G = 128, its own autotuner. Humming: uint2 weights with fp16 activations, G = 128, its own heuristics. Both get the
weights rotated past the L2 and CUDA graphs, as ours do (`ours_beside`: stored levels of G = 128, quantizer included). Only their speed is
measured here; their numerics are their own.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import SHAPES, Clock, dense_of, graph_us, ours_us, record, rotated, weights_of

GROUP = 128
ROTATED = 200 << 20


def copies(n: int, k: int) -> int:
    """Enough layers of 2.25 bits a weight to leave the L2."""
    return max(2, -(-ROTATED // (n * k * 9 // 32)))


def gemlite_layers(n: int, k: int) -> list[Any]:
    """GemLite linears with random codes, scales and zero points."""
    helper = importlib.import_module("gemlite.helper")
    made = []
    for _ in range(copies(n, k)):
        codes = torch.randint(0, 4, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(n * k // GROUP, 1, dtype=torch.float16, device="cuda") * 0.01 + 0.001
        zeros = torch.full_like(scales, 1.5)
        made.append(helper.A16W2_HQQ_INT(device="cuda:0", dtype=torch.float16).from_weights(codes, scales, zeros))
    return made


def humming_layers(n: int, k: int) -> list[Any]:
    """Humming linears quantized by the package from random weights."""
    layer_type = importlib.import_module("humming.layer").HummingLayer
    weight = torch.randn(n, k, dtype=torch.float16, device="cuda") * 0.02
    made = []
    for _ in range(copies(n, k)):
        layer = layer_type(shape_n=n, shape_k=k, weight_config={"dtype": "uint2", "group_size": GROUP}, torch_dtype=torch.float16).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        made.append(layer)
    return made


PEERS: dict[str, Callable[[int, int], list[Any]]] = {"gemlite_a16w2": gemlite_layers, "humming_w2": humming_layers}


def measure(clock: Clock, tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Records of each peer, cuBLAS fp16 beside them: all shapes at the first number of tokens, large ones first, then at the next (their tuning takes long)."""
    layers: dict[tuple[str, int, int], list[Any]] = {}
    for m, (n, k) in itertools.product(tokens, SHAPES[::-1]):
        if clock.over():
            clock.say("time is over: the rest of the peers is not measured")
            return
        x = torch.randn(m, k, dtype=torch.float16, device="cuda")
        base = graph_us(rotated(dense_of(n, k)[:4], lambda w, x=x: torch.nn.functional.linear(x, w)), 9)
        yield record("cublas_fp16", base, n, k, m)
        us = ours_us(weights_of(n, k, "explicit", GROUP), x)
        yield record("ours_beside", us, n, k, m, group_size=GROUP, level_mode="explicit", speedup=base / us)
        clock.say(f"{n:6} x {k:5}  M={m:<4} ours {us:8.2f} us  {base / us:5.2f}x")
        for name, layers_of in PEERS.items():
            try:
                made = layers.get((name, n, k)) or layers.setdefault((name, n, k), layers_of(n, k))
                made[0](x)
                us = graph_us(rotated(made, lambda layer, x=x: layer(x)), 9)
            except Exception as error:  # a foreign package may fail in any way; the run goes on and says so
                clock.say(f"{name} {n} x {k} M={m}: {type(error).__name__}: {str(error)[:160]}")
                continue
            yield record(name, us, n, k, m, group_size=GROUP, speedup=base / us)
            clock.say(f"{n:6} x {k:5}  M={m:<4} {name} {us:8.2f} us  {base / us:5.2f}x")

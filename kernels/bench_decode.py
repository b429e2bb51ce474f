"""Whole models of LLaMA-2's shapes with random weights, packed and bf16: decode, prefill, memory, load time. `bench_gpu.py --only model`.

Both engines run the same forward pass, written here: RMSNorm, merged q/k/v, RoPE, attention over a static cache, merged gate/up, SwiGLU; only
the linears differ. The small functions are compiled by torch (eager where that fails; the record says which). A decode step is one CUDA
graph: token embedding to logits, at a full cache of `CONTEXT` positions. The embedding and lm_head are bf16 in both. `load_s` is the time
from stored tensors on the GPU to layouts ready to run. Weights are random: numbers about speed and memory only. The packed engine is told
which weight follows which, and asks it into the L2 (`CudaWeight.followed_by`). Engine "none" leaves the products out: its
`decode_other_ms` is what both engines spend on everything else.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lbllm_kernels import cuda
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import PackedWeight
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

CONTEXT = 512
PREFILL = 2048
VOCABULARY = 32_000
FACTORS = ActFactors("piecewise")
GROUP = 32


@dataclass(frozen=True)
class Shape:
    """A LLaMA-2 shape."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's four products."""
        width = (self.heads + 2 * self.kv_heads) * self.head
        return {"qkv": (width, self.hidden), "o": (self.hidden, self.hidden), "gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner)}


SHAPES = (
    (Shape("llama2_7b", 4096, 11008, 32, 32, 32), ("packed", "bf16", "none")),
    (Shape("llama2_13b", 5120, 13824, 40, 40, 40), ("packed", "bf16")),
    (Shape("llama2_70b", 8192, 28672, 80, 64, 8), ("packed",)),
)
Layer = dict[str, Any]


def stored_weight(n: int, k: int) -> PackedWeight:
    """A packed weight in the stored format, on the GPU: codebook mode, G = 32."""
    codes = torch.randint(0, 256, (n, k // 4), dtype=torch.uint8, device="cuda")
    group_codes = torch.randint(0, 256, (n, k // GROUP), dtype=torch.uint8, device="cuda")
    codebook = torch.randint(-127, 128, (256, 4), dtype=torch.int8, device="cuda").view(torch.int32).squeeze(-1)
    scale = torch.full((n,), 1 / (73 * k**0.5), device="cuda")
    return PackedWeight(codes, scale, k, GROUP, group_codes=group_codes, codebook=codebook)


def norm_first(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, (x.shape[-1],), weight, 1e-5)


def add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, rms_norm(x, (x.shape[-1],), weight, 1e-5)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def rope_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Rotated queries (1, heads, tokens, head); rotated keys and values go into the cache (1, kv_heads, context, head) at `position`."""
    tokens, head = qkv.shape[0], keys.shape[-1]
    q, k, v = qkv.view(tokens, -1, head).split((heads, kv_heads, kv_heads), 1)
    keys.index_copy_(2, position, rotate(k.transpose(0, 1)[None], cos, sin).to(keys.dtype))
    values.index_copy_(2, position, v.transpose(0, 1)[None])
    return rotate(q.transpose(0, 1)[None], cos, sin).to(qkv.dtype)


class Small:
    """The small functions, compiled where that works."""

    def __init__(self, compiled: bool) -> None:
        wrap: Callable[[Any], Any] = partial(torch.compile, dynamic=False) if compiled else lambda f: f
        self.norm_first, self.add_norm, self.swiglu, self.rope_cache = (wrap(f) for f in (norm_first, add_norm, swiglu, rope_cache))
        self.name = "inductor" if compiled else "eager"


def rope_table(positions: Tensor, head: int) -> tuple[Tensor, Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, head, 2, device="cuda", dtype=torch.float32) / head)
    angle = positions.to(torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


class Model:
    """Random weights of a shape in one engine, and its forward pass."""

    def __init__(self, shape: Shape, engine: str, small: Small):
        self.shape, self.engine, self.small = shape, engine, small
        self.embedding, self.head = (torch.randn(VOCABULARY, shape.hidden, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(2))
        self.load_s, self.weights_gb = 0.0, 0.0
        self.layers = [self._layer() for _ in range(shape.layers)]
        if engine == "packed":
            products = [layer[name] for layer in self.layers for name in shape.linears()]
            for weight, following in itertools.pairwise(products):
                weight.followed_by(following)
        self.last_norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device="cuda")

    def _layer(self) -> Layer:
        made: Layer = {name: torch.ones(self.shape.hidden, dtype=torch.bfloat16, device="cuda") for name in ("norm1", "norm2")}
        for name, (n, k) in self.shape.linears().items():
            if self.engine == "bf16":
                made[name] = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").mul_(k**-0.5)
                self.weights_gb += made[name].numel() * 2 / 1e9
                continue
            if self.engine == "none":
                made[name] = n
                continue
            stored = stored_weight(n, k)
            torch.cuda.synchronize()
            start = time.perf_counter()
            made[name] = cuda.CudaWeight(stored)
            torch.cuda.synchronize()
            self.load_s += time.perf_counter() - start
            self.weights_gb += made[name].bytes() / 1e9
        return made

    def caches(self, context: int) -> list[tuple[Tensor, Tensor]]:
        size = (1, self.shape.kv_heads, context, self.shape.head)
        return [tuple(torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)) for _ in range(self.shape.layers)]  # type: ignore[misc]

    def product(self, x: Tensor, weight: Any) -> Tensor:
        if self.engine == "none":
            return x.new_empty((x.shape[0], weight))
        return linear(x, weight) if self.engine == "bf16" else cuda.forward(x, weight, FACTORS)

    def forward(self, tokens: Tensor, position: Tensor, caches: list[tuple[Tensor, Tensor]], table: tuple[Tensor, Tensor], causal: bool) -> Tensor:
        """Token ids (tokens,) at `position` (tokens,) -> logits of the last one, (1, vocabulary)."""
        shape, small = self.shape, self.small
        x = self.embedding[tokens]
        normed = small.norm_first(x, self.layers[0]["norm1"])
        for index, (layer, (keys, values)) in enumerate(zip(self.layers, caches, strict=True)):
            q = small.rope_cache(self.product(normed, layer["qkv"]), *table, keys, values, position, shape.heads, shape.kv_heads)
            mixed = scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=shape.kv_heads != shape.heads)
            mixed = mixed[0].transpose(0, 1).reshape(tokens.shape[0], shape.hidden)
            x, normed = small.add_norm(x, self.product(mixed, layer["o"]), layer["norm2"])
            down = self.product(small.swiglu(self.product(normed, layer["gate_up"])), layer["down"])
            following = self.layers[index + 1]["norm1"] if index + 1 < shape.layers else self.last_norm
            x, normed = small.add_norm(x, down, following)
        return linear(normed[-1:], self.head)


def graph_of(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def median_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def measure_engine(shape: Shape, engine: str, small: Small, prefill: bool) -> dict[str, float]:
    """The numbers of one engine on one shape, by name."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = Model(shape, engine, small)
    found = {"load_s": model.load_s, "weights_gb": model.weights_gb}
    token, position = torch.tensor([5], device="cuda"), torch.tensor([CONTEXT - 1], device="cuda")
    caches, table = model.caches(CONTEXT), rope_table(position, shape.head)
    logits = model.forward(token, position, caches, table, False)
    if engine != "none" and not bool(torch.isfinite(logits).all()):
        raise SystemExit(f"{shape.name} {engine}: logits are not finite")
    step = graph_of(lambda: model.forward(token, position, caches, table, False))
    if engine == "none":
        return {"decode_other_ms": median_ms(step, 40)}
    found["decode_tok_s"] = 1e3 / median_ms(step, 40)
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    del step
    caches.clear()
    if prefill:
        tokens, positions = torch.randint(0, VOCABULARY, (PREFILL,), device="cuda"), torch.arange(PREFILL, device="cuda")
        long, long_table = model.caches(PREFILL), rope_table(positions, shape.head)
        whole = graph_of(lambda: model.forward(tokens, positions, long, long_table, True))
        found["prefill_tok_s"] = PREFILL * 1e3 / median_ms(whole, 9)
        found["prefill_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


UNITS = {"decode_tok_s": "tok/s", "prefill_tok_s": "tok/s", "peak_gb": "GB", "prefill_peak_gb": "GB", "weights_gb": "GB", "load_s": "s", "decode_other_ms": "ms"}


def measure(clock: Any) -> Iterator[dict[str, Any]]:
    """Records of every shape and engine that time allows."""
    small = Small(compiled=True)
    try:
        small.norm_first(torch.randn(1, 64, dtype=torch.bfloat16, device="cuda"), torch.ones(64, dtype=torch.bfloat16, device="cuda"))
    except Exception as error:  # whatever the compiler's back end raises on this machine
        clock.say(f"torch.compile does not work here ({type(error).__name__}): eager small functions")
        small = Small(compiled=False)
    for shape, engines in SHAPES:
        for engine in engines:
            if clock.over():
                clock.say("time is over: the rest of the models is not measured")
                return
            found = measure_engine(shape, engine, small, prefill=shape.layers < 80)
            context = {"engine": engine, "shape": shape.name, "batch": 1, "context": CONTEXT, "small_functions": small.name}
            for name, value in found.items():
                yield {"name": name, "value": value, "unit": UNITS[name], **context}
            clock.say(f"{shape.name} {engine}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))

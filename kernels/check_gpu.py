"""The CUDA path against the reference on a GPU, bit by bit; `bench_gpu.py` runs it before any measurement.

Integers must be equal, and so must the outputs: both sides make the same float operations in the same order. The reference quantizes on
the CPU, its sums are exact fp32 products on the GPU. Outputs are poisoned first: `accumulate` fills its result with -2^31, and memory
that `forward` will receive from the allocator is filled with NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lbllm_kernels import cuda, ops, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.cuda_layout import pad_tokens
from lbllm_kernels.dispatch import Choice, Prepared, Route
from lbllm_kernels.format import PackedWeight, int8_weight, row_sums
from lbllm_kernels.paths import CUDA
from lbllm_kernels.synthetic import random_packed

SHAPES = ((1, 4), (21, 50), (17, 130), (48, 256), (300, 1000), (576, 576), (192, 1536), (130, 4100), (1000, 2048), (4096, 4096), (1024, 11008))
SMALL_SHAPES = ((21, 50), (130, 260), (300, 1000))
MODES = (("explicit", 16), ("explicit", 32), ("explicit", 64), ("explicit", 128), ("codebook", 16), ("codebook", 32), ("codebook", 128))
TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 129, 255, 256, 300)
PATHS = ("decode", "early", "narrow", "middle", "wide", "hopper128", "hopper256", "hopper_split", "library")
PIECEWISE = ActFactors("piecewise", 0.9, 0.95, 0.3, 0.2)


class Tally:
    """Counts checks and keeps what failed."""

    def __init__(self) -> None:
        self.checks = 0
        self.failures: list[str] = []

    def equal(self, got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Bit-equal, where NaN equals NaN."""
        self.checks += 1
        if got.shape == expected.shape and got.dtype == expected.dtype and torch.equal(got, expected):
            return
        if got.shape != expected.shape or got.dtype != expected.dtype:
            self.failures.append(f"{what}: got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}")
            return
        wrong = ~((got == expected) | (got.isnan() & expected.isnan()) if got.is_floating_point() else got == expected)
        if not bool(wrong.any()):
            return
        at = tuple(int(i) for i in wrong.nonzero()[0])
        self.failures.append(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {got[at].item()} instead of {expected[at].item()}")


def on_gpu(packed: PackedWeight) -> PackedWeight:
    """The same weight on the GPU."""
    names = ("codes", "row_scale", "levels", "group_codes", "codebook", "bias")
    return replace(packed, **{name: getattr(packed, name).cuda() for name in names if getattr(packed, name) is not None})


def poison(*shapes_and_types: tuple[tuple[int, ...], torch.dtype]) -> None:
    """Fill memory that the next allocations of these sizes will get."""
    held = [torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype, device="cuda") for shape, dtype in shapes_and_types]
    del held


def plans(tokens: int) -> list[cuda.Plan]:
    """Every way to cut a decode launch that is compiled."""
    return [cuda.Plan(rows, *cut) for rows in ((1, 2, 3, 4) if tokens <= 8 else (1, 2, 3)) for cut in ((1, 0, 64), (3, 3, 2), (8, 1, 0), (16, 3, 64))]


def skipped(path: str, tokens: int, weight: cuda.CudaWeight) -> bool:
    """Whether a path takes no such product, or the library that it calls no so narrow one."""
    return cuda.refusal(path, tokens, weight) is not None or (path == "library" and weight.in_features < 16)


def check_sums(tally: Tally, packed: PackedWeight, tokens: tuple[int, ...], seed: int, every_plan: bool) -> None:
    out, n = packed.out_features, packed.in_features
    name = f"{out}x{n} G={packed.group_size} {'explicit' if packed.levels is not None else 'codebook'}"
    weight = cuda.CudaWeight(packed)
    dense = int8_weight(packed)
    tally.equal(weight.row_sums[:out], row_sums(packed), f"row sums {name}")
    for field, tensor in vars(cuda.stored(weight)).items():
        if isinstance(tensor, torch.Tensor):
            tally.equal(tensor, getattr(packed, field), f"stored {field} {name}")
    tally.equal(cuda.expanded(weight)[:out, :n], dense, f"expanded {name}")
    q = torch.randint(0, 128, (max(tokens), n), generator=torch.Generator().manual_seed(seed), dtype=torch.int8).cuda()
    expected = reference.int_matmul(q, dense)
    for m, path in itertools.product(tokens, PATHS):
        if skipped(path, m, weight):
            continue
        tally.equal(cuda.accumulate(q[:m], weight, path=path), expected[:m], f"sums {name} M={m} {path}")
        if path == "decode" and every_plan:
            for plan in plans(m):
                tally.equal(cuda.accumulate(q[:m], weight, path=path, plan=plan), expected[:m], f"sums {name} M={m} {plan}")


def special_tokens(n: int, seed: int) -> torch.Tensor:
    """Sixteen tokens, several of them awkward: zeros, one sign, NaN, infinities, denormals, huge, constant, an outlier."""
    x = torch.randn(16, n, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2] = x[2].abs()
    x[3, n // 2] = float("nan")
    x[4, 0] = float("inf")
    x[5, -1] = float("-inf")
    x[6] *= 1e-41
    x[7] *= 3e38
    x[8] = -2.5
    x[9, n // 3] = 1e6
    x[10] *= 1e-30
    x[11] = torch.arange(n) % 31 - 15.0
    return x


TYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD_FACTORS = (ActFactors("piecewise", 1e-20, 1e-20), ActFactors("piecewise", 1.0, 1.0, 0.0, 1.0), ActFactors("uniform", 1e30, 2.0))
ALL_FACTORS = (PIECEWISE, ActFactors("uniform", 0.85, 1.1), ActFactors("piecewise"), *ODD_FACTORS)


def check_quantizer(tally: Tally, n: int, seed: int, variants: tuple[ActFactors, ...] = ALL_FACTORS, types: tuple[torch.dtype, ...] = TYPES) -> None:
    for dtype, factors in itertools.product(types, variants):
        x = torch.cat([special_tokens(n, seed), torch.randn(30, n, generator=torch.Generator().manual_seed(seed + 1))]).to(dtype)
        q, scale, zero = quantize_activations(x, factors)
        tokens = cuda.quantize(x.cuda(), factors)
        few, small = (cuda.quantize(x[:16].cuda(), factors, path=path) for path in ("decode", "sliced"))  # several blocks a token
        what = f"quantizer in={n} {dtype} {factors}"
        tally.equal(tokens.q, pad_tokens(q).cuda(), f"codes, {what}")
        tally.equal(few.q, tokens.q[:16], f"codes of few tokens, {what}")
        tally.equal(few.scale, tokens.scale[:16], f"scale of few tokens, {what}")
        tally.equal(small.q, tokens.q[:16], f"codes of few tokens, small blocks, {what}")
        tally.equal(small.scale, tokens.scale[:16], f"scale of few tokens, small blocks, {what}")
        tally.equal(small.zero, tokens.zero[:16], f"zero of few tokens, small blocks, {what}")
        tally.equal(cuda.codes_in_order(cuda.quantize(x.cuda(), factors, path="hopper")), q.cuda(), f"codes in wgmma order, {what}")
        tally.equal(tokens.scale, scale[:, 0].cuda(), f"scale, {what}")
        tally.equal(tokens.zero, zero[:, 0].cuda(), f"zero, {what}")


def expected_output(packed: PackedWeight, x: torch.Tensor, factors: ActFactors, dtype: torch.dtype) -> torch.Tensor:
    """`reference.linear` with the tokens quantized on the CPU."""
    q, scale, zero = (t.cuda() for t in quantize_activations(x.cpu(), factors))
    dense = int8_weight(packed)
    y = reference.finish(reference.int_matmul(q, dense), scale, zero, dense.sum(1, dtype=torch.int32), packed.row_scale, packed.bias)
    return y.to(dtype)


def check_outputs(tally: Tally, packed: PackedWeight, seed: int, tokens: tuple[int, ...], types: tuple[torch.dtype, ...] = TYPES) -> None:
    out, n = packed.out_features, packed.in_features
    weight = cuda.CudaWeight(packed)
    rows = torch.cat([special_tokens(n, seed), torch.randn(max(tokens), n, generator=torch.Generator().manual_seed(seed))])
    for dtype, factors in itertools.product(types, (PIECEWISE, ActFactors("uniform"))):
        x = rows.to(dtype).cuda()
        whole = expected_output(packed, x, factors, dtype)
        for m, path in itertools.product(tokens, ("fused", "sliced", *PATHS)):
            if skipped(path, m, weight):
                continue
            for first in (0, 8) if path in ("fused", "decode", "sliced", "early") else (0,):
                poison(((m, out), dtype))
                plan = cuda.Plan(flags=(seed + m) % 4)
                got = cuda.forward(x[first : first + m], weight, factors, path=path, plan=plan)
                tally.equal(got, whole[first : first + m], f"output {out}x{n} G={packed.group_size} M={m} from {first} {path} {dtype} {factors.variant}")


def check_graphs(tally: Tally, size: int) -> None:
    """A chain of layers whose launches overlap, in a graph, replayed on new inputs: equal to layer after layer with waits between."""
    weights = [cuda.CudaWeight(on_gpu(random_packed(size, size, 32, "codebook", seed))) for seed in range(4)]
    for weight, following in itertools.pairwise(weights):
        weight.followed_by(following)
    for m, path, flags in ((1, "fused", 0), (1, "fused", 2), (4, "fused", 3), (1, "decode", 1), (8, "decode", 3), (16, "decode", 3), (8, "sliced", 3), (8, "early", 3), (16, "early", 3), (40, "narrow", 3), (200, "wide", 3), (300, "", 3)):
        plan = cuda.Plan(flags=flags)
        x = torch.randn(m, size, dtype=torch.float16, device="cuda")

        def chain(wait: bool, x: torch.Tensor = x, path: str = path, plan: cuda.Plan = plan) -> list[torch.Tensor]:
            made = [x]
            for weight in weights * 3:
                made.append(cuda.forward(made[-1], weight, PIECEWISE, path=path, plan=plan if not wait else cuda.Plan(flags=0)) * 0.08)
                if wait:
                    torch.cuda.synchronize()
            return made

        chain(False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(False)
        for trial in range(8):
            x.copy_(torch.randn(m, size, dtype=torch.float16, device="cuda"))
            for tensor in captured[1:]:
                tensor.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            got = [tensor.clone() for tensor in captured]
            for layer, (ours, expected) in enumerate(zip(got, chain(True), strict=True)):
                tally.equal(ours, expected, f"graph M={m} {path} flags={flags} trial {trial} layer {layer}")


def check_repeats(tally: Tally) -> None:
    """The same product many times: a moving result is a race."""
    packed = on_gpu(random_packed(1024, 4096, 32, "codebook", 5))
    weight = cuda.CudaWeight(packed)
    q = torch.randint(0, 128, (200, 4096), dtype=torch.int8, device="cuda")
    expected = reference.int_matmul(q, int8_weight(packed))
    for m, path in ((1, "decode"), (16, "decode"), (8, "early"), (16, "early"), (32, "narrow"), (200, "middle"), (200, "wide"), (200, "hopper128"), (200, "hopper256"), (200, "hopper_split")):
        if path.startswith("hopper") and not cuda.is_hopper(0):
            continue
        for turn in range(20):
            tally.equal(cuda.accumulate(q[:m], weight, path=path), expected[:m], f"repeat {turn} M={m} {path}")


def check_operator(tally: Tally) -> None:
    """The torch operator, alone and inside a compiled function."""
    packed = on_gpu(random_packed(300, 1000, 32, "codebook", 7))
    weight = cuda.CudaWeight(packed)
    prepared = Prepared(1000, 300, packed.codes.device, Choice("cuda", ""), (Route(None, CUDA, weight),), None, packed, False)
    x = torch.randn(2, 5, 1000, dtype=torch.float16, device="cuda")
    plain = cuda.forward(x.view(10, 1000), weight, PIECEWISE).view(2, 5, 300)
    tally.equal(ops.linear(x, prepared, 32, PIECEWISE), plain, "operator")
    compiled = torch.compile(lambda v: ops.linear(v, prepared, 32, PIECEWISE) + 1, backend="aot_eager", fullgraph=True)
    tally.equal(compiled(x), plain + 1, "compiled operator")


def check_each_kernel(say: Callable[[str], Any]) -> tuple[int, list[str]]:
    """Every kernel once or twice on small inputs: what a sanitizer, a hundred times slower, can get through in seconds."""
    tally = Tally()
    check_quantizer(tally, 4104, 1, (ActFactors("uniform", 0.85, 1.1), PIECEWISE), (torch.float16,))
    for index, (mode, group) in enumerate((("explicit", 128), ("codebook", 16), ("codebook", 32))):
        packed = on_gpu(random_packed(130, 1000, group, mode, index))
        check_sums(tally, packed, (1, 9, 33), index, every_plan=False)
        if index:
            check_outputs(tally, packed, index, (2, 16, 40), (torch.float16,))
    torch.cuda.synchronize()
    say(f"each kernel: {tally.checks} checks, {len(tally.failures)} failed")
    return tally.checks, tally.failures


def check(say: Callable[[str], Any], small: bool = False) -> tuple[int, list[str]]:
    """All checks; how many, and the failures in words."""
    tally = Tally()
    seed = torch.seed() % 10_000  # fresh inputs each run; printed, so a failure can be repeated
    say(f"seed {seed}")
    shapes, tokens = (SMALL_SHAPES, (1, 2, 9, 16, 33, 130)) if small else (SHAPES, TOKENS)
    for n in (4, 50, 64, 1000, 4096, 11008) if not small else (50, 520):
        check_quantizer(tally, n, seed + n)
    say(f"quantizer: {tally.checks} checks, {len(tally.failures)} failed")
    for out, n in shapes:
        for mode, group in MODES if not small else (("explicit", 128), ("codebook", 16), ("codebook", 32)):
            entries = 256 if seed % 2 else 100
            packed = on_gpu(random_packed(out, n, group, mode, seed + out, entries, extreme=n == 4100))
            check_sums(tally, packed, tokens, seed + group, every_plan=out * n < 600_000)
        say(f"sums {out} x {n}: {tally.checks} checks, {len(tally.failures)} failed")
    for index, (out, n) in enumerate(shapes[:8]):
        packed = on_gpu(random_packed(out, n, (16, 32, 64, 128)[index % 4], ("explicit", "codebook")[index // 2 % 2], seed))
        if index % 2:
            packed = replace(packed, bias=torch.randn(out, device="cuda"))
        check_outputs(tally, packed, seed + index, (1, 2, 5, 8, 16, 17, 130) if not small else (1, 3, 16, 40))
    say(f"outputs: {tally.checks} checks, {len(tally.failures)} failed")
    check_repeats(tally)
    if not small:
        check_graphs(tally, 1024)
        check_operator(tally)
    torch.cuda.synchronize()
    return tally.checks, tally.failures

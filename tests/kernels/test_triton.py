"""The Triton path without a GPU: bit-exact in Triton's interpreter, and compiled ahead of time for two generations of GPUs.

Triton decides at import whether it interprets, so the interpreted cases run in a process of their own: this file again, with
TRITON_INTERPRET=1. `kernels/check_paths.py` runs the compiled kernels on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from interpreted import INTERPRETED, inside, outside, run_interpreted
from lbllm_kernels import dispatch, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.synthetic import random_packed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if INTERPRETED:
    from lbllm_kernels import triton_matmul


@outside
def test_the_interpreted_cases_pass():
    run_interpreted(__file__)


TOKENS = {
    "normal": lambda x: x,
    "heavy": lambda x: x * torch.exp(2 * x),
    "positive": torch.abs,
    "zero": lambda x: x * 0,
    "denormal": lambda x: x * 1e-42,
    "grid": lambda x: torch.round(x * 4) / 4,
    "huge": lambda x: x * 1e37,
}


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks of the overflows that are meant
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("channels", [1, 37, 700])
def test_the_quantizer_is_bit_equal(variant, kind, channels):
    g = torch.Generator().manual_seed(channels)
    x = TOKENS[kind](torch.randn(4, channels, generator=g))
    for factors in (ActFactors(variant), ActFactors(variant, 0.83, 1e-30, 1.0, 0.0), ActFactors(variant, 1.21, 0.7, 0.31, 0.9)):
        check_tokens(x, factors)


def check_tokens(x, factors):
    q, scale, zero = quantize_activations(x, factors)
    tokens = triton_matmul.quantize(x, factors)
    same = (tokens.scale.view(torch.int32) == scale[:, 0].view(torch.int32)) | (torch.isnan(tokens.scale) & torch.isnan(scale[:, 0]))
    assert bool(same.all())
    assert torch.equal(tokens.zero, zero[:, 0])
    assert torch.equal(triton_matmul.codes_in_order(tokens), q)
    assert int(tokens.q.sum()) == int(q.sum())  # nothing in the padding


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
def test_not_finite_tokens_are_visible_and_alone(variant, bad):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    x[1, 3], x[1, 4] = bad, -bad
    check_tokens(x, ActFactors(variant))
    y = triton_matmul.linear(triton_matmul.quantize(x, ActFactors(variant)), triton_matmul.TritonWeight(random_packed(7, 50, 16)))
    assert torch.isnan(y).all(1).tolist() == [False, True, False]
    assert not torch.isnan(y[[0, 2]]).any()


@inside
@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize(("m", "n", "k", "g"), [(1, 33, 40, 16), (3, 70, 530, 32), (17, 32, 512, 128), (33, 5, 1040, 64), (65, 40, 100, 16), (130, 66, 200, 32)])
def test_sums_are_exact(mode, m, n, k, g):
    packed = random_packed(n, k, g, mode, seed=m, entries=1 + m, extreme=m == 3)
    q = torch.randint(0, 128, (m, k), generator=torch.Generator().manual_seed(m), dtype=torch.int8)
    expected = reference.accumulate(q, packed)
    for split in (0, 1, 2):
        assert torch.equal(triton_matmul.accumulate(q, triton_matmul.TritonWeight(packed), split), expected)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m", [2, 70])
@pytest.mark.parametrize("split", [1, 3])
def test_outputs_are_bit_equal(dtype, m, split):
    packed, factors = random_packed(45, 1500, 32, "codebook"), ActFactors("piecewise", 0.9, 0.95)
    x = torch.randn(m, 1500, generator=torch.Generator().manual_seed(2)).to(dtype)
    for bias in (None, torch.randn(45, generator=torch.Generator().manual_seed(1))):
        y = triton_matmul.linear(triton_matmul.quantize(x, factors), triton_matmul.TritonWeight(packed, bias), dtype, split)
        assert y.dtype == dtype
        assert torch.equal(y, reference.linear(x, packed, factors, bias))


@inside
def test_dispatch_takes_it_when_told(monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "triton")
    packed, factors = random_packed(45, 100, 32, "codebook"), ActFactors("uniform")
    prepared = dispatch.prepare(packed, "uniform")
    assert prepared.choice.path == "triton"
    x = torch.randn(2, 3, 100)
    assert torch.equal(dispatch.linear(x, prepared, factors), reference.linear(x, packed, factors))
    assert dispatch.linear(x[:, :0], prepared, factors).shape == (2, 0, 45)
    from lbllm_kernels import ops

    assert torch.equal(ops.linear(x, prepared, 32, factors), reference.linear(x, packed, factors))
    with pytest.raises(dispatch.PathError, match="group size 8 is not a multiple of 16"):
        dispatch.prepare(random_packed(4, 16, 8), "uniform")


@inside
def test_bad_arguments_are_refused():
    weight = triton_matmul.TritonWeight(random_packed(20, 64, 32))
    with pytest.raises(ValueError, match="float matrix"):
        triton_matmul.quantize(torch.zeros(2, 4, dtype=torch.int32), ActFactors("uniform"))
    with pytest.raises(ValueError, match="per_group"):
        triton_matmul.quantize(torch.zeros(2, 4), ActFactors("per_group"))
    with pytest.raises(ValueError, match="60 channels"):
        triton_matmul.linear(triton_matmul.quantize(torch.zeros(2, 60), ActFactors("uniform")), weight)
    with pytest.raises(ValueError, match=r"int8 \(M, 64\)"):
        triton_matmul.accumulate(torch.zeros((1, 60), dtype=torch.int8), weight)
    with pytest.raises(ValueError, match="multiple of 16"):
        triton_matmul.TritonWeight(random_packed(20, 64, 8))
    broken = [*weight.layout]
    for position, name in ((0, "codes"), (1, "words"), (3, "row_scale"), (4, "row_sums")):
        bad = [*broken[:position], weight.layout[position][:1].double(), *broken[position + 1 :]]
        with pytest.raises(ValueError, match=name):
            triton_matmul.TritonWeight.from_layout(64, 20, 32, *bad)


@inside
def test_codes_are_not_copied_when_rows_are_whole_words():
    packed = random_packed(20, 64, 32)
    assert triton_matmul.TritonWeight(packed).codes.data_ptr() == packed.codes.data_ptr()
    odd = torch.zeros(20 * 16 + 1, dtype=torch.uint8)[1:].view(20, 16)
    assert torch.equal(triton_matmul.word_codes(odd.copy_(packed.codes), 64), triton_matmul.TritonWeight(packed).codes)


@pytest.mark.parametrize(("tiles", "spans", "sms"), [(1, 1, 132), (128, 8, 132), (4, 22, 132), (400, 8, 132), (3, 7, 10)])
@inside
def test_splits_cover_all_spans(tiles, spans, sms):
    count = triton_matmul.splits(tiles, spans, sms)
    per_split = -(-spans // count)
    assert 1 <= count <= spans
    assert per_split * (count - 1) < spans <= per_split * count


AHEAD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lbllm_kernels import triton_matmul as t
types = {"x": "*bf16", "q": "*i8", "dense": "*i8", "group_codes": "*u8", "y": "*bf16", "scale": "*fp32", "row_scale": "*fp32", "bias": "*fp32"}
types |= dict.fromkeys(("zero", "codes", "words", "sums", "partial"), "*i32")
types |= dict.fromkeys(("clip_max", "clip_min", "knee_low", "knee_high", "smallest"), "fp32")
product = dict(GROUP=2, LUT_IMPL="prmt", FINISH=True, BIAS=True)
cases = [
    (t.quantize_kernel, dict(TOP=127, BLOCK=2048), 8), (t.quantize_kernel, dict(TOP=15, BLOCK=512), 8),
    (t.product_kernel, dict(BM=16, BN=32, CODED=True, **product), 4), (t.product_kernel, dict(BM=64, BN=64, CODED=False, **product), 4),
    (t.reduce_kernel, dict(BM=1, BN=256, FINISH=True, BIAS=False), 4), (t.expand_kernel, dict(BN=32, GROUP=8, LUT_IMPL="prmt", CODED=False), 4),
    (t.dense_kernel, dict(BM=128, BN=128, BK=128, FINISH=True, BIAS=False), 8),
]
for kernel, constants, warps in cases:
    kinds = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if kinds[a].startswith("*") or a == "padded"}
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": False}
    made = triton.compile(ASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    ptx = made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
    assert "fma.rn.f32" not in ptx and "div.full" not in ptx and "div.approx" not in ptx, kernel.__name__
    assert ".local" not in ptx, kernel.__name__
    if constants.get("LUT_IMPL"):
        assert "prmt.b32" in ptx
    if kernel in (t.product_kernel, t.dense_kernel):
        assert "mma.sync" in ptx or "wgmma.mma_async" in ptx
        assert ".s32.s8.s8" in ptx
    if kernel is t.quantize_kernel:
        assert "div.rn.f32" in ptx
    assert made.metadata.shared <= (99 if int(sys.argv[1]) < 90 else 227) * 1024
print("compiled", len(cases))
"""


@outside
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_ahead_of_time(capability, tmp_path):
    """Without a GPU: int8 tensor cores, byte permutes, IEEE divisions, nothing fused, nothing spilled to local memory."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD, str(capability)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "compiled 7"


@outside
def test_without_a_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    asked = "from lbllm_kernels.paths import PATHS; import sys; print(PATHS['triton'].state(), 'lbllm_kernels.triton_matmul' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)  # what others imported here does not count
    assert done.stdout.strip() == "(False, 'no GPU that torch can use') False"

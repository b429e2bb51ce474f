"""The GPU quantizer's float operations (`quantize_math.h`), compiled as plain C++, against `activation.py`: every code equal."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import build
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.build_cuda import source_folder

SHIM = """
#include <cstring>
#include "quantize_math.h"
using namespace lut8;
extern "C" void quantize(const float* x, int n, int top, const float* f, signed char* q, float* scale, int* zero) {
  const Factors factors{top, f[0], f[1], f[2], f[3]};
  float high = 0, low = 0;
  for (int i = 0; i < n; ++i) {
    if (x[i] != x[i]) high = INFINITY;
    high = fmaxf(high, x[i]), low = fmaxf(low, -x[i]);
  }
  const ScaleZero t = scale_zero(high, low, factors);
  unsigned char table[256];
  for (int u = 0; u < 256; ++u) {
    unsigned entry = 0;
    for (int k = 0; k < 15; ++k) entry = take_step(entry, piecewise_step(piecewise_value(k, t.zero, factors), piecewise_value(k + 1, t.zero, factors)), u);
    table[u] = static_cast<unsigned char>(entry);
  }
  for (int i = 0; i < n; ++i) {
    const float steps = t.quick ? divided(x[i], t) : x[i] / t.scale;
    q[i] = !t.finite ? 0 : static_cast<signed char>(top == 15 ? code_of<15>(steps, t, table) : code_of<127>(steps, t, table));
  }
  *scale = t.scale, *zero = static_cast<int>(t.zero);
}
"""


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory):
    folder, tool = source_folder(), build.compiler()
    if folder is None or tool is None:
        pytest.skip("no C++ compiler")
    at = tmp_path_factory.mktemp("quantizer")
    (at / "shim.cpp").write_text(SHIM)
    command = [tool, "-O2", "-shared", "-fPIC", "-std=c++17", "-ffp-contract=off", f"-I{folder}", str(at / "shim.cpp"), "-o", str(at / "shim.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(at / "shim.so")).quantize


def run(quantizer, x: torch.Tensor, factors: ActFactors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = x.numel()
    q, scale, zero = torch.empty(n, dtype=torch.int8), torch.empty(1), torch.empty(1, dtype=torch.int32)
    numbers = (ctypes.c_float * 4)(factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, q, scale, zero)]
    quantizer(pointers[0], n, 15 if factors.variant == "uniform" else 127, numbers, *pointers[1:])
    return q, scale, zero


@given(
    st.integers(1, 300), st.integers(0, 10_000), st.sampled_from(["uniform", "piecewise"]), st.floats(0.3, 2.0), st.floats(0.3, 2.0),
    st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-41, 1e-30, 1e30, 3e38]), st.sampled_from(["", "nan", "inf", "-inf", "half"]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_codes_scale_and_zero_are_equal(quantizer, n, seed, variant, clip_max, clip_min, low, high, size, odd):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * size
    if odd == "half":
        x = x.to(torch.float16).to(torch.float32)  # ties are likely
    elif odd:
        x[seed % n] = float(odd)
    factors = ActFactors(variant, clip_max, clip_min, low, high)
    expected = [t.view(-1) for t in quantize_activations(x, factors)]
    for ours, theirs in zip(run(quantizer, x, factors), expected, strict=True):
        assert torch.equal(torch.nan_to_num(ours.double(), nan=-1.0), torch.nan_to_num(theirs.double(), nan=-1.0))

"""Error compensation of a group in one kernel equals the plain form, bit by bit (Triton's interpreter; a process of its own)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreted import inside, outside, run_interpreted

from lbllm_core.quant import error_compensation
from lbllm_core.quant.error_compensation import inverse_factor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@outside
def test_the_interpreted_cases_pass():
    run_interpreted(__file__)


@inside
@pytest.mark.parametrize(("rows", "columns", "first", "last", "left", "right"), [(19, 96, 0, 16, 0, 96), (8, 150, 40, 48, 32, 150), (3, 70, 64, 70, 0, 70), (17, 300, 100, 240, 100, 300)])
def test_a_group_is_bit_equal(rows, columns, first, last, left, right):
    from lbllm_kernels.triton_compensate import sweep_group

    g = torch.Generator().manual_seed(columns)
    x = torch.randn(400, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    upper = inverse_factor(x.T @ x, 0.01)
    levels = torch.randn(rows, 4, generator=g).sort(dim=-1).values
    start = torch.randn(rows, columns, generator=g)
    made = []
    for sweep in (error_compensation._sweep_group, sweep_group):
        w, codes, errors = start.clone(), torch.full((rows, columns), 9, dtype=torch.uint8), torch.zeros(rows, right - left)
        sweep(w, codes, errors, upper, levels, range(first, last), left, right)
        made.append((w, codes, errors))
    for plain, fused in zip(*made, strict=True):
        assert torch.equal(plain, fused)
    assert not torch.equal(made[0][0], start)


@outside
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_ahead_of_time(capability):
    import triton
    from lbllm_kernels.triton_compensate import ROWS, _group_kernel
    from triton.backends.compiler import GPUTarget

    kinds = ["*fp32", "*u8", "*fp32", "*fp32", "*fp32", *["i32"] * 7]
    names = _group_kernel.arg_names
    source = triton.compiler.ASTSource(_group_kernel, dict(zip(names, kinds, strict=False)) | {"ROWS": "constexpr", "SPAN": "constexpr"}, constexprs={"ROWS": ROWS, "SPAN": 128})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "enable_fp_fusion": False})
    assert "fma" not in made.asm["ptx"]

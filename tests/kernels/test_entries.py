"""The best entry of a table by trying all equals a brute-force search in float64 (Triton's interpreter; a process of its own)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreted import inside, outside, run_interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@outside
def test_the_interpreted_cases_pass():
    run_interpreted(__file__)


@inside
@pytest.mark.parametrize(("n", "columns", "entries", "shared"), [(70, 16, 40, False), (33, 32, 7, True), (5, 6, 1, False), (1, 16, 256, True)])
def test_the_best_of_all_entries(n, columns, entries, shared):
    from lbllm_kernels.triton_entries import best_entries

    g = torch.Generator().manual_seed(n)
    w, h = torch.randn(n, columns, generator=g), torch.rand(columns if shared else (n, columns), generator=g)
    table = torch.randn(entries, 4, generator=g).sort(-1).values
    distance = (w[:, None, :, None].double() - table[None, :, None, :].double()).square().amin(-1)
    cost = (h.expand(n, columns)[:, None].double() * distance).sum(-1)
    chosen = best_entries(w, h, table)
    assert chosen.shape == (n,)
    assert chosen.dtype == torch.int64
    assert torch.allclose(cost.gather(1, chosen[:, None]).squeeze(1), cost.amin(1), rtol=1e-5)
    table[-1] = table[0]  # the first of equals
    assert entries == 1 or not (best_entries(w, h, table) == entries - 1).any()


@outside
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_ahead_of_time(capability):
    import triton
    from lbllm_kernels.triton_entries import _best_entries
    from triton.backends.compiler import GPUTarget

    kinds = dict(zip(_best_entries.arg_names, ["*fp32", "*fp32", "*fp32", "*i64", "i32", "i32", "i32", "i32"], strict=False))
    source = triton.compiler.ASTSource(_best_entries, kinds | {"G": "constexpr", "ROWS": "constexpr"}, constexprs={"G": 16, "ROWS": 64})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert ".local" not in made.asm["ptx"]

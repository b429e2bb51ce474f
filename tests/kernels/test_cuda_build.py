"""The CUDA path on a machine without a GPU: what the compiler made of it, honest reasons, shapes without a device."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lbllm_kernels import build, build_cuda, cuda, ops
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.build import PACKAGE, BuildError
from lbllm_kernels.synthetic import random_packed

COMPILES = build_cuda.compiler() is not None and build.compiler() is not None  # nvcc calls the host's compiler
needs_nvcc = pytest.mark.skipif(not COMPILES, reason="no nvcc, or no C++ compiler for it")
GPU_REASON = cuda.library().reason if cuda.library().functions is None else None


def disassembler() -> str | None:
    """cuobjdump: `CUOBJDUMP` if set, else on the path or beside nvcc, else the one that Triton brings."""
    nvcc, triton = build_cuda.compiler(), importlib.util.find_spec("triton")
    names = [os.environ.get("CUOBJDUMP") or "cuobjdump", *([str(Path(nvcc).with_name("cuobjdump"))] if nvcc else [])]
    names += [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")] if triton and triton.origin else []
    return next((found for name in names if (found := shutil.which(name))), None)


def disassembled(*objects: str) -> dict[str, str]:
    """Machine code of each kernel, `sm:name` -> text."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump (CUOBJDUMP names another place)")
    found: dict[str, str] = {}
    for path in objects:
        done = subprocess.run([tool, "--dump-sass", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for part in done.stdout.split("\nFatbin elf code:")[1:]:
            arch = re.search(r"arch = (\w+)", part)
            assert arch
            for piece in part.split("Function : ")[1:]:
                found[f"{arch[1]}:{piece.split()[0]}"] = piece
    return found


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    if not COMPILES:
        pytest.skip("no nvcc, or no C++ compiler for it")
    return disassembled(str(build_cuda.build()))


def assert_good(sass: dict[str, str]) -> None:
    """Products use tensor cores, byte permutations and 16-byte loads; no kernel keeps registers in local memory."""
    for name, text in sass.items():
        if any(kernel in name for kernel in ("decode_kernel", "early_kernel", "tiled_kernel")):
            assert "IMMA.16832.S8.S8" in text, name
            assert text.count("PRMT") >= 16, name
            assert re.search(r"LDG\S*\.128", text), name
        if "hopper_kernel" in name and name.startswith("sm_90a"):
            assert "IGMMA.64x" in text, name
            assert text.count("PRMT") >= 16, name
        if "early_kernel" in name and name.startswith("sm_90a"):  # weights are expanded before the wait for the kernel before
            before, after = text.split("ACQBULK")
            assert (before.count("PRMT") >= 64, "PRMT" in after) == (True, False), name
        assert not re.search(r"\b(LDL|STL)\b", text), name


@needs_nvcc
def test_machine_code_of_both_architectures(sass):
    kernels = {name.split(":")[1] for name in sass}
    assert {name.split(":")[0] for name in sass} == {"sm_80", "sm_90a"}
    for name in ("quantize_kernel", "decode_kernel", "early_kernel", "tiled_kernel", "dequantize_kernel", "finish_kernel"):
        assert any(name in kernel for kernel in kernels), name


@needs_nvcc
def test_products_use_tensor_cores_and_byte_permutations_and_no_local_memory(sass):
    assert_good(sass)


@needs_nvcc
@pytest.mark.skipif(not os.environ.get("LBLLM_LONG_TESTS"), reason="minutes; `make test-cuda` runs it")
@pytest.mark.parametrize("architecture", ["86", "89", "100a", "120a"])
def test_other_architectures_compile_as_well(tmp_path, architecture):
    folder, tool = build_cuda.source_folder(), build_cuda.compiler()
    assert folder
    assert tool
    objects = build_cuda.compile_sources(tool, folder, tmp_path, (architecture,))
    assert len(objects) == len(list(folder.glob("*.cu")))
    found = disassembled(*objects)
    assert {name.split(":")[0] for name in found} == {f"sm_{architecture}"}
    assert_good(found)


def test_no_nvcc_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cuda, "object_path", lambda digest: tmp_path / "absent.so")
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="no nvcc found"):
        build_cuda.build()
    assert build_cuda.main([]) == 1
    assert build_cuda.main(["--optional"]) == 0


@needs_nvcc
@pytest.mark.skipif(build.compiler() is None, reason="nvcc has no host compiler")
def test_a_compile_error_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "lut8_cuda.cu").write_text("this is no CUDA\n")
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(build_cuda, "source_folder", lambda: folder)
    monkeypatch.setattr(build_cuda, "object_path", lambda digest: tmp_path / "package" / f"{digest}.so")
    with pytest.raises(BuildError, match=r"lut8_cuda\.cu\(1\)"):
        build_cuda.build()
    assert list((tmp_path / "package").iterdir()) == []


def test_changed_sources_are_another_object(tmp_path):
    (tmp_path / "a.cu").write_text("1")
    first = build_cuda.source_digest(tmp_path)
    (tmp_path / "b.h").write_text("2")
    assert build_cuda.source_digest(tmp_path) != first


def test_a_weight_elsewhere_has_its_reason():
    packed = random_packed(8, 64, 32)
    assert cuda.unsupported(packed) == "the weight is on cpu"
    with pytest.raises(ValueError, match="the weight is on cpu"):
        cuda.CudaWeight(packed)


@pytest.mark.skipif(GPU_REASON is None, reason="a GPU is here")
def test_without_a_gpu_calls_say_what_is_missing():
    assert "CUDA" in cuda.library().reason
    with pytest.raises(RuntimeError, match="CUDA"):
        cuda.quantize(torch.zeros(1, 64), ActFactors("uniform"))


def test_paths_by_tokens():
    assert [cuda.choose_path(m, True) for m in (1, 16, 17, 4000)] == ["fused", "decode", "auto", "hopper"]
    assert cuda.choose_path(4000, False) == "auto"


def test_the_operator_knows_shapes_without_running():
    """The fake implementation: what torch.compile traces with, on tensors that have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 64, dtype=torch.float16)
        empty = torch.empty(1)
        y = torch.ops.lbllm.lut8_linear(x, [empty, empty, None, None, empty, empty, None], "cuda", 40, 32, "uniform", [1.0, 1.0, 0.25, 0.25])
    assert y.shape == (2, 5, 40)
    assert y.dtype == torch.float16
    assert ops.lut8_linear is not None


@pytest.mark.skipif(GPU_REASON is not None, reason=GPU_REASON or "")
def test_small_shapes_on_this_gpu(monkeypatch):
    """The checks that the benchmark makes first, on its small set."""
    monkeypatch.syspath_prepend(str(PACKAGE.parent))
    from check_gpu import check

    checks, failures = check(print, small=True)
    assert checks > 500
    assert not failures, failures[:5]

"""Building is optional, honest about why it fails, and never leaves half a file."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lbllm_kernels import build, cpu, dispatch
from lbllm_kernels.synthetic import random_packed


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source folder and a package folder of their own."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "csrc" / "lut8_cpu.cpp").write_text('extern "C" int lut8_features() { return 0; }\n')
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "package")
    return tmp_path / "csrc"


needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_building_twice_compiles_once(sources):
    first = build.build()
    stamp = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == stamp


@needs_compiler
def test_changed_sources_are_another_object(sources):
    first = build.build()
    (sources / "lut8_cpu.cpp").write_text('extern "C" int lut8_features() { return 1; }\n')
    second = build.build()
    assert first != second
    assert not first.exists()


@needs_compiler
def test_a_compile_error_is_quoted_and_leaves_nothing(sources):
    (sources / "lut8_cpu.cpp").write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"lut8_cpu\.cpp:1"):
        build.build()
    assert list(build.PACKAGE.iterdir()) == []


def test_no_compiler_is_said(sources, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.build()


def test_no_sources_are_said(sources):
    (sources / "lut8_cpu.cpp").unlink()
    with pytest.raises(build.BuildError, match="not part of this installation"):
        build.build()


def test_the_command_line_can_be_optional(sources, monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.main([]) == 1
    assert build.main(["--optional"]) == 0
    assert "reference path will be used" in capsys.readouterr().err


def test_without_an_object_dispatch_says_what_to_run(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: cpu.Library(None, (), False, "the CPU path is not built; run: python -m lbllm_kernels.build"))
    choice = dispatch.choose(random_packed(8, 64, 32), "uniform")
    assert choice == dispatch.Choice("reference", "the CPU path is not built; run: python -m lbllm_kernels.build")


@pytest.mark.parametrize(
    ("variant", "group", "reason"), [("none", 32, "activations are not quantized"), ("uniform", 8, "group size 8 is not a multiple of 16")]
)
def test_every_fallback_has_its_reason(variant, group, reason):
    if variant != "none" and not cpu.library().levels:  # then it is the first thing to say, whatever the weight is
        reason = cpu.library().reason
    assert dispatch.choose(random_packed(8, 64, group), variant) == dispatch.Choice("reference", reason)


@pytest.mark.skipif(not cpu.library().levels, reason=cpu.library().reason)
def test_torch_and_the_object_share_one_thread_pool():
    """Two OpenMP run-times in a process spin against each other: the object must use the one that torch brought."""
    script = "import torch; torch.ones(9).sum(); from lbllm_kernels import cpu; cpu.library(); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no /proc here")
    assert len({line.split()[-1] for line in done.stdout.splitlines() if "libgomp" in line}) <= 1

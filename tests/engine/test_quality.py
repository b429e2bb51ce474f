"""What each stage is for, in perplexity: the tiny model of three seeds, held-out text of its own language, activations as they are."""

from __future__ import annotations

import pytest
from stage_bench import A16, EXPLICIT_64, ROUNDED, Bench

from lbllm_core.config import PtqInitConfig

# the tiny model's own learning rates: a model of 0.1 M parameters and 64 sequences wants more than the defaults
TINY_WAT = {"epochs": 8, "lr_weight": 3e-3, "lr_levels": 2e-3}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_stage_earns_its_place(models_home, tmp_path, seed):
    bench = Bench(models_home, seed)
    teacher = bench.perplexity()
    rounded = bench.perplexity(bench.stage1(tmp_path / "rtn", EXPLICIT_64, ROUNDED))
    first = bench.perplexity(bench.stage1(tmp_path / "ptq", A16))
    second = bench.perplexity(bench.stage2(tmp_path / "ptq", tmp_path / "wat", **TINY_WAT))
    print(f"seed {seed}: teacher {teacher:.3f}, round to nearest {rounded:.2f}, stage 1 {first:.3f}, stage 2 {second:.3f}")
    assert teacher < 2.1
    assert rounded > 3 * teacher  # there is something to win
    assert first <= 0.5 * rounded
    assert second <= 0.85 * first
    assert second > teacher


def test_parts_of_stage_1(models_home, tmp_path):
    """Fitted levels help, and error compensation on top of them."""
    bench = Bench(models_home)

    def measure(name, **changes):
        return bench.perplexity(bench.stage1(tmp_path / name, EXPLICIT_64, PtqInitConfig(smoothing_exponent=0.0, **changes)))

    rounded = bench.perplexity(bench.stage1(tmp_path / "rtn", EXPLICIT_64, ROUNDED))
    fitted, compensated = measure("fit", error_compensation=False), measure("gptq")
    assert fitted < 0.7 * rounded
    assert compensated < 0.9 * fitted


def test_stage_1_is_decided_by_its_seed(models_home, tmp_path):
    bench = Bench(models_home, sequences=8)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        bench.stage1(tmp_path / name, A16, seed=seed)
    first, second, other = ((tmp_path / n / "block_001.safetensors").read_bytes() for n in "abc")
    assert first == second
    assert first != other

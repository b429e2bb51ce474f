"""Whole runs of tiny: the predecessor with and without its INT8 channels, and joint training, from the typed words to a measured packed model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from gpu_products import GpuProducts
from lbllm_kernels.activation import POWERS_OF_TWO

from flows.compose import compose
from lbllm_core.engine.artifacts import prepare_home
from lbllm_core.errors import ModelError, NumericalError
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import load_packed
from lbllm_core.pipeline import SPECS, plan, spec_of, why_skipped
from lbllm_core.report.method import control_of, stages_of
from lbllm_core.run import run_pipeline

QUICK = ["model=tiny", "pack.benchmark=false", "dataset.sequences=32", "ptq_init.sequences=32", "weight_distill.sequences=32", "act_quant.sequences=32", "tracking.enabled=false", "evaluation.baselines=[]"]


@pytest.fixture(scope="module")
def home(models_home, tiny_teacher, tmp_path_factory):
    """A home without artifacts, with the trained model of `models_home`."""
    made = tmp_path_factory.mktemp("home")
    shutil.copytree(models_home / "models", made / "models")
    return made


def quiet(_):
    pass


def run(home: Path, *words: str):
    config = compose([*QUICK, *words])
    finished = run_pipeline(config, prepare_home(home), quiet)
    figures = {name: value for done in finished if done.row == "final" for name, value in done.handle.metrics.items()}
    packed = next(done.handle.folder(home) for done in finished if done.handle.step == "pack_and_benchmark") / "packed"
    return config, figures, packed


@pytest.fixture(scope="module")
def predecessor(home):
    with GpuProducts():  # from stage 1 to the measured packed model
        return {word: run(home, f"experiment=ablation_predecessor_outliers_{word}") for word in ("on", "off")}


def test_the_predecessor_runs_packs_and_reloads(predecessor):
    for word, (config, figures, folder) in predecessor.items():
        assert math.isfinite(perplexity(figures))
        assert figures["pack/integer_mismatches"] == 0
        assert figures["pack/logits_sqnr_db"] > config.pack.min_sqnr_db
        assert ("size/bpw_outliers" in figures) == (word == "on")
        linears = [linear for _, linear in packed_linears(load_packed(folder))]
        assert all((linear.packed().n_outliers == 16) == (word == "on") for linear in linears)
        assert any(linear.site.values.planes != POWERS_OF_TWO for linear in linears)  # fitted, not the start
        assert control_of(config, stages_of(config, "final")) == "bwa"


def test_int8_channels_cost_bits_and_repay_them(predecessor):
    (_, with_channels, _), (_, without, _) = predecessor["on"], predecessor["off"]
    assert with_channels["size/effective_bpw"] > without["size/effective_bpw"] + 8 * 16 / 172
    assert perplexity(with_channels) < perplexity(without)


def perplexity(figures) -> float:
    (name,) = [n for n in figures if n.startswith("ppl_synthetic") and not n.endswith("_stderr")]
    return figures[name]


def test_more_int8_channels_than_a_layer_has_are_refused(home):
    with pytest.raises(ModelError, match=r"outlier_channels=128 leaves none of the 64 input channels of self_attn\.q_proj"):
        run(home, "scheme=w1p1a1x4")


def test_planes_train_through_all_stages(home):
    config, figures, folder = run(home, "experiment=ablation_act_planes", "scheme.outlier_channels=8", "weight_distill.epochs=1", "end_to_end.steps=3")
    assert figures["pack/logits_sqnr_db"] > config.pack.min_sqnr_db
    assert perplexity(figures) < 20
    assert next(packed_linears(load_packed(folder)))[1].packed().n_outliers == 8


def test_joint_training_is_one_stage_that_learns(home):
    config, figures, folder = run(home, "experiment=ablation_joint_3e-3_smoothing_on", "scheme.kv_bits=4")
    assert why_skipped(config)["act_quant"] == "weight_distill.joint=true trains activations in stage 2"
    assert stages_of(config, "final") == (1, 2)
    assert control_of(config, (1, 2)) == "joint"
    sites = {name: module.factors.tolist() for name, module in load_packed(folder).named_modules() if name.endswith(("act_sites.qkv", "act_sites.down"))}
    assert len(sites) == 4
    assert all(not (clip * 10).is_integer() for clip, *_ in sites.values())  # the search starts on tenths: clips have learned
    assert perplexity(figures) < 20


def test_joint_training_diverges_with_a_remedy_and_keeps_earlier_blocks(home):
    words = ["experiment=ablation_joint_1e-2_smoothing_off", "weight_distill.lr_levels=1.0", "weight_distill.lr_weight=1.0", "weight_distill.grad_clip=0", "weight_distill.batch_size=1", "weight_distill.epochs=6"]
    with pytest.raises(NumericalError, match=r"block 0: .*Earlier blocks are kept\. Try a learning rate ten times lower"):
        run(home, *words)


def test_levels_off_the_grid_are_packed_on_it(home):
    config, figures, _ = run(home, "experiment=ablation_snap_off", "weight_distill.epochs=1", "end_to_end.steps=2")
    assert not config.scheme.snap_levels
    assert figures["pack/logits_sqnr_db"] > 60  # held against the snapped student, not against the one that trained
    assert perplexity(figures) < 20


def test_residual_binarization_trains_packs_and_stays_one(home):
    words = ["scheme=w1p1a16", "scheme.level_mode=explicit", "scheme.level_family=residual", "scheme.group_size=64", "weight_distill.epochs=1", "end_to_end.steps=3", "evaluation.baselines=[stage1]"]
    config, figures, folder = run(home, *words)
    assert figures["pack/logits_sqnr_db"] > 60
    assert figures["size/effective_bpw"] == pytest.approx(2 + figures["size/bpw_group_scales"])
    assert figures["size/bpw_group_scales"] > 0.5  # 172 columns are three groups of 64
    assert control_of(config, (1, 2, 4)) == "residual"
    for _, linear in packed_linears(load_packed(folder)):
        levels = linear.packed().levels.view(torch.int8).view(-1, 4).int()
        assert torch.equal(levels, -levels.flip(-1))
        assert bool((levels[..., 2:].sum(-1) % 2 == 0).all())  # a is a whole number
    assert perplexity(figures) < 20


def test_stage_2_is_known_by_the_activations_only_when_it_trains_them():
    apart, joint = compose(QUICK), compose([*QUICK, "weight_distill.joint=true"])
    assert spec_of("weight_distill", apart) is SPECS["weight_distill"]
    assert not any(name.startswith("scheme.act") for name in spec_of("weight_distill", apart).fields)
    assert {"scheme.act_variant", "scheme.kv_bits"} <= set(spec_of("weight_distill", joint).fields)
    assert [step.name for step in plan(joint)].count("act_quant") == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scheme.snap_levels=false", "scheme.level_family=affine"], "choose scheme.level_family=free"),
        (["scheme=w2a16", "weight_distill=latent"], "choose scheme.level_family=free or weight_distill.parameterization=nearest"),
        (["scheme=w2a16", "scheme.level_family=int2", "weight_distill=latent"], "scheme.level_family=int2 cannot store"),
        (["scheme.level_family=residual"], "residual has two scales for each group and no table; choose scheme.level_mode=explicit"),
        (["weight_distill.joint=true", "scheme.act_bits=16"], "no activations to train"),
        (["weight_distill.joint=true", "weight_distill.enabled=false"], "weight_distill.enabled=false leaves out"),
        (["weight_distill.joint=true", "evaluation.baselines=[stage3]"], "weight_distill.joint=true leaves out"),
    ],
)
def test_what_contradicts_itself_is_refused(words, told):
    from lbllm_core.errors import ConfigError

    with pytest.raises(ConfigError, match=told):
        compose([*QUICK, *words])

"""The block loop: interrupted anywhere and resumed, it ends with the same bytes; an explosion names its block and keeps the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from stage_bench import A16, CPU, Bench

from lbllm_core.config import ActQuantConfig, EndToEndConfig, SchemeConfig, WeightDistillConfig
from lbllm_core.engine.block_sweep import BlockJob, SweepPlan, relative_error
from lbllm_core.engine.hidden_states import HiddenStates
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import silent
from lbllm_core.engine.train_block import _LossWatch, _SquaredError, block_loss, cosine
from lbllm_core.errors import NumericalError
from lbllm_core.model.student import load_block, state_from_tensors, state_tensors
from lbllm_core.model.student_block import build_block
from lbllm_core.quant.activation_histogram import BINS
from lbllm_core.stages.act_quant import refine_block
from lbllm_core.stages.end_to_end import Refinement, refine
from lbllm_core.stages.ptq_init import quantize_block
from lbllm_core.stages.weight_distill import distill_block

A4 = SchemeConfig(codebook_size=16, kv_bits=4)
N = 8  # sequences


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def bench(models_home):
    return Bench(models_home, sequences=N)


@pytest.fixture(scope="module")
def students(bench, tmp_path_factory):
    """Undisturbed folders of stages 1 to 3."""
    root = tmp_path_factory.mktemp("students")
    for stage in STAGES:
        run_stage(bench, stage, root, root / stage)
    return root


def stage_of(stage, root):
    """Work and plan of a stage that starts from the folders in `root`."""
    if stage == "ptq_init":
        from lbllm_core.config import PtqInitConfig

        return lambda job: quantize_block(job, A4, PtqInitConfig(), 0), SweepPlan(stage, False)
    if stage == "weight_distill":
        config = WeightDistillConfig(epochs=2, batch_size=4)
        return lambda job: distill_block(job, load_block(root / "ptq_init", job.index, "none"), A4, config, 0), SweepPlan(stage, True)
    config = ActQuantConfig(batch_size=4, lr_levels=5e-3)
    plan = SweepPlan(stage, True, variant=A4.act_variant, kv_bits=A4.kv_bits)
    return lambda job: refine_block(job, load_block(root / "weight_distill", job.index, "none"), A4, config, 0), plan


STAGES = ("ptq_init", "weight_distill", "act_quant")


def run_stage(bench, stage, root, folder, around=lambda work: work, report=silent):
    work, plan = stage_of(stage, root)
    return bench.sweep(folder, around(work), plan, report=report)


def blocks_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("block_*.safetensors"))}


def dies_in_block_1(work):
    """The work is done, and lost before it is written: half of the block's time was in vain."""

    def wrapped(job):
        made = work(job)
        if job.index == 1:
            raise Interrupted
        return made

    return wrapped


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_and_resumed_is_byte_identical(bench, students, tmp_path, stage):
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        run_stage(bench, stage, students, tmp_path, dies_in_block_1)
    assert list(blocks_of(tmp_path)) == ["block_000.safetensors"]
    torch.manual_seed(2)  # nothing may hang on the global generator
    torch.rand(7)
    worked = []
    figures = run_stage(bench, stage, students, tmp_path, lambda work: lambda job: worked.append(job.index) or work(job))
    assert worked == [1]
    assert blocks_of(tmp_path) == blocks_of(students / stage)
    assert len(blocks_of(tmp_path)) == 2
    assert figures == [Ledger(students / stage).figures(i) for i in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_finished_stage_does_nothing(bench, students, stage):
    def forbidden(job):
        raise AssertionError(job.index)

    assert len(run_stage(bench, stage, students, students / stage, lambda _: forbidden)) == 2


def test_damaged_block_is_made_again_with_its_successors(bench, students, tmp_path):
    run_stage(bench, "ptq_init", students, tmp_path)
    path = tmp_path / "block_000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    worked = []
    run_stage(bench, "ptq_init", students, tmp_path, lambda work: lambda job: worked.append(job.index) or work(job))
    assert worked == [0, 1]
    assert blocks_of(tmp_path) == blocks_of(students / "ptq_init")


def test_block_files_hold_the_whole_state(students):
    """A state that was read back writes the same tensors: nothing is lost between stages."""
    for stage, variant in (("ptq_init", "none"), ("weight_distill", "none"), ("act_quant", A4.act_variant)):
        tensors = Ledger(students / stage).load(1)
        again = state_tensors(state_from_tensors(tensors, variant))
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert sum(k.endswith(".latent") for k in Ledger(students / "act_quant").load(1)) == 7  # the weights behind the codes, for stage 4
    assert {k for k in tensors if k.startswith("site.")} == {"site.qkv", "site.o", "site.gate_up", "site.down"}


def test_codes_are_frozen_in_stage_3(students):
    before, after = (Ledger(students / s).load(1) for s in ("weight_distill", "act_quant"))
    assert all(torch.equal(before[k], after[k]) for k in before if k.endswith((".codes", ".group_codes")))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.endswith(".codebook"))


def test_streams(bench, students):
    """What work is handed: the student's stream after quantized blocks, the teacher's output on the teacher's own stream."""
    seen: list[BlockJob] = []
    start = [load_block(students / "ptq_init", i, "none") for i in range(2)]

    def work(job):
        seen.append(replace(job, inputs=job.inputs.copy(), target=job.target.copy()))
        return start[job.index], {}

    model = bench.teacher.model
    hidden = model.model(bench.ids, output_hidden_states=True, use_cache=False).hidden_states
    for shared, folder in ((False, "own"), (True, "shared")):
        seen.clear()
        bench.sweep(students / folder, work, SweepPlan("x", True, target_on_student_stream=shared))
        assert torch.equal(seen[0].inputs.whole(), hidden[0])
        assert torch.allclose(seen[0].target.whole(), hidden[1], atol=1e-5)
        fixed = build_block(bench.decoder.blocks[0], start[0], "fixed")
        student = seen[0].run(fixed, hidden[0])
        assert torch.allclose(seen[1].inputs.whole(), student, atol=1e-5)
        source = student if shared else seen[0].target.whole()
        assert torch.allclose(seen[1].target.whole(), seen[1].run(bench.decoder.blocks[1], source), atol=1e-4)
    figures = Ledger(students / "own").figures(0)["block_rel_mse"]
    expected = (student[:, 1:] - hidden[1][:, 1:]).square().sum() / hidden[1][:, 1:].square().sum()
    assert figures == pytest.approx(float(expected), rel=1e-3)


def test_reports_name_step_and_block(bench, students, tmp_path):
    heard = []
    run_stage(bench, "weight_distill", students, tmp_path, report=heard.append)
    assert {(p.step, p.total, p.unit) for p in heard} == {("weight_distill", 2, "block")}
    assert (heard[0].units, heard[0].figures) == (0, {}), "from here on a block's time is measured"
    assert [p.done for p in heard if p.share == 0] == [0, 1, 2]
    units = [p.units for p in heard]
    assert all(a <= b for a, b in pairwise(units)), "it never goes back"
    assert all(math.isfinite(v) for p in heard for v in p.figures.values())
    whole = [p for p in heard[1:] if p.share == 0]
    assert {"loss", "loss_before", "loss_after", "tokens_per_s", "error_before", "error_after", "block_rel_mse"} <= whole[0].figures.keys()
    for index, p in enumerate(whole):
        told = [q for q in heard if q.share and q.done == index]
        kept = Ledger(tmp_path).figures(index)
        assert [[q.share, q.figures["loss"]] for q in told] == kept["losses"], "what was told is what the curves show"
        assert (p.figures["loss"], p.figures["loss_before"]) == (kept["losses"][-1][1], kept["losses"][0][1])
        assert 0 < kept["error_before"] != kept["error_after"]
        assert kept["error_after"] == kept["block_rel_mse"], "a short stream is its own sample"


def test_error_before_is_that_of_the_block_as_it_came(bench, students, tmp_path):
    first = load_block(students / "ptq_init", 0, "none")
    bench.sweep(tmp_path, lambda job: (first, {}), SweepPlan("weight_distill", True))
    untrained = Ledger(tmp_path).figures(0)["block_rel_mse"]
    assert Ledger(students / "weight_distill").figures(0)["error_before"] == pytest.approx(untrained, rel=1e-6)


def test_activations_of_a_site_are_kept_with_its_factors(students):
    for index in range(2):
        sites = Ledger(students / "act_quant").figures(index)["activations"]
        learned = load_block(students / "act_quant", index, A4.act_variant).sites
        assert sites.keys() == learned.keys()
        for site, kept in sites.items():
            f = learned[site]
            assert kept["learned"] == pytest.approx([f.clip_max, f.clip_min, f.knee_low, f.knee_high])
            assert len(kept["counts"]) == BINS
            assert kept["counts"][-1] > 0, "every token with a positive value has a largest one"


def explodes_in_block_1(students):
    def work(job):
        config = WeightDistillConfig(epochs=8, batch_size=2, lr_levels=1.0 if job.index else 1e-4, lr_weight=1e-4, grad_clip=0.0)
        if job.index == 1:
            target = job.target.whole().clone()
            target[0, 5] = math.nan
            job = replace(job, target=HiddenStates.of(target))
        return distill_block(job, load_block(students / "ptq_init", job.index, "none"), A4, config, 0)

    return work


def test_nan_names_block_and_remedy_and_keeps_earlier_blocks(bench, students, tmp_path):
    with pytest.raises(NumericalError) as caught:
        bench.sweep(tmp_path, explodes_in_block_1(students), SweepPlan("weight_distill", True))
    message = str(caught.value)
    assert "block 1" in message
    assert "last finite loss" in message
    assert "learning rate" in message
    assert Ledger(tmp_path).finished(2) == 1


def test_learning_rate_that_explodes(bench, students, tmp_path):
    """Beyond what a configuration allows, so that gains overflow: the parameter that broke is named."""
    def work(job):
        config = WeightDistillConfig(epochs=8, batch_size=2, lr_levels=1e3, lr_weight=0.0, grad_clip=0.0)
        return distill_block(job, load_block(students / "ptq_init", job.index, "none"), A4, config, 0)

    with pytest.raises(NumericalError, match=r"block 0: the loss became (nan|inf).*last finite loss \d.*[Tt]ry a learning rate"):
        bench.sweep(tmp_path, work, SweepPlan("weight_distill", True))
    assert Ledger(tmp_path).finished(2) == 0


def test_inputs_that_are_not_finite(bench, students, tmp_path):
    from lbllm_core.config import PtqInitConfig

    def work(job):
        inputs = job.inputs.whole().clone()
        inputs[0, 3, 0] = math.inf
        return quantize_block(replace(job, inputs=HiddenStates.of(inputs)) if job.index else job, A16, PtqInitConfig(), 0)

    with pytest.raises(NumericalError, match=r"block 1: the inputs of `qkv` are not finite; try"):
        bench.sweep(tmp_path, work, SweepPlan("ptq_init", False))
    assert Ledger(tmp_path).finished(2) == 1


E2E = EndToEndConfig(steps=7, batch_size=4, micro_batch=2, checkpoint_every=2)


def refined(bench, students, folder, config=E2E, report=silent):
    states = [load_block(students / "act_quant", i, A4.act_variant) for i in range(2)]
    made = refine(Refinement(bench.decoder, config, A4, CPU, 0), bench.ids, states, Ledger(folder, "checkpoint"), report)
    assert len(made.error_before) == len(made.error_after) == 2
    return made.states, made.history


def test_stage_4_moves_codes_only_when_weights_have_a_rate(bench, students, tmp_path):
    before = [load_block(students / "act_quant", i, A4.act_variant) for i in range(2)]
    assert all(len(state.latents) == 7 for state in before)  # stages 2 and 3 hand the weights behind the codes on

    def moved(states):
        pairs = [(a.linears[p].codes, b.linears[p].codes) for a, b in zip(before, states, strict=True) for p in a.linears]
        return sum(int((a != b).sum()) for a, b in pairs)

    frozen, _ = refined(bench, students, tmp_path / "frozen")
    free, losses = refined(bench, students, tmp_path / "free", replace(E2E, lr_weight=2e-3, lr_norms=1e-3))
    assert moved(frozen) == 0
    assert moved(free) > 100
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert not any(torch.equal(a.norms[n], b.norms[n]) for a, b in zip(before, free, strict=True) for n in a.norms)


def same(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(map(state_tensors, a), map(state_tensors, b), strict=True) for k in x)


@pytest.mark.parametrize("died", [1, 2, 3, 6])
def test_end_to_end_resumes_bit_equal(bench, students, tmp_path, died):
    """Killed at the report of step `died`: steps 2, 4 and 6 leave checkpoints behind (the last one is the result itself)."""
    states, history = refined(bench, students, tmp_path / "whole")

    def report(progress):
        if progress.done == died:
            raise Interrupted

    with pytest.raises(Interrupted):
        refined(bench, students, tmp_path / "killed", report=report)
    steps = []
    again, resumed = refined(bench, students, tmp_path / "killed", report=lambda p: steps.append(p.done))
    assert steps[:2] == [(died - 1) // 2 * 2, (died - 1) // 2 * 2 + 1], "the checkpoint, then the step after it"
    assert steps[-1] == 7
    assert same(again, states)
    assert resumed == history
    assert [h["step"] for h in resumed] == list(range(7))


def test_end_to_end_learns_and_keeps_codes(bench, students, tmp_path):
    config = EndToEndConfig(steps=30, batch_size=8, micro_batch=8, checkpoint_every=100)
    states, history = refined(bench, students, tmp_path, config)
    assert history[-1]["loss"] < 0.97 * history[0]["loss"]
    start = [load_block(students / "act_quant", i, A4.act_variant) for i in range(2)]
    for a, b in zip(start, states, strict=True):
        assert all(torch.equal(a.linears[p].codes, b.linears[p].codes) for p in a.linears)
        assert a.sites != b.sites


def test_micro_batches_add_up(bench, students, tmp_path):
    config = EndToEndConfig(steps=1, batch_size=8, micro_batch=8)
    whole = refined(bench, students, tmp_path / "a", config)[1][0]["loss"]
    parts = refined(bench, students, tmp_path / "b", replace(config, micro_batch=2))[1][0]["loss"]
    again = refined(bench, students, tmp_path / "c", replace(config, gradient_checkpointing=True))[1][0]["loss"]
    assert parts == pytest.approx(whole, rel=1e-4)
    assert again == pytest.approx(whole, rel=1e-5)


def test_end_to_end_explosion_names_step_and_keeps_checkpoints(bench, students, tmp_path):
    config = EndToEndConfig(steps=40, batch_size=4, micro_batch=4, checkpoint_every=1, lr_levels=1e3, grad_clip=0.0)
    with pytest.raises(NumericalError, match=r"stage 4, step \d+: the loss became nan; last finite loss \d.*end_to_end\.lr_levels"):
        refined(bench, students, tmp_path, config)


def test_small_formulas():
    assert cosine(0, 10, 0.1) == pytest.approx(1.0)
    assert cosine(10, 10, 0.1) == pytest.approx(0.1)
    assert cosine(5, 10, 0.1) == pytest.approx(0.55)
    assert cosine(0, 0, 0.5) == pytest.approx(1.0)
    a, b = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    b[:, 0] = 1e6  # first tokens do not count
    assert float(block_loss(a, b, 2.0)) == pytest.approx(0.5)
    assert relative_error(HiddenStates.of(a), HiddenStates.of(b)) == pytest.approx(1.0)


def test_the_loss_of_a_gpu_is_the_loss():
    """Its value, and its gradient at an upstream that is not one; first tokens are massive and count for nothing."""
    torch.manual_seed(0)
    output, target = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    target[:, 0] = 1e20
    found = []
    for loss in (block_loss, _SquaredError.apply):
        mine = output.clone().requires_grad_()
        value = loss(mine, target, 0.7)
        (value * 0.25).backward()
        found.append((value.detach(), mine.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)
    assert not bool(found[1][1][:, 0].any())


def test_a_sweep_needs_no_target(bench, tmp_path, students):
    jobs = []
    state = [load_block(students / "ptq_init", i, "none") for i in range(2)]
    bench.sweep(tmp_path, lambda job: (jobs.append(job), (state[job.index], {}))[1], SweepPlan("x", False))
    assert [j.target for j in jobs] == [None, None]


def test_one_hard_batch_is_no_divergence():
    watch, block = _LossWatch(3), torch.nn.Linear(2, 2)
    for loss in (0.007, 2.3, 0.01, 2.0, 2.1, 0.02):
        assert watch.look(loss, block) == loss
    for _ in range(4):
        assert watch.look(2.3, block) == 2.3
    with pytest.raises(NumericalError, match=r"block 3: training diverges, the loss went from 0\.007 to 2\.3\. Earlier blocks are kept\. Try a learning rate ten times lower"):
        watch.look(2.3, block)

"""Folded smoothing is the same function in other numbers, and the statistics follow it."""

from __future__ import annotations

import copy

import pytest
import torch

from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import HiddenStates
from lbllm_core.model.blocks import NORMS, SITES, Decoder, linears_of, linears_of_site
from lbllm_core.model.smoothing import scales, share_over_heads, smooth
from lbllm_core.stages.ptq_init import collect_statistics

CPU = Hardware(torch.device("cpu"), torch.float32)


def job_of(model, index=1, tokens=24, seed=0):
    """A job on block `index` with inputs that have outlier channels."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, tokens, model.config.hidden_size, generator=g)
    hidden[..., 3] *= 15
    hidden[..., 7] += 9
    view = Decoder(model)
    return BlockJob(index, view.blocks[index], HiddenStates.of(hidden), None, view, view.surroundings(hidden[:1]), CPU)


def values(block):
    linears = linears_of(block)
    weights = {p: m.weight.detach().float() for p, m in linears.items()}
    biases = {p: m.bias.detach().float() for p, m in linears.items() if m.bias is not None}
    return weights, biases, {n: block.get_submodule(n).weight.detach().float() for n in NORMS}


def smoothed_block(job, exponent):
    block = job.teacher_block
    weights, biases, norms, statistics = smooth(*values(block), collect_statistics(job), exponent, block.self_attn.head_dim)
    made = copy.deepcopy(block)
    with torch.no_grad():
        for path, linear in linears_of(made).items():
            linear.weight.copy_(weights[path])
            if path in biases:
                linear.bias.copy_(biases[path])
        for name, weight in norms.items():
            made.get_submodule(name).weight.copy_(weight)
    return made, statistics


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
def test_block_computes_the_same(make_model, family, exponent):
    job = job_of(make_model(family))
    made, _ = smoothed_block(job, exponent)
    before, after = (job.run(block, job.inputs.whole()) for block in (job.teacher_block, made))
    change = (before - job.inputs.whole()).square().mean().sqrt()  # what the block adds to its inputs
    assert float((after - before).abs().max()) < 2e-5 * float(before.abs().max())
    assert float((after - before).square().mean().sqrt()) < 1e-5 * float(change)
    moved = [float((a.weight - b.weight).abs().max()) for a, b in zip(linears_of(made).values(), linears_of(job.teacher_block).values(), strict=True)]
    assert min(moved) > 1e-2  # every linear was rescaled, so equality is no accident


def test_statistics_are_those_of_the_smoothed_block(make_model, family):
    job = job_of(make_model(family), tokens=30)
    made, carried = smoothed_block(job, 0.6)
    measured = collect_statistics(BlockJob(job.index, made, job.inputs, None, job.decoder, job.surroundings, CPU))
    raw = collect_statistics(job)
    for site in SITES:
        size = float(measured[site].hessian.diagonal().max())
        assert torch.allclose(carried[site].hessian, measured[site].hessian, rtol=1e-3, atol=1e-5 * size)
        assert torch.allclose(carried[site].largest, measured[site].largest, rtol=1e-4)
        assert carried[site].tokens == measured[site].tokens == 120
        assert not torch.allclose(raw[site].largest, measured[site].largest, rtol=1e-2)


def test_statistics_are_sums_over_all_inputs(make_model):
    """Batches and hooks against the plain definition at the site before q, k and v."""
    job = job_of(make_model("llama"))
    x = job.teacher_block.input_layernorm(job.inputs.whole()).flatten(0, 1).double()
    found = collect_statistics(job)["qkv"]
    assert torch.allclose(found.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.largest.double(), x.abs().amax(0), rtol=1e-5)


def test_exponent_zero_changes_nothing(make_model):
    job = job_of(make_model("qwen2"))
    made, _ = smoothed_block(job, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), job.teacher_block.state_dict().values(), strict=True))


def test_outliers_become_smaller(make_model):
    job = job_of(make_model("llama"))
    raw = collect_statistics(job)
    _, after = smoothed_block(job, 0.6)

    def spread(statistics, site):
        return float(statistics[site].largest.max() / statistics[site].largest.median())

    assert spread(after, "qkv") < 0.7 * spread(raw, "qkv")


def test_scales_have_mean_one_and_follow_the_formula(make_model):
    job = job_of(make_model("llama"))
    weights, _, _ = values(job.teacher_block)
    largest = collect_statistics(job)["gate_up"].largest
    readers = [weights[p] for p in linears_of_site("gate_up")]
    s = scales(largest, readers, 0.6)
    ratio = largest**0.6 / torch.cat(readers).abs().amax(0) ** 0.4
    assert torch.allclose(s / s[0], ratio / ratio[0], rtol=1e-4)
    assert abs(float(s.log().mean())) < 1e-5


def test_shared_scales_repeat_over_query_heads():
    s = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.5  # 2 key-value heads, 3 query heads each, head size 4
    shared = share_over_heads(s, 4, 3).reshape(2, 3, 4)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(shared[:, 0], shared[:, 2])
    assert torch.allclose(shared[:, 0].log(), s.reshape(2, 3, 4).log().mean(1), atol=1e-6)

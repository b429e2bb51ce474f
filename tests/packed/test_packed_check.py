"""The final inference check finds what it must find, and stays silent otherwise; speed is measured in a process of its own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from lbllm_kernels import cpu, dispatch

from lbllm_core.errors import GateError, LbllmError
from lbllm_core.evaluation import packed_check, speed
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import PackedDecoder, load_packed, open_packed, pack_student
from lbllm_core.model.student_block import fake_quant_block, fake_quant_model

IDS = torch.arange(1, 41).view(2, 20)
needs_build = pytest.mark.skipif(not cpu.library().levels, reason=cpu.library().reason)


@pytest.fixture
def pair(scheme, make_teacher, make_student, make_fake, tmp_path):
    teacher = make_teacher()
    states = make_student(teacher, scheme)
    pack_student(teacher, states, tmp_path, scheme)
    packed, fake = load_packed(tmp_path), make_fake(teacher, states)
    teacher.get_input_embeddings().weight.copy_(packed.get_input_embeddings().weight)
    return packed, (Decoder(teacher), lambda index: fake.model.layers[index])


@needs_build
@pytest.mark.parametrize("streamed", [False, True])
def test_a_sound_model_passes(pair, streamed, tmp_path):
    packed = open_packed(tmp_path) if streamed else PackedDecoder(pair[0])
    integers, logits = packed_check.check(packed, IDS, *pair[1])
    assert packed_check.check(packed, IDS) == (integers, None)
    assert integers.mismatches == 0
    assert integers.linears == 14
    assert integers.exact_paths
    assert integers.compared > 14 * 41 * 48
    assert logits.worst_linear_sqnr_db > 100
    packed_check.require(integers, logits, 60)


@needs_build
def test_a_wrong_sum_is_found_and_named(pair, monkeypatch):
    original = dispatch.accumulate
    target = dict(packed_linears(pair[0]))["model.layers.1.mlp.up_proj"].prepared

    def wrong(q, prepared):
        acc = original(q, prepared)
        if prepared is target:
            acc[0, 3] += 1
        return acc

    monkeypatch.setattr(dispatch, "accumulate", wrong)
    integers, _ = packed_check.check(PackedDecoder(pair[0]), IDS)
    assert integers.mismatches == 2  # once for all tokens, once for the first alone
    assert integers.first == "model.layers.1.mlp.up_proj"
    with pytest.raises(GateError, match=r"layers\.1\.mlp\.up_proj"):
        packed_check.require(integers, None, 0)


def test_a_wrong_linear_is_named(pair):
    packed, fake = pair
    dict(packed_linears(packed))["model.layers.0.mlp.down_proj"].row_scale.mul_(1.5)
    for _, linear in packed_linears(packed):
        linear.prepare()
    integers, logits = packed_check.check(PackedDecoder(packed), IDS, *fake)
    assert logits.worst_linear == "model.layers.0.mlp.down_proj"
    assert logits.worst_linear_sqnr_db == pytest.approx(20 * math.log10(2), abs=0.1)
    with pytest.raises(GateError, match=r"below pack\.min_sqnr_db=60.*down_proj"):
        packed_check.require(integers, logits, 60)


def whole_model_check(packed, fake, ids):
    """The figures of the check from three passes of whole models, block by block with hooks: what streaming must not change."""
    seen, contributions = {}, []

    def keep(name):
        return lambda _, arguments, output: seen.__setitem__(name, (arguments[0], output))

    def force(name):
        return lambda _, arguments: (seen[name][0], *arguments[1:])

    def compare(name):
        return lambda _, __, output: contributions.append(packed_check.most_tokens_db(output - seen[name][0], seen[name][1] - seen[name][0]))

    layers = list(enumerate(packed.model.layers))
    handles = [layer.register_forward_hook(keep(i)) for i, layer in layers]
    with torch.no_grad():
        ours, free = packed(ids, use_cache=False).logits, fake(ids, use_cache=False).logits
        handles += [layer.register_forward_pre_hook(force(i)) for i, layer in enumerate(fake.model.layers)]
        handles += [layer.register_forward_hook(compare(i)) for i, layer in enumerate(fake.model.layers)]
        forced = fake(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return packed_check.most_tokens_db(forced, ours), packed_check.sqnr_db(free, ours), min(contributions)


@pytest.mark.parametrize("kv_bits", [4, 16])
def test_streaming_does_not_change_the_check(scheme, make_teacher, make_student, tmp_path, kv_bits):
    teacher, scheme = make_teacher("qwen3", tied=False), dataclasses.replace(scheme, kv_bits=kv_bits)
    states = make_student(teacher, scheme)
    pack_student(teacher, states, tmp_path, scheme)
    _, found = packed_check.check(open_packed(tmp_path), IDS, Decoder(teacher), lambda i: fake_quant_block(teacher.model.layers[i], states[i], kv_bits))
    forced, free, worst = whole_model_check(load_packed(tmp_path), fake_quant_model(teacher, states, kv_bits), IDS)
    assert (found.logits_sqnr_db, found.free_logits_sqnr_db, found.worst_block_sqnr_db) == pytest.approx((forced, free, worst), abs=0.01)


def test_the_reference_path_says_that_it_compares_nothing(pair, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    for _, linear in packed_linears(pair[0]):
        linear.prepare()
    integers, _ = packed_check.check(PackedDecoder(pair[0]), IDS)
    assert not integers.exact_paths
    assert integers.paths == ("reference: LBLLM_KERNEL_PATH=reference",)


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert packed_check.sqnr_db(x, x) == math.inf
    assert packed_check.sqnr_db(x, 2 * x) == 0
    assert packed_check.sqnr_db(x, x * math.nan) == -math.inf


def test_a_code_that_falls_otherwise_in_one_token_is_no_fault_and_a_fault_in_all_is_found():
    """As measured: the first token holds nearly half of a block's energy, and one of its codes lay at a boundary."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1, 256, 64, generator=generator)
    block[:, 0] *= 14
    one = block * (1 + 1e-6)
    one[:, 0] *= 1.16
    assert packed_check.sqnr_db(block, one) < 20
    assert packed_check.most_tokens_db(block, one) > 110
    tenth = block.clone()
    tenth[:, :26] *= 1.16
    assert packed_check.most_tokens_db(block, tenth) < 17, "more than a tenth"
    assert packed_check.most_tokens_db(block, 1.5 * block) == pytest.approx(20 * math.log10(2))
    assert packed_check.most_tokens_db(block, block) == math.inf
    assert packed_check.most_tokens_db(block, torch.where(block > 3, math.nan, block)) == -math.inf
    assert packed_check.most_tokens_db(block[:, :9], one[:, :9]) < 20, "of a few tokens all count"
    silent = torch.zeros(1, 20, 4)
    assert packed_check.most_tokens_db(silent, silent + 1) == -math.inf


def test_speed_in_a_fresh_process(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    figures = speed.measure_packed(tmp_path, prefill_tokens=1000, decode_tokens=3, repeats=2)
    assert figures["prefill_tokens"] == 125  # the context of 128 leaves room for the answer
    for name in ("prefill_tok_s", "decode_tok_s"):
        assert 0 < figures[f"{name}_min"] <= figures[name] <= figures[f"{name}_max"]
    assert 0 < figures["weights_gb"] < figures["baseline_gb"] <= figures["peak_gb"] < 4
    assert figures["load_s"] > 0


def test_a_failed_measurement_says_why(tmp_path):
    with pytest.raises(LbllmError, match="is not a packed model"):
        speed.measure_packed(tmp_path, 8, 2, 1)

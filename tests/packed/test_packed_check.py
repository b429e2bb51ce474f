"""The final inference check finds what it must find, and stays silent otherwise; speed is measured in a process of its own."""

from __future__ import annotations

import math

import pytest
import torch
from lbllm_kernels import cpu, dispatch

from lbllm_core.errors import GateError, LbllmError
from lbllm_core.evaluation import packed_check, speed
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import load_packed, pack_student

IDS = torch.arange(1, 41).view(2, 20)
needs_build = pytest.mark.skipif(not cpu.library().levels, reason=cpu.library().reason)


@pytest.fixture
def pair(scheme, make_teacher, make_student, make_fake, tmp_path):
    teacher = make_teacher()
    states = make_student(teacher, scheme)
    pack_student(teacher, states, tmp_path, scheme)
    packed, fake = load_packed(tmp_path), make_fake(teacher, states)
    fake.get_input_embeddings().weight.copy_(packed.get_input_embeddings().weight)
    return packed, fake


@needs_build
def test_a_sound_model_passes(pair):
    integers, logits = packed_check.check_integers(pair[0], IDS), packed_check.check_logits(*pair, IDS)
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
    integers = packed_check.check_integers(pair[0], IDS)
    assert integers.mismatches == 2  # once for all tokens, once for the first alone
    assert integers.first == "model.layers.1.mlp.up_proj"
    with pytest.raises(GateError, match=r"layers\.1\.mlp\.up_proj"):
        packed_check.require(integers, None, 0)


def test_a_wrong_linear_is_named(pair):
    packed, fake = pair
    dict(packed_linears(packed))["model.layers.0.mlp.down_proj"].row_scale.mul_(1.5)
    for _, linear in packed_linears(packed):
        linear.prepare()
    logits = packed_check.check_logits(packed, fake, IDS)
    assert logits.worst_linear == "model.layers.0.mlp.down_proj"
    assert logits.worst_linear_sqnr_db == pytest.approx(20 * math.log10(2), abs=0.1)
    with pytest.raises(GateError, match=r"below pack\.min_sqnr_db=60.*down_proj"):
        packed_check.require(packed_check.check_integers(packed, IDS), logits, 60)


def test_the_reference_path_says_that_it_compares_nothing(pair, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    for _, linear in packed_linears(pair[0]):
        linear.prepare()
    integers = packed_check.check_integers(pair[0], IDS)
    assert not integers.exact_paths
    assert integers.paths == ("reference: LBLLM_KERNEL_PATH=reference",)


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert packed_check.sqnr_db(x, x) == math.inf
    assert packed_check.sqnr_db(x, 2 * x) == 0
    assert packed_check.sqnr_db(x, x * math.nan) == -math.inf


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

"""NF4 and INT8 of bitsandbytes as rows of a run: what they store, what they score, and what is said where the package is absent."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import nn

from flows.compose import compose
from lbllm_core.engine.artifacts import prepare_home
from lbllm_core.engine.preflight import check_inputs
from lbllm_core.errors import ConfigError
from lbllm_core.evaluation.last_states import Batch, last_states, logits_of, teacher_of
from lbllm_core.model.bitsandbytes_linear import quantized_linear, replace_linears
from lbllm_core.model.blocks import Decoder, linears_of
from lbllm_core.quant.bits import library_bits
from lbllm_core.report.method import method_records
from lbllm_core.report.method_tables import method_table
from lbllm_core.report.summary import result_rows
from lbllm_core.run import run_pipeline

# the levels as they are published (arXiv 2305.14314, appendix E)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
NF4 += [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
TEACHER_ONLY = ["model=tiny", "scheme=bf16", "evaluation.baselines=[nf4,int8]", "tracking.enabled=false"]


@pytest.fixture(scope="module")
def home(models_home, tiny_teacher, tmp_path_factory):
    """A home without artifacts, with the trained model of `models_home`."""
    made = tmp_path_factory.mktemp("home")
    shutil.copytree(models_home / "models", made / "models")
    return prepare_home(made)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight `(out, in)` through NF4 in blocks of 64, in float64."""
    flat = weight.double().flatten()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float64)
    nearest = (blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).flatten()[: flat.numel()].view_as(weight)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """A weight through INT8 with a scale a row, in float64; fp16 first, as the library does."""
    rounded = weight.half().double()
    scale = rounded.abs().amax(1, keepdim=True) / 127
    return (rounded / scale).round() * scale


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a replaced linear multiplies by."""
    from bitsandbytes import functional

    if layer.weight.dtype == torch.int8:
        return layer.weight.data * layer.weight.SCB[:, None] / 127
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize(("control", "reference"), [("nf4", nf4), ("int8", int8)])
def test_every_linear_is_what_the_format_says(control, reference, tiny_teacher):
    for path, linear in linears_of(tiny_teacher.model.model.layers[0]).items():
        before = linear.weight.detach().clone()
        layer = quantized_linear(linear, control)
        wanted = reference(before)
        assert float((stored_weight(layer) - wanted).norm() / wanted.norm()) < 2e-3, path  # a weight halfway between two levels may go either way
        x = torch.randn(3, 5, linear.in_features, generator=torch.Generator().manual_seed(1))
        far = (layer(x) - nn.functional.linear(x, wanted.float(), linear.bias)).norm() / linear(x).norm()
        assert float(far) < (1e-5 if control == "nf4" else 0.02), path  # INT8 rounds what goes in as well
        assert control == "nf4" or float(far) > 1e-4
        assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("bias", [False, True])
def test_outlier_channels_of_llm_int8_are_not_rounded(bias):
    linear = nn.Linear(40, 24, bias=bias)
    x = torch.randn(6, 40)
    x[:, 7] *= 100
    with torch.no_grad():
        layer = quantized_linear(linear, "int8")
        wide = nn.functional.linear(x, stored_weight(layer), linear.bias)
        assert float((layer(x) - wide).norm() / wide.norm()) < 2e-3


def test_the_bill_is_what_is_stored():
    linear = nn.Linear(100, 48)
    four, eight = quantized_linear(linear, "nf4"), quantized_linear(linear, "int8")
    state = four.weight.quant_state
    assert not state.nested
    assert library_bits(48, 100, "nf4").total == 8 * (four.weight.nbytes + state.absmax.nbytes)
    assert library_bits(48, 100, "int8").total == 8 * (eight.weight.nbytes + eight.weight.SCB.nbytes)
    assert library_bits(4096, 4096, "nf4").effective_bpw == 4.5
    assert library_bits(4096, 4096, "int8").effective_bpw == 8 + 32 / 4096


def test_rows_of_a_run_without_stages(home):
    """A run of the teacher alone has both rows; they lie just above it, and far below rounding to two bits."""
    config = compose(TEACHER_ONLY)
    finished = run_pipeline(config, home, lambda _: None)
    rows = {row["row"]: row for row in result_rows(finished)}
    assert list(rows) == ["teacher", "int8", "nf4"]
    protocol = next(name for name in rows["teacher"] if name.startswith("ppl_") and not name.endswith("_stderr"))
    ceiling, eight, four = (rows[row][protocol] for row in ("teacher", "int8", "nf4"))
    assert ceiling * 0.999 < eight < four < ceiling * 1.2
    assert eight != ceiling
    assert rows["nf4"]["effective_bpw"] == rows["nf4"]["bpw_codes"] + rows["nf4"]["bpw_block_scales"] == 4.5
    assert rows["int8"]["effective_bpw"] == pytest.approx(rows["int8"]["bpw_codes"] + rows["int8"]["bpw_row_scales"])
    assert 8 < rows["int8"]["effective_bpw"] < 9
    assert rows["nf4"]["disk_mb"] < rows["int8"]["disk_mb"]
    again = run_pipeline(config, home, lambda _: None)
    assert all(done.handle.reused for done in again)
    assert len({done.handle.key for done in finished}) == 3
    records = [r for r in method_records(config, list(rows.values())) if r["name"] == protocol]
    assert [(r["row"], r["scheme"], r["packed"]) for r in records] == [("teacher", "bf16", False), ("int8", "int8", False), ("nf4", "nf4", False)]
    assert [(r["control"], r["effective_bpw"]) for r in records[1:]] == [(row, rows[row]["effective_bpw"]) for row in ("int8", "nf4")]
    table = method_table([r | {"name": "ppl_wikitext2_s2048"} for r in records], "tiny")
    assert "|  | bitsandbytes NF4 | A16 |  |  | 4.500 |" in table


def test_they_lie_between_teacher_and_stage_1(home):
    words = ["model=tiny", "evaluation.baselines=[int8,nf4]", "weight_distill.enabled=false", "end_to_end=off", "scheme=w1p1a16", "pack.benchmark=false", "pack.sample_tokens=0", "tracking.enabled=false"]
    rows = result_rows(run_pipeline(compose(words), home, lambda _: None))
    protocol = next(name for name in rows[0] if name.startswith("ppl_") and not name.endswith("_stderr"))
    values = {row["row"]: row[protocol] for row in rows}
    assert values["teacher"] < values["int8"] < values["nf4"] < values["final"]


@pytest.mark.parametrize("control", ["nf4", "int8"])
def test_block_by_block_gives_the_same_logits(control, home):
    batch, found = [Batch(torch.arange(60).view(2, 30) % 50)], []
    for streaming in ("off", "on"):
        model, _ = teacher_of(compose([*TEACHER_ONLY, f"hardware.streaming={streaming}"]), home)
        bits = replace_linears(model.decoder if streaming == "on" else Decoder(model), control)
        found.append((bits, logits_of(model, next(iter(last_states(model, batch))))))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_without_the_package_there_is_one_sentence(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = compose(TEACHER_ONLY)
    for asked in (lambda: check_inputs(config, home), lambda: run_pipeline(compose([*TEACHER_ONLY, "evaluation.batch_tokens=2048"]), home, lambda _: None)):
        with pytest.raises(ConfigError, match=r"need the package bitsandbytes .*run `make install`, or leave them out$"):
            asked()

"""Embedding and head in 16 bits: the same values, sums within fp32 rounding, and ordinary modules wherever they are not wanted."""

from __future__ import annotations

import copy

import pytest
import torch
from lbllm_kernels import cpu
from safetensors.torch import load_file
from torch import nn

from lbllm_core.model.half import HalfEmbedding, HalfHead, exact_half
from lbllm_core.model.packed_folder import load_packed, pack_student

IDS = torch.arange(1, 41).view(2, 20)
needs_build = pytest.mark.skipif(not cpu.library().half, reason="16-bit linears are not built")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher(tied=request.param)
    pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    return tmp_path


@needs_build
def test_values_are_those_of_the_file(folder):
    model, stored = load_packed(folder), load_file(folder / "model.safetensors")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, HalfEmbedding)
    assert isinstance(head, HalfHead)
    assert isinstance(head, nn.Linear)
    table = stored["model.embed_tokens.weight"]
    assert embedding.weight.dtype == torch.float16
    assert torch.equal(embedding.weight, table)
    assert torch.equal(embedding(IDS), nn.functional.embedding(IDS, table.float()))
    assert model.dtype == torch.float32
    own = stored.get("lm_head.weight", table)
    for tokens in (1, 3, 8, 9, 40):
        x = torch.randn(tokens, 1, 48)
        y, exact = head(x), x.double() @ own.double().T
        bound = 48 * 2.0**-24 * (x.double().abs() @ own.double().abs().T)
        assert y.shape == (tokens, 1, 90)
        assert bool(((y.double() - exact).abs() <= bound).all())
    assert "lm_head.weight" in stored or head.weight is embedding.weight


def test_without_the_object_modules_are_ordinary(folder, monkeypatch):
    plain = cpu.library()
    monkeypatch.setattr(cpu, "library", lambda: cpu.Library(plain.functions, plain.levels, plain.openmp, plain.reason, half=False))
    model = load_packed(folder)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_output_embeddings().weight.dtype == torch.float32
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_type_gives_ordinary_weights(folder, dtype):
    model = load_packed(folder)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    changed = copy.deepcopy(model).to(dtype)
    assert changed.get_input_embeddings().weight.dtype == dtype
    assert torch.equal(changed.get_input_embeddings().weight, stored.to(dtype))
    with torch.no_grad():
        assert changed(IDS).logits.dtype == dtype
    same = model.float()
    assert torch.equal(same.get_input_embeddings()(IDS), nn.functional.embedding(IDS, stored.float()))


def test_copies_stay_tied_and_equal(folder):
    model = load_packed(folder)
    twin = copy.deepcopy(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_only_exact_tables_are_halved():
    assert exact_half(torch.tensor([[1.0, 0.5]])).dtype == torch.float16
    assert exact_half(torch.tensor([[1e30]]).bfloat16().float()).dtype == torch.bfloat16
    assert exact_half(torch.tensor([[0.1]])) is None

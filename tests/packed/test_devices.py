"""The packed model on every device of this machine: loading there, moving there and back, number types, generation, the final check."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lbllm_kernels import dispatch, reference

from lbllm_core.evaluation.packed_check import check
from lbllm_core.model import hf_integration
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import load_packed, open_packed, pack_student

IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["codebook", "explicit"])
def folder(request, scheme, explicit_scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher("qwen2")
    form = scheme if request.param == "codebook" else explicit_scheme
    pack_student(teacher, make_student(teacher, form), tmp_path, dataclasses.replace(form, kv_bits=4))
    hf_integration.register()
    return tmp_path


def from_pretrained(folder, device, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **options)


def linears_are_exact(model, dtype):
    """Every linear on its device gives what the reference gives on the CPU, in its input's type."""
    for name, linear in packed_linears(model):
        x = torch.randn(3, 2, linear.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        packed = dataclasses.replace(linear.packed(), **{k: v.cpu() for k, v in vars(linear.packed()).items() if isinstance(v, torch.Tensor)})
        for tokens in (x, x[:1, :1], x.repeat(30, 1, 1)):
            y = linear(tokens.to(linear.row_scale.device))
            assert y.dtype == dtype
            assert torch.equal(y.cpu(), reference.linear(tokens, packed, linear.site.values)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_on_a_device(folder, device, dtype):
    model = from_pretrained(folder, device, dtype=dtype)
    with torch.no_grad():
        assert model(IDS.to(device)).logits.dtype == dtype
        linears_are_exact(model, dtype)


def test_moving_there_and_back(folder, device):
    model = load_packed(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        plain = model(IDS).logits
        there = model.to(device)
        assert all(t.device.type == device.type for t in there.state_dict().values())
        linears_are_exact(there, torch.float32)
        logits = there(IDS.to(device)).logits
        assert logits.device.type == device.type
        back = there.to("cpu")
        assert torch.equal(back(IDS).logits, plain)
    assert all(torch.equal(t, before[name].to(t.dtype)) for name, t in back.state_dict().items())


def test_generation_and_the_final_check(folder, device):
    model = load_packed(folder, device)
    out = model.generate(IDS.to(device), max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 25)
    integers, _ = check(open_packed(folder, device), IDS.to(device))
    assert integers.mismatches == 0
    assert integers.linears == 14


def test_input_on_another_device_is_refused(folder, device):
    linear = load_packed(folder, device).model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="x is on meta"):
        linear(torch.zeros(2, 48, device="meta"))
    with pytest.raises(ValueError, match="takes a float type"):
        linear(torch.zeros(2, 48, dtype=torch.int64, device=device))


def test_a_compiled_model_is_the_same_model(folder, device):
    """Full graph, for a long and a short prompt; the packed products stay opaque, so integers cannot change."""
    model = load_packed(folder, device)
    if not model.model.layers[0].self_attn.q_proj.coded:
        pytest.skip("one level mode is enough: the compiler does not see into the product")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS.to(device), IDS[:1, :3].to(device)):
            assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-4)


def test_the_path_can_be_forced_for_a_whole_model(folder, device, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    forced = load_packed(folder, device)
    assert {linear.prepared.choice.path for _, linear in packed_linears(forced)} == {"reference"}
    monkeypatch.delenv(dispatch.PATH_VARIABLE)
    with torch.no_grad():
        linears_are_exact(forced, torch.float32)

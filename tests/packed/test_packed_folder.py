"""Writing and reading a packed folder: the same logits, the same bytes, and clear words for a folder that lies."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from lbllm_kernels.activation import ActFactors
from safetensors.torch import load_file, save_file

from lbllm_core.errors import ArtifactError, ModelError
from lbllm_core.model.packed import ActSite, packed_linears
from lbllm_core.model.packed_folder import load_packed, narrow, pack_student

IDS = torch.arange(1, 41).view(2, 20)


def sqnr_db(reference, other):
    return float(10 * torch.log10(reference.double().square().sum() / (reference.double() - other.double()).square().sum().clamp(min=1e-300)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["codebook", "explicit", "weights_only"])
def test_packed_logits_are_the_emulated_ones(family, kind, scheme, explicit_scheme, make_teacher, make_student, make_fake, tmp_path):
    chosen = {"codebook": scheme, "explicit": explicit_scheme, "weights_only": dataclasses.replace(scheme, act_bits=16)}[kind]
    teacher = make_teacher(family, tied=family != "qwen3")
    states = make_student(teacher, chosen)
    pack_student(teacher, states, tmp_path, chosen)
    packed, fake = load_packed(tmp_path), make_fake(teacher, states)
    with torch.no_grad():
        fake.get_input_embeddings().weight.copy_(packed.get_input_embeddings().weight)
        fake.get_output_embeddings().weight.copy_(packed.get_output_embeddings().weight)
        ours, expected, original = packed(IDS).logits, fake(IDS).logits, teacher(IDS).logits
    assert sqnr_db(expected, ours) > 60
    assert sqnr_db(expected, original) < 30  # the comparison above is not empty: the student is another model


def test_the_same_student_gives_the_same_bytes(scheme, make_teacher, make_student, tmp_path):
    for name in ("a", "b"):
        teacher = make_teacher()
        pack_student(teacher, iter(make_student(teacher, scheme)), tmp_path / name, scheme)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_tied_head_is_stored_once_and_stays_tied(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher(tied=True)
    report = pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    packed = load_packed(tmp_path)
    assert packed.get_input_embeddings().weight is packed.get_output_embeddings().weight
    assert report.tensor_bytes["head"] == 0


def test_the_report_adds_up(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher(tied=False)
    report = pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(report.tensor_bytes.values()) == sum(t.numel() * t.element_size() for t in stored.values())
    assert report.folder_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    linears = [m for _, m in packed_linears(load_packed(tmp_path))]
    assert report.bits.weights == sum(m.in_features * m.out_features for m in linears)
    in_linears = 8 * sum(b.numel() * b.element_size() for m in linears for name, b in m.state_dict().items() if name != "bias")
    assert in_linears - report.bits.total == sum(8 * m.out_features * (-(-m.in_features // 4) * 4 - m.in_features) // 4 for m in linears)
    assert report.metrics()["effective_bpw"] > 2.25


def test_narrowing_never_changes_a_value_unless_told():
    assert narrow(torch.tensor([1.0, 0.5]))[0].dtype == torch.float16
    assert narrow(torch.tensor([1e30]).bfloat16().float())[0].dtype == torch.bfloat16
    odd = torch.tensor([0.1])
    assert narrow(odd)[0].dtype == torch.float32
    half, db = narrow(torch.linspace(0.1, 1, 1000), may_round=True)
    assert half.dtype == torch.float16
    assert db is not None
    assert db > 60
    assert narrow(torch.tensor([1e-7 / 3, 1e-8 / 3]), may_round=True)[0].dtype == torch.float32


@pytest.fixture
def folder(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), tmp_path, scheme)
    return tmp_path


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"
LIES = {
    "newer": (edit_config, lambda c: c["quantization_config"].update(format_version=2), "newer than 1"),
    "no version": (edit_config, lambda c: c["quantization_config"].pop("format_version"), "format_version=None"),
    "other method": (edit_config, lambda c: c["quantization_config"].update(quant_method="awq"), "not a packed lbllm model"),
    "group size": (edit_config, lambda c: c["quantization_config"].update(group_size=64), r"group_codes has shape \(\d+, 2\)"),
    "odd group": (edit_config, lambda c: c["quantization_config"].update(group_size=33), "group_size=33"),
    "variant": (edit_config, lambda c: c["quantization_config"].update(act_variant="gauss"), "act_variant='gauss'"),
    "emulated variant": (edit_config, lambda c: c["quantization_config"].update(act_variant="per_group"), "act_variant='per_group'"),
    "e4m3": (edit_config, lambda c: c["quantization_config"].update(level_type="e4m3"), "level_type='e4m3'"),
    "table": (edit_config, lambda c: c["quantization_config"].update(codebook_size=32), r"codebook has shape \(64,\)"),
    "wider": (edit_config, lambda c: c.update(intermediate_size=104), r"has shape .* asks for"),
    "more blocks": (edit_config, lambda c: c.update(num_hidden_layers=3), "is missing"),
    "fewer blocks": (edit_config, lambda c: c.update(num_hidden_layers=1), "not part of this model"),
    "other family": (edit_config, lambda c: c.update(model_type="gpt2"), "does not describe a model"),
    "lost tensor": (edit_tensors, lambda t: t.pop(f"{Q}.row_scale"), f"{Q}.row_scale is missing"),
    "spare tensor": (edit_tensors, lambda t: t.update(spare=torch.zeros(1)), "tensor spare is not part"),
    "type": (edit_tensors, lambda t: t.update({f"{Q}.row_scale": t[f"{Q}.row_scale"].half()}), "row_scale has type torch.float16"),
    "integer norm": (edit_tensors, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}), "a float type"),
    "nan norm": (edit_tensors, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * float("nan")}), "NaN"),
    "level -128": (edit_tensors, lambda t: t[f"{Q}.codebook"].fill_(0x80), rf"{Q}.codebook: levels must be -127\.\.127"),
    "code past the table": (edit_tensors, lambda t: t[f"{Q}.group_codes"].fill_(255), "point into the codebook"),
    "nan scale": (edit_tensors, lambda t: t[f"{Q}.row_scale"].fill_(float("nan")), "row_scale: must be finite"),
    "bad clip": (edit_tensors, lambda t: t["model.layers.1.act_sites.o.factors"].fill_(-1.0), "clip_max"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_folder_that_lies_is_named(lie, folder):
    edit, change, message = LIES[lie]
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_packed(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, 3000, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        load_packed(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_packed(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"quantization_config": 3}'])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_packed(folder)


def test_flipped_header_bytes_never_crash(folder):
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    sound, harmless = load_packed(folder), 0
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, 4000, (60,), generator=generator).tolist():
        broken = bytearray(whole)
        broken[position] ^= 0x41
        path.write_bytes(bytes(broken))
        try:
            model = load_packed(folder)
        except ArtifactError:
            continue
        harmless += 1  # a flip in the metadata entry `format`
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), sound.state_dict().values(), strict=True))
    assert harmless < 5


def test_too_few_blocks_are_refused(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    with pytest.raises(ModelError, match="1 blocks, the teacher 2"):
        pack_student(teacher, make_student(teacher, scheme)[:1], tmp_path, scheme)


def test_a_student_without_factors_gets_the_untrained_ones(scheme, make_teacher, make_student, tmp_path):
    """After stage 1 no site has been trained: the packed model still quantizes activations, with the defaults."""
    teacher = make_teacher()
    states = [dataclasses.replace(s, sites={}) for s in make_student(teacher, scheme)]
    pack_student(teacher, states, tmp_path, scheme)
    assert load_packed(tmp_path).model.layers[0].act_sites["o"].values == ActFactors("piecewise")


def test_kv_bits_are_honoured(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher()
    states = make_student(teacher, scheme)
    for bits in (4, 16):
        pack_student(teacher, states, tmp_path / str(bits), dataclasses.replace(scheme, kv_bits=bits))
    with torch.no_grad():
        four, sixteen = (load_packed(tmp_path / str(bits))(IDS).logits for bits in (4, 16))
    assert 3 < sqnr_db(sixteen, four) < 60


def test_sites_are_shared_by_their_readers(folder):
    model = load_packed(folder)
    block = model.model.layers[0]
    assert block.self_attn.q_proj.site is block.self_attn.v_proj.site is block.act_sites["qkv"]
    assert block.mlp.gate_proj.site is not block.mlp.down_proj.site
    assert sum(isinstance(m, ActSite) for m in model.modules()) == 8

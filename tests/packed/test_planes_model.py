"""W(1+1)A(1x4) as a packed model: with and without INT8 outlier channels it is the emulated one, reloads, and pays for its bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from lbllm_kernels import cpu
from lbllm_kernels.activation import ActFactors
from safetensors.torch import load_file
from test_hf_integration import SCRIPT

from lbllm_core.evaluation.packed_check import check, require
from lbllm_core.export import dequantized
from lbllm_core.model.blocks import SITES, Decoder
from lbllm_core.model.packed import packed_linears
from lbllm_core.model.packed_folder import load_packed, open_packed, pack_student
from lbllm_core.model.student import state_from_tensors, state_tensors
from lbllm_core.model.student_block import fake_quant_block, fake_quant_model
from lbllm_core.quant.weight import dequantize, to_outliers

IDS = torch.arange(1, 41).view(2, 20)
N = 5


@pytest.fixture(params=["explicit", "codebook"])
def mode(request, scheme, explicit_scheme):
    return dataclasses.replace(explicit_scheme if request.param == "explicit" else scheme, act_variant="planes")


@pytest.fixture
def with_outliers(make_student):
    """Random students with planes, and with INT8 channels shared by the linears of a site."""

    def made(teacher, scheme):
        g = torch.Generator().manual_seed(7)
        states = []
        for state in make_student(teacher, scheme):
            sites = {site: ActFactors("planes", 0.95, 0.9, planes=(5, 11, 30, 62)) for site in SITES}
            linears = dict(state.linears)
            if scheme.outlier_channels:
                perms = {columns: torch.randperm(columns, generator=g) for columns in (48, 100)}
                for path, q in linears.items():
                    out, columns = q.codes.shape
                    linears[path] = dataclasses.replace(q, outliers=to_outliers(torch.randn(out, N, generator=g) * 0.3, perms[columns]))
            states.append(dataclasses.replace(state, linears=linears, sites=sites))
        return states

    return made


@pytest.mark.parametrize("outliers", [0, N])
def test_packed_is_emulated(mode, outliers, make_teacher, with_outliers, tmp_path):
    scheme = dataclasses.replace(mode, outlier_channels=outliers)
    teacher = make_teacher("qwen2")
    states = with_outliers(teacher, scheme)
    report = pack_student(teacher, states, tmp_path, scheme)
    packed = load_packed(tmp_path)
    require(*check(open_packed(tmp_path), IDS, Decoder(teacher), lambda i: fake_quant_block(teacher.model.layers[i], states[i], 16)), 60)
    paths = {linear.prepared.choice.path for _, linear in packed_linears(packed)}
    reasons = {linear.prepared.choice.reason for _, linear in packed_linears(packed)}
    assert ("outliers" in report.bits.items) == (outliers > 0)
    if outliers:
        assert paths == {"reference"}
        assert reasons == {cpu.library().reason if cpu.library().functions is None else "INT8 outlier channels"}
        linears = [linear for _, linear in packed_linears(packed)]
        assert report.bits.items["outliers"] == sum(8 * m.out_features * N + 32 * m.out_features + 32 * m.in_features for m in linears)
    name, linear = next(packed_linears(packed))
    assert torch.equal(dequantized(tmp_path).get_submodule(name).weight, dequantize(states[0].linears[name.partition("layers.0.")[2]]))
    assert linear.site.values.planes == (5, 11, 30, 62)


@pytest.mark.parametrize("outliers", [0, N])
def test_a_fresh_process_gives_the_same_logits(mode, outliers, make_teacher, with_outliers, tmp_path):
    scheme = dataclasses.replace(mode, outlier_channels=outliers)
    teacher = make_teacher("qwen2")
    pack_student(teacher, with_outliers(teacher, scheme), tmp_path / "packed", scheme)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "packed"), str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, theirs = load_packed(tmp_path / "packed"), load_file(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs["logits"])
        assert torch.equal(model.generate(torch.arange(1, 9)[None], max_new_tokens=6, do_sample=False), theirs["tokens"])
        assert torch.equal(model(IDS).logits, model.to(torch.float32)(IDS).logits)


def test_without_activations_the_weights_are_the_same(mode, make_teacher, with_outliers, tmp_path):
    scheme = dataclasses.replace(mode, outlier_channels=N)
    teacher = make_teacher()
    states = with_outliers(teacher, scheme)
    pack_student(teacher, states, tmp_path, scheme)
    plain = fake_quant_model(teacher, [dataclasses.replace(state, sites={}) for state in states], 16)
    view = load_packed(tmp_path, activations=False, keep_16_bits=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(view.get_input_embeddings().weight)
        assert torch.allclose(view(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_block_file_keeps_planes_and_outliers(mode, make_teacher, with_outliers):
    scheme = dataclasses.replace(mode, outlier_channels=N)
    state = with_outliers(make_teacher(), scheme)[0]
    again = state_from_tensors(state_tensors(state), "planes")
    assert {site: torch.tensor(f.numbers()).tolist() for site, f in state.sites.items()} == {site: f.numbers() for site, f in again.sites.items()}
    for path, q in state.linears.items():
        assert torch.equal(dequantize(again.linears[path]), dequantize(q))
        assert again.linears[path].outliers.perm.dtype == torch.int32


def test_compiled_is_eager(mode, make_teacher, with_outliers, tmp_path):
    scheme = dataclasses.replace(mode, outlier_channels=N)
    teacher = make_teacher()
    pack_student(teacher, with_outliers(teacher, scheme), tmp_path, scheme)
    packed = load_packed(tmp_path)
    linear = packed.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(3, linear.in_features)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(linear, backend="eager")(x), linear(x), rtol=1e-5)

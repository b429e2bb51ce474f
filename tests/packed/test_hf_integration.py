"""`from_pretrained` in a fresh process, after nothing but `import lbllm_core`: the same logits, and no trust in the folder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm_core.errors import ArtifactError
from lbllm_core.model import hf_integration
from lbllm_core.model.packed_folder import load_packed, pack_student

IDS = torch.arange(1, 41).view(2, 20)

SCRIPT = """
import sys
import lbllm_core
from lbllm_core.model.hf_integration import register_on_import
register_on_import()
assert "torch" not in sys.modules and "transformers" not in sys.modules, "importing must stay cheap"
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(1, 41).view(2, 20)).logits
    tokens = model.generate(torch.arange(1, 9)[None], max_new_tokens=6, do_sample=False)
save_file({"logits": logits, "tokens": tokens}, sys.argv[2])
"""


@pytest.fixture
def folder(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher("qwen2")
    pack_student(teacher, make_student(teacher, scheme), tmp_path / "packed", dataclasses.replace(scheme, kv_bits=4))
    hf_integration.register()
    return tmp_path / "packed"


def from_pretrained(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_fresh_process_gives_the_same_logits(folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out")
    model = load_packed(folder)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs["logits"])
        assert torch.equal(model.generate(torch.arange(1, 9)[None], max_new_tokens=6, do_sample=False), theirs["tokens"])


def test_saving_round_trips(folder, tmp_path):
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_half_precision_keeps_the_format(folder):
    model = from_pretrained(folder, dtype=torch.bfloat16)
    linear = model.model.layers[0].self_attn.q_proj
    assert linear.row_scale.dtype == torch.float32
    assert torch.equal(linear.row_scale, load_packed(folder).model.layers[0].self_attn.q_proj.row_scale)
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.bfloat16


def test_a_missing_tensor_is_not_made_up(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.row_scale")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"up_proj\.row_scale is missing"):
        from_pretrained(folder)


def test_a_newer_version_is_refused(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["format_version"] = 9
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="newer than 1"):
        from_pretrained(folder)


def test_broken_levels_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.o_proj.codebook"].fill_(0x80)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"o_proj\.codebook"):
        from_pretrained(folder)

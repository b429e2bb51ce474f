"""Folders that are damaged or hostile: flipped bits, junk in config.json, code beside the weights, paths that lead outside."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lbllm_core.errors import ArtifactError
from lbllm_core.model import hf_integration
from lbllm_core.model.packed_folder import load_packed, load_tokenizer, pack_student


@pytest.fixture(scope="module")
def sound(tmp_path_factory, scheme, make_teacher, make_student):
    folder = tmp_path_factory.mktemp("sound")
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), folder, scheme)
    hf_integration.register()
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "packed")
    return tmp_path / "packed"


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_any_flipped_bit_of_the_weights_is_found(folder):
    """In both ways of loading, with the tensor's name. A code with another bit would be a valid, wrong weight."""
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    for turn in range(60):
        broken = bytearray(whole)
        broken[rng.randrange(start, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(broken))
        for load in (load_packed, from_pretrained) if turn % 10 == 0 else (load_packed,):
            with pytest.raises(ArtifactError, match=r"bytes of tensor [\w.]+ are not those that were written|NaN or infinity"):
                load(folder)


def test_checksums_travel_with_saving(folder, tmp_path):
    from_pretrained(folder).save_pretrained(tmp_path / "again")
    with safe_open(folder / "model.safetensors", "pt") as a, safe_open(tmp_path / "again" / "model.safetensors", "pt") as b:
        ours, theirs = json.loads(a.metadata()["crc32"]), json.loads(b.metadata()["crc32"])
        assert set(ours) == set(a.keys())
    assert {name: theirs[name] for name in ours} == ours
    load_packed(tmp_path / "again")


@pytest.mark.parametrize("entry", ["", "{", "[1]", '{"a": "b"}', "3"])
def test_unreadable_checksums_are_refused(folder, entry):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "crc32": entry})
    with pytest.raises(ArtifactError, match="checksums cannot be read"):
        load_packed(folder)


JUNK = [None, 0, -1, 3, 1 << 20, 1 << 40, 1.5, float("nan"), "", "x", [], {}, [1], {"a": 1}, True, "llama", "../../etc", 1e308]


def test_junk_in_the_config_is_a_sentence_or_harmless(folder):
    """Seeded mutations: each loads and runs, or is an ArtifactError; nothing hangs, nothing else escapes."""
    path = folder / "config.json"
    good = json.loads(path.read_text())
    rng = random.Random(7)
    refused = 0
    for _ in range(250):
        values = json.loads(json.dumps(good))
        key = rng.choice(list(values))
        if key == "quantization_config":
            values[key][rng.choice(list(values[key]))] = rng.choice(JUNK)
        elif rng.random() < 0.2:
            del values[key]
        else:
            values[key] = rng.choice(JUNK)
        path.write_text(json.dumps(values))
        try:
            model = load_packed(folder)
        except ArtifactError:
            refused += 1
            continue
        with torch.no_grad():
            assert model(torch.arange(1, 9)[None]).logits.shape == (1, 8, 90)
    assert 100 < refused < 250


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1 << 40), ("head_dim", 1 << 40), ("vocab_size", -1), ("hidden_size", "48"), ("num_attention_heads", 0)])
def test_sizes_that_no_file_could_fill_are_named(folder, key, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=f"{key}={value!r} cannot be"):
        load_packed(folder)


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_in_the_folder_is_not_run(folder, model_type, tmp_path):
    """`auto_map` asks transformers to import modules from the folder: refused or passed over, never run."""
    mark = tmp_path / "ran"
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    path = folder / "config.json"
    auto_map = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map, "model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}))
    (folder / "tokenizer.json").write_text("{}")
    if model_type == "llama":
        load_packed(folder)
    else:
        with pytest.raises(ArtifactError, match="does not describe a model"):
            load_packed(folder)
    with pytest.raises(ArtifactError, match="no tokenizer that can be read"):
        load_tokenizer(folder)
    assert not mark.exists()


@pytest.mark.parametrize("target", ["../secret.safetensors", "/tmp/secret.safetensors"])
def test_an_index_that_leads_outside_is_refused(folder, target, tmp_path):
    """Sharded weights come with an index of file names, which transformers joins to the folder as they are."""
    tensors = load_file(folder / "model.safetensors")
    outside = str(tmp_path / "secret.safetensors") if target.startswith("/") else target
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, outside)}))
    with pytest.raises(ArtifactError, match="outside of the folder"):
        from_pretrained(folder)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        load_packed(folder)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_generation_config(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"generation_config\.json cannot be read"):
        load_packed(folder)

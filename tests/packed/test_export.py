"""What users take home: the card, text from the newest packed model, a checkpoint for other engines; and clear words when it cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm_core import export, generate, newest
from lbllm_core.errors import ArtifactError
from lbllm_core.model.card import Origin, Result, with_results
from lbllm_core.model.packed_folder import load_packed, pack_student
from lbllm_core.model.tiny import tokenizer as tiny_tokenizer

ORIGIN = Origin("toy", "package toy.gguf", "Apache-2.0", "synthetic, 64 sequences of 128 tokens, seed 0", {"ptq_init": "method=em", "act_quant": "epochs=1"})


@pytest.fixture
def packed(scheme, make_teacher, make_student, tmp_path):
    teacher = make_teacher("qwen2", tied=False)
    pack_student(teacher, make_student(teacher, scheme), tmp_path / "packed", dataclasses.replace(scheme, kv_bits=4), tiny_tokenizer(), ORIGIN)
    return tmp_path / "packed"


def manifest(folder, step, digest, upstream=(), metrics=(), finished="2026-01-01T00:00:00+00:00", fields=()):
    """A finished artifact, as far as readers of manifests look."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "schema": 1, "handle": {"step": step, "key": "k" * 64, "digest": digest, "metrics": dict(metrics)}, "parts": {"fields": dict(fields)},
        "upstream": {role: {"digest": d} for role, d in dict(upstream).items()}, "files": {}, "finished": finished,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.fixture
def home(packed, tmp_path):
    """A home folder with a finished run: the packed model, its evaluation, the teacher's."""
    artifacts = tmp_path / "home" / "artifacts"
    manifest(artifacts / "pack_and_benchmark" / "old", "pack_and_benchmark", "d0")
    shutil.copytree(packed, artifacts / "pack_and_benchmark" / "new" / "packed")
    manifest(artifacts / "pack_and_benchmark" / "new", "pack_and_benchmark", "d1", finished="2026-02-01T00:00:00+00:00", fields={"model.source": "synthetic"})
    manifest(artifacts / "evaluate_model" / "a", "evaluate_model", "d2", {"packed": "d1", "teacher": "d3"}, {"ppl_embedded_16k": 62.97, "acc_piqa_n200": 0.52})
    manifest(artifacts / "evaluate_model" / "b", "evaluate_model", "d4", {"packed": "d0", "teacher": "d3"}, {"ppl_embedded_16k": 1.0})
    manifest(artifacts / "evaluate_teacher" / "a", "evaluate_teacher", "d3", {}, {"ppl_embedded_16k": 19.04})
    return tmp_path / "home"


def test_the_card_says_what_it_is(packed):
    text = (packed / "README.md").read_text()
    for word in ("license: apache-2.0", "toy, binarized to W(1+1)A4", "package toy.gguf", "Apache-2.0", "synthetic, 64 sequences of 128 tokens", "- `ptq_init`: method=em",
                 "| row scales |", "from_pretrained(FOLDER)", "piecewise", "cache: 4 bits", "## Limits", "measured after it is packed"):  # fmt: skip
        assert word in text, word
    bits = next(line for line in text.splitlines() if line.startswith("| all |"))
    assert 2.25 < float(bits.split("|")[2]) < 8


def test_the_five_lines_of_the_card_work(packed, tmp_path):
    """In a fresh process, in an empty folder."""
    text = (packed / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", f"FOLDER = {str(packed)!r}\n{code}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(" ", "").startswith("ThecapitalofFranceis")  # the toy tokenizer drops spaces


def test_results_are_put_in_once_they_are_known(home, tmp_path, capsys):
    assert export.main(["--format", "packed", "--out", str(tmp_path / "out"), "--home", str(home)]) == 0
    assert "2 measured figures" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| `ppl_embedded_16k` | 19.04 | 62.97 |" in text
    assert "| `acc_piqa_n200` |  | 0.52 |" in text
    assert "measured after it is packed" not in text
    source = home / "artifacts" / "pack_and_benchmark" / "new" / "packed"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "measured after it is packed" in (source / "README.md").read_text()
    load_packed(tmp_path / "out")


def test_results_only_change_their_place():
    text = "a\n<!-- results -->\nnot yet\n<!-- results -->\nb\n"
    assert with_results(text, [Result("ppl", 2.0, 1.5)], "From a run.") == "a\n| protocol | teacher | this model |\n|---|---:|---:|\n| `ppl` | 1.5 | 2 |\n\nFrom a run.\nb\n"


def test_a_model_without_evaluation_is_exported_without_results(packed, tmp_path, capsys):
    assert export.main(["--format", "packed", "--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path / "h")]) == 0
    assert "no evaluation of this model" in capsys.readouterr().out
    assert "measured after it is packed" in (tmp_path / "out" / "README.md").read_text()


def test_bf16_is_an_ordinary_checkpoint(packed, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export.main(["--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path / "h")]) == 0
    assert "activations are not quantized there" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert not [name for name in tensors if "codes" in name or "act_sites" in name]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        theirs, ours = plain(ids).logits, load_packed(packed, activations=False)(ids).logits
    assert 30 < 20 * torch.log10(ours.norm() / (ours - theirs).norm()) < 80
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It is not the packed model" in card
    assert "Verified when it was made" in card
    assert "license: apache-2.0" in card


def test_a_wrong_export_is_not_kept(packed, tmp_path, monkeypatch, capsys):
    right = export.dequantized

    def wrong(folder):
        model = right(folder)
        model.model.layers[1].mlp.up_proj.weight.mul_(1.2)
        return model

    monkeypatch.setattr(export, "dequantized", wrong)
    assert export.main(["--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path / "h")]) == 1
    assert "model.layers.1.mlp.up_proj is not the packed weight; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_export_below_the_tolerance_is_not_kept(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "MIN_SQNR_DB", 90.0)
    assert export.main(["--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path / "h")]) == 1
    assert "below 90; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_touched(packed, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert export.main(["--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path / "h")]) == 1
    assert "exists already; choose another OUT" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_the_a16_view_is_the_dequantized_product(packed):
    view = load_packed(packed, activations=False)
    q = view.model.layers[0].self_attn.q_proj
    assert q.prepared.choice.reason == "activations are not quantized"
    from lbllm_kernels.format import dequantize

    x = torch.randn(3, 48)
    assert torch.equal(q(x), torch.nn.functional.linear(x, dequantize(q.packed()), q.bias))


def test_the_newest_finished_model_is_found(home, packed):
    assert newest.packed_folder(home) == home / "artifacts" / "pack_and_benchmark" / "new" / "packed"
    assert newest.packed_folder(home, str(packed)) == packed
    assert newest.packed_folder(home, str(packed.parent)) == packed
    with pytest.raises(ArtifactError, match="holds no model"):
        newest.packed_folder(home, str(home))


def test_generate_prints_and_ends(home, capsys):
    assert generate.main(["--prompt", "abc", "--tokens", "5", "--home", str(home)]) == 0
    out = capsys.readouterr()
    assert "tokens in" in out.err
    assert generate.main(["--prompt", "abc", "--tokens", "5", "--temperature", "0.9", "--seed", "3", "--home", str(home)]) == 0


@pytest.mark.parametrize(("prompt", "words"), [("", "the prompt is empty"), ("a" * 128, "fills the model's context of 128")])
def test_prompts_that_cannot_be(home, prompt, words, capsys):
    assert generate.main(["--prompt", prompt, "--home", str(home)]) == 2
    assert words in capsys.readouterr().err


def test_without_a_model_it_says_what_to_run(tmp_path, capsys):
    assert generate.main(["--prompt", "abc", "--home", str(tmp_path)]) == 1
    assert "run `make run` first" in capsys.readouterr().err
    assert export.main(["--out", str(tmp_path / "x"), "--home", str(tmp_path)]) == 1


def test_a_folder_without_a_tokenizer_says_so(packed, capsys, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (packed / name).unlink()
    assert generate.main(["--prompt", "abc", "--model-dir", str(packed), "--home", str(tmp_path)]) == 1
    assert "has no tokenizer; copy" in capsys.readouterr().err
    assert export.main(["--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path)]) == 0


def test_a_damaged_model_is_not_passed_on(packed, tmp_path, capsys):
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.row_scale"].fill_(float("nan"))
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    assert export.main(["--format", "packed", "--out", str(tmp_path / "out"), "--model-dir", str(packed), "--home", str(tmp_path)]) == 1
    assert "row_scale: must be finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_decode_record_has_its_schema(home, tmp_path, monkeypatch):
    from lbllm_core.evaluation import decode_record, speed

    monkeypatch.setenv("LBLLM_HOME", str(home))
    figures = dict.fromkeys(decode_record.UNITS, 2.0) | {"prefill_tokens": 100.0, "threads": 2.0}
    monkeypatch.setattr(speed, "measure_packed", lambda *a: figures | {"decode_tok_s": 9.0})
    asked = []
    monkeypatch.setattr(speed, "measure_teacher", lambda config, *a: asked.append(config) or figures)
    assert decode_record.main(["--out", str(tmp_path / "decode.json")]) == 0
    assert asked[0].source == "synthetic"
    content = json.loads((tmp_path / "decode.json").read_text())
    assert content["schema"] == 1
    engines = {(r["engine"], r["name"]): r for r in content["records"]}
    assert engines["packed", "decode_tok_s"]["value"] == 9.0
    assert engines["fp32", "weights_gb"] | {"shape": "smollm2_135m", "batch": 1, "context": 100, "unit": "GB"} == engines["fp32", "weights_gb"]

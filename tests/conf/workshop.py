"""What the bad inputs are made of: model folders and texts that are each wrong in one way, and the ways to type them."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbllm_core.model import tiny


@dataclass(frozen=True)
class Bad:
    """One thing a person types. `{w}` in `typed` and `said` is the workshop's folder; `command`: `flow`, `core` or `run`.

    `flow` is `make preflight`, `core` is `python -m lbllm_core.run`, `run` is `make run`; all refuse alike. `env` changes the environment
    (None: unset).
    """

    typed: tuple[str, ...]
    said: tuple[str, ...]
    code: int = 2
    command: str = "flow"
    env: dict[str, str | None] = field(default_factory=dict)


def folder(name: str, *more: str) -> tuple[str, ...]:
    """Overrides that take the model folder `name` of the workshop with the tiny recipe."""
    return ("experiment=tiny", "model.name=mine", "model.source=folder", f"model.path={{w}}/{name}", *more)


def text(name: str, *more: str) -> tuple[str, ...]:
    """Overrides that take the text file `name` of the workshop with the tiny recipe."""
    return ("model=tiny", "dataset.name=mine", "dataset.source=files", f"dataset.files={name if name.startswith('/') else '{w}/' + name}", *more)


def build(w: Path) -> None:
    """Fill the folder with everything that the table names."""
    _models(w)
    (w / "empty.txt").write_text("")
    (w / "blank.txt").write_text(" \n\n \n")
    (w / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (w / "short.txt").write_text("Too short by far.")
    (w / "wide.txt").write_text("ü" * 5000, encoding="utf-8")  # bytes enough for 64 x 128 tokens, characters not
    (w / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (w / "column.jsonl").write_text('{"body": "fine", "title": "t"}\n')
    (w / "list.jsonl").write_text("[1, 2]\n")
    (w / "number.jsonl").write_text('{"text": 5}\n')
    (w / "garbage.parquet").write_bytes(b"PAR1 but not really")
    (w / "notes.docx").write_bytes(b"PK")
    (w / "no.json").write_text("{")
    (w / "list.json").write_text("[]")
    (w / "keys.json").write_text('{"scheme": {"bits": 2}, "sceme": {}}')
    (w / "file").write_text("")
    (w / "data").mkdir()


def _models(w: Path) -> None:
    good = w / "good"
    tiny.untrained(0).save_pretrained(good)
    tiny.tokenizer().save_pretrained(good)
    config: dict[str, Any] = json.loads((good / "config.json").read_text())

    def copy(name: str, **changes: Any) -> Path:
        made = w / name
        shutil.copytree(good, made)
        (made / "config.json").write_text(json.dumps(config | changes))
        return made

    (copy("no_weights") / "model.safetensors").unlink()
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = copy("truncated") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (copy("garbage") / "model.safetensors").write_bytes(b"not at all a tensor file")
    (copy("zero") / "model.safetensors").write_bytes(b"")
    lost = copy("lost_shard")
    (lost / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    copy("code", auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}, model_type="mine")
    (w / "code" / "modeling_mine.py").write_text("raise SystemExit('this must never run')\n")
    copy("unknown", model_type="mamba9000")
    copy("translator", model_type="t5", architectures=["T5ForConditionalGeneration"])
    copy("mixture", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=2, num_experts_per_tok=1)
    copy("fused", model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=64, n_layer=2, n_head=4)
    copy("quantized", quantization_config={"quant_method": "gptq", "bits": 4})
    (copy("no_json") / "config.json").write_text("{broken")
    (copy("json_list") / "config.json").write_text("[]")
    (copy("no_config") / "config.json").unlink()
    copy("small_vocabulary", vocab_size=50)
    _write_header(w / "small_vocabulary" / "model.safetensors")
    for file in copy("no_tokenizer").glob("tokenizer*"):
        file.unlink()
    (w / "gguf").mkdir()
    (w / "gguf" / "garbage.gguf").write_bytes(b"this is text and no model file at all")
    (w / "gguf" / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 300, 20) + b"\x05")
    (w / "gguf" / "empty.gguf").write_bytes(b"")
    (w / "gguf" / "weights.bin").write_bytes(b"")
    (w / "empty_folder").mkdir()


def _write_header(file: Path) -> None:
    """A sound file of one small tensor: what is wrong is found before its content matters."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)

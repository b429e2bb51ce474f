"""The whole pipeline with models that are never whole: the same bytes and figures as with models that are, and at most two blocks alive."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flows.compose import compose
from lbllm_core.config import RunConfig
from lbllm_core.engine import machine
from lbllm_core.engine.artifacts import prepare_home
from lbllm_core.engine.machine import Limits
from lbllm_core.evaluation import last_states, offline_tasks, request_scores
from lbllm_core.evaluation.choice_scores import score
from lbllm_core.evaluation.last_states import Streamed
from lbllm_core.evaluation.perplexity import forward_of, perplexity
from lbllm_core.evaluation.request_file import read_requests
from lbllm_core.model import load, packed_folder, student_block, tiny
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.packed_folder import load_packed, open_packed
from lbllm_core.model.streamed import StreamedBlocks, StreamedDecoder
from lbllm_core.run import run_pipeline

CPU = torch.device("cpu")
QUICK = ["model=tiny", "end_to_end=off", "pack.benchmark=false", "pack.sample_tokens=4", "dataset.sequences=16", "ptq_init.sequences=16", "weight_distill.sequences=16", "act_quant.sequences=16", "tracking.enabled=false", "evaluation.baselines=[]"]
TASKS = ["evaluation.tasks=[piqa]", "evaluation.task_limit=6"]
BLOCKS = 6


def quiet(_):
    pass


def home_of(folder: Path, models_home: Path) -> Path:
    shutil.copytree(models_home / "models", folder / "models")
    return prepare_home(folder)


def run(home: Path, *words: str):
    finished = run_pipeline(compose([*QUICK, *words]), home, quiet)
    packed = next(f.handle.folder(home) for f in finished if f.handle.step == "pack_and_benchmark")
    return packed, [(f.handle.step, f.handle.key, f.handle.digest, dict(f.handle.metrics)) for f in finished]


@pytest.fixture(scope="module")
def both(models_home, tiny_teacher, tmp_path_factory):
    """`{streaming: (folder of the packing step, handles)}` of two homes that share nothing but the teacher."""
    return {word: run(home_of(tmp_path_factory.mktemp(word), models_home), *TASKS, f"hardware.streaming={word}") for word in ("on", "off")}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("manifest.json", "timing.json")}


def test_the_same_bytes_and_figures(both):
    (streamed, on), (whole, off) = both["on"], both["off"]
    made = contents(streamed)
    assert made == contents(whole)
    assert {"packed/model.safetensors", "packed/config.json", "packed/generation_config.json", "packed/README.md", "samples.json", "packing.json"} <= made.keys()
    assert on == off, "every step: the same key, digest and figures, perplexity and accuracies among them"
    assert {"ppl_synthetic", "acc_piqa_n6"} <= {name for *_, metrics in on for name in metrics}


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory) -> Path:
    """A teacher with enough blocks to tell one from all; its head is not tied, and it is stored in bf16."""
    folder = tmp_path_factory.mktemp("six") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0)).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def words_for(folder: Path) -> list[str]:
    shorter = [f"{name}.sequences=4" for name in ("dataset", "ptq_init", "weight_distill", "act_quant")]
    return ["model.source=folder", f"model.path={folder}", "model.name=six", "model.expected={}", "scheme.codebook_size=32", "weight_distill.enabled=false", *shorter]


def alive() -> int:
    """Blocks with weights anywhere in this process."""
    gc.collect()
    blocks = [b for b in gc.get_objects() if type(b) is LlamaDecoderLayer]
    return sum(any(not t.is_meta for t in (*b.parameters(), *b.buffers())) for b in blocks)


def test_never_more_than_two_blocks_and_no_room_for_more(six_blocks, tmp_path, monkeypatch, caplog):
    """On a machine without memory to speak of, streams lie on disk, and what needs a whole model is left out with a sentence."""
    before, fetched, copied, blocks = alive(), [], [], weakref.WeakSet()

    def counted(make, counts):
        """Every block with weights comes from one of the two functions that this is wrapped around."""

        def made(*arguments):
            block = make(*arguments)
            blocks.add(block)
            counts.append(len(blocks))
            return block

        return made

    def whole(*_, **__):
        raise AssertionError("a whole model was loaded")

    monkeypatch.setattr(StreamedBlocks, "__getitem__", counted(StreamedBlocks.__getitem__, fetched))
    monkeypatch.setattr(student_block, "_copy_without_linears", counted(student_block._copy_without_linears, copied))
    monkeypatch.setattr(load, "_load_model", whole)
    monkeypatch.setattr(packed_folder, "load_packed", whole)
    monkeypatch.setattr(machine, "limits", lambda *_: Limits(10**9, 1, 0, 0, 10**12))
    packed, handles = run(prepare_home(tmp_path), *words_for(six_blocks), "hardware.streaming=on", "pack.benchmark=true")
    assert len(fetched) == BLOCKS * (1 + 2 + 1 + 2 + 1)  # teacher's evaluation, two stages, writing, teacher and packed block in the check, evaluation
    assert len(copied) >= BLOCKS * (1 + 1 + 1)  # students of the stages, fake-quantized blocks of the check
    assert max(fetched) <= 2, fetched
    assert max(copied) <= 2, copied
    figures = {name: value for *_, metrics in handles for name, value in metrics.items()}
    assert figures["pack/integer_mismatches"] == 0
    assert not any(name.startswith("speed/") for name in figures)
    assert not (packed / "samples.json").exists()
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert [line.partition(":")[0] for line in told] == ["sample texts of teacher and packed model", "speed of the packed model", "speed of the teacher"]
    assert not list((tmp_path / "streams").glob("*")), "hidden states are scratch"
    monkeypatch.undo()
    assert alive() == before
    assert len(load_packed(packed / "packed").model.layers) == BLOCKS


def test_six_blocks_are_the_same_whole_and_streamed(six_blocks, tmp_path):
    for word in ("on", "off"):
        run(prepare_home(tmp_path / word), *words_for(six_blocks), f"hardware.streaming={word}")
    made, expected = (contents(next((tmp_path / word / "artifacts" / "pack_and_benchmark").glob("*/packed"))) for word in ("on", "off"))
    assert made == expected


def test_killed_while_it_writes_and_continued(six_blocks, tmp_path):
    """Killed after the second block was asked for: no packed model is there, and the next run makes the one that an undisturbed run makes."""
    driver = Path(__file__).parents[1] / "resume" / "killed_run.py"
    stages = ["act_quant.enabled=false", "end_to_end.enabled=false", "pack.benchmark=false", "pack.sample_tokens=0"]
    words = [word for word in words_for(six_blocks) if "expected" not in word] + ["hardware.streaming=on", *stages]

    def launch(home, step, units):
        command = [sys.executable, str(driver), str(home), step, str(units), "0", *words]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, timeout=300)

    undisturbed = launch(tmp_path / "undisturbed", "none", 0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = launch(tmp_path / "killed", "pack_and_benchmark", 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = (p for p in (tmp_path / "killed" / "artifacts" / "pack_and_benchmark").iterdir() if p.is_dir())
    assert not (folder / "manifest.json").exists()
    (folder / "packed").mkdir(exist_ok=True)
    (folder / "packed" / ".model.safetensors.pieces.tmp").write_bytes(b"left by the first attempt")
    again = launch(tmp_path / "killed", "none", 0)
    first, second = (json.loads(done.stdout.splitlines()[-1]) for done in (undisturbed, again))
    assert [entry[:3] for entry in first] == [entry[:3] for entry in second]
    assert not list(folder.rglob("*.tmp"))


def streamed_models(both, models_home):
    packed = both["off"][0] / "packed"
    folder = load.teacher_folder(RunConfig().model, models_home)
    return {"teacher": StreamedDecoder(folder, CPU), "packed": open_packed(packed)}, {"packed": load_packed(packed)}


@pytest.mark.parametrize("wave", [1 << 20, 300])
def test_scores_and_perplexity_are_equal_to_the_bit(both, models_home, tiny_teacher, monkeypatch, wave):
    """Shared inputs with branches, padding, truncation, and more tokens than a wave holds."""
    monkeypatch.setattr(last_states, "WAVE_TOKENS", wave)
    streamed, whole = streamed_models(both, models_home)
    whole["teacher"] = tiny_teacher.model
    g = torch.Generator().manual_seed(0)
    shared = torch.randint(1, 90, (20,), generator=g).tolist()
    pairs = [(shared, torch.randint(1, 90, (n,), generator=g).tolist()) for n in (5, 9, 1)]
    pairs += [(torch.randint(1, 90, (n,), generator=g).tolist(), [7, 8]) for n in (3, 40, 125, 9)]
    windows = torch.randint(1, 90, (7, 50), generator=g)
    for name, decoder in streamed.items():
        assert score(Streamed(decoder, CPU), pairs, 128, 200) == score(whole[name], pairs, 128, 200)
        ours, theirs = (perplexity(forward_of(model, windows, 120), windows, 120) for model in (Streamed(decoder, CPU), whole[name]))
        assert ours == theirs
        assert theirs == perplexity(lambda ids, model=whole[name]: model(ids, use_cache=False).logits, windows, 120)


def test_requests_are_scored_alike(both, models_home, tmp_path, monkeypatch):
    monkeypatch.delenv("LBLLM_DATA", raising=False)
    offline_tasks.build(RunConfig(), models_home, tmp_path / "requests", ("piqa",), 4)
    asked, packed = read_requests(tmp_path / "requests"), both["off"][0] / "packed"
    for folder in (None, packed):
        made = []
        for word in ("on", "off"):
            config = RunConfig(hardware=dataclasses.replace(RunConfig().hardware, streaming=word))
            made.append(request_scores.score_model(config, models_home, asked, tmp_path / f"{word}{folder is None}", folder))
        assert torch.equal(made[0].values, made[1].values)
        assert torch.equal(made[0].greedy, made[1].greedy)


@pytest.mark.parametrize("tied", [True, False])
def test_what_lies_outside_of_the_blocks(tmp_path, tied):
    """Names, values and logits of a streamed decoder are those of the whole one; two different tables under one tie are refused."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    streamed, whole = StreamedDecoder(tmp_path, CPU), Decoder(model)
    for _ in range(2):  # before and after it was used
        ours, theirs = list(streamed.outside()), list(whole.outside())
        assert sorted((name, large) for name, _, large in ours) == sorted((name, large) for name, _, large in theirs)
        assert all(torch.equal(tensor, {n: t for n, t, _ in theirs}[name]) for name, tensor, _ in ours)
        ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
        assert torch.equal(streamed.forward(ids), model(ids, use_cache=False).logits)
        streamed.embedded()
        assert sum(p.numel() for p in streamed.model.parameters()) == sum(p.numel() for p in model.parameters())
    if tied:
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        for factor in (1, 2):
            save_file(tensors | {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}, file, {"format": "pt"})
            if factor == 1:
                assert torch.equal(StreamedDecoder(tmp_path, CPU).forward(ids), model(ids, use_cache=False).logits)
        with pytest.raises(load.ModelError, match="two different ones"):
            StreamedDecoder(tmp_path, CPU).forward(ids)

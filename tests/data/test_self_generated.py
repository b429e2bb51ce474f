"""Text that the teacher writes: same seed, same tokens; a continuation without a cache would have been the same; degenerate text is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lbllm_core import pipeline
from lbllm_core.config import DatasetConfig, HardwareConfig, RunConfig, problems
from lbllm_core.data import self_generated, tokens
from lbllm_core.errors import DataError, GateError
from lbllm_core.run import run_pipeline

SMALL = DatasetConfig(name="self_generated", source="self_generated", sequences=20, seq_len=32)


def config(seed: int = 0, **values: object) -> RunConfig:
    return RunConfig(seed=seed, dataset=dataclasses.replace(SMALL, **values), hardware=HardwareConfig(device="cpu"))  # type: ignore[arg-type]


@pytest.fixture
def written(tiny_teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home whose teacher is the one that is already loaded."""
    monkeypatch.setattr(self_generated, "load_teacher", lambda *_: tiny_teacher)
    monkeypatch.setattr(self_generated, "teacher_digest", lambda *_: tiny_teacher.digest)
    return tmp_path


def test_same_seed_same_tokens_in_another_home(written: Path, tiny_teacher) -> None:
    first, again, other = (self_generated.generated_tokens(config(seed), written / name) for seed, name in ((0, "a"), (0, "b"), (1, "a")))
    assert first.shape == (20, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert self_generated.generated_digest(config(0), written / "a") == self_generated.generated_digest(config(0), written / "b")
    assert self_generated.generated_digest(config(1), written / "a") != self_generated.generated_digest(config(0), written / "a")
    assert torch.equal(tokens.calibration_tokens(config(0), tiny_teacher.tokenizer, written / "a"), first)


def test_more_sequences_begin_with_the_fewer(written: Path) -> None:
    few, many = (self_generated.generated_tokens(config(sequences=n), written) for n in (5, 40))
    assert torch.equal(many[:5], few)


def test_sampling_follows_the_model(tiny_teacher) -> None:
    """Against the definition without a cache: at a temperature near zero each token is the most likely one allowed."""
    model = tiny_teacher.model
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    allowed[0] = False
    first = torch.tensor([[5, 6, 7], [9, 3, 4]])
    ids = self_generated.sample(model, first, 24, 1e-4, allowed, torch.rand(2, 21))
    wanted = first
    while wanted.shape[1] < 24:
        logits = model(input_ids=wanted, use_cache=False).logits[:, -1].clone()
        logits[:, 0] = float("-inf")
        wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, wanted)
    hot = self_generated.sample(model, first.repeat(50, 1), 8, 5.0, allowed, torch.rand(100, 5))
    assert not bool((hot == 0).any())
    assert len(hot[:, 3].unique()) > 20


def test_no_special_token_and_a_bos_where_the_model_wants_one(written: Path, tiny_teacher) -> None:
    ids = self_generated.generated_tokens(config(), written)
    assert not set(ids.flatten().tolist()) & set(tiny_teacher.tokenizer.all_special_ids)
    assert (written / "texts").is_dir()


def test_distinct_shares() -> None:
    looping = torch.tensor([[1, 2, 3, 4] * 8, [1, 2, 3, 4] * 8])
    assert self_generated.distinct_shares(looping) == {"distinct_4": 4 / 29, "distinct_sequences": 0.5}
    varied = torch.arange(64).reshape(2, 32)
    assert self_generated.distinct_shares(varied) == {"distinct_4": 1.0, "distinct_sequences": 1.0}


def test_degenerate_text_is_refused_with_its_number_and_the_limit(written: Path) -> None:
    cold = config(sequences=64, temperature=0.01, min_distinct=0.95)
    with pytest.raises(DataError, match=r"distinct_\w+ is 0\.\d+.*limit dataset\.min_distinct is 0\.95"):
        self_generated.generated_digest(cold, written)
    self_generated.generated_digest(dataclasses.replace(cold, dataset=dataclasses.replace(cold.dataset, min_distinct=0.1)), written)


def test_damaged_text_is_written_again(written: Path) -> None:
    before = self_generated.generated_tokens(config(), written)
    (file,) = written.glob("texts/*/tokens.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert torch.equal(self_generated.generated_tokens(config(), written), before)


def test_the_digest_is_in_the_steps_keys(written: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher) -> None:
    monkeypatch.setattr("lbllm_core.model.load.teacher_digest", lambda *_: tiny_teacher.digest)
    facts = [pipeline.facts(pipeline.SPECS["ptq_init"], config(seed), written) for seed in (0, 1)]
    assert facts[0]["self-generated text"] == self_generated.generated_digest(config(0), written)
    assert facts[0]["self-generated text"] != facts[1]["self-generated text"]
    assert "calibration text" not in facts[0]


def test_behind_other_text(written: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher) -> None:
    monkeypatch.setattr("lbllm_core.model.load.teacher_digest", lambda *_: tiny_teacher.digest)
    plain = config(source="synthetic", sequences=8)
    mixed = dataclasses.replace(plain, dataset=dataclasses.replace(plain.dataset, sequences=12, generated=4))
    ids = tokens.calibration_tokens(mixed, tiny_teacher.tokenizer, written)
    assert ids.shape == (12, 32)
    assert torch.equal(ids[:8], tokens.calibration_tokens(plain, tiny_teacher.tokenizer))
    assert torch.equal(ids[8:], self_generated.generated_tokens(config(sequences=4), written))
    facts = [pipeline.facts(pipeline.SPECS["ptq_init"], c, written) for c in (plain, mixed)]
    assert "self-generated text" not in facts[0]
    assert facts[1]["self-generated text"] == self_generated.generated_digest(mixed, written)
    assert "leaves none of dataset.sequences=12" in "".join(problems(dataclasses.replace(mixed, dataset=dataclasses.replace(mixed.dataset, generated=12))))


def test_batches_side_by_side_write_the_same(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = self_generated.generated_tokens(config(sequences=40), written / "a")
    monkeypatch.setattr(self_generated, "SIDE_BY_SIDE", {"cpu": 2})
    together = self_generated.generated_tokens(config(sequences=40), written / "b")
    assert float((alone == together).float().mean()) > 0.9  # products of other shapes round otherwise, and a token in a hundred may turn on that

def test_a_teacher_that_fails_its_gate_writes_nothing(models_home: Path, tmp_path: Path) -> None:
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "models").symlink_to(models_home / "models")
    broken = dataclasses.replace(config(), model=dataclasses.replace(config().model, expected={"ppl_synthetic": 1.0}))
    with pytest.raises(GateError):
        run_pipeline(broken, tmp_path)
    assert not (tmp_path / "texts").exists()

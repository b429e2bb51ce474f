"""Text that the teacher writes: same seed, same tokens; a continuation without a cache would have been the same; degenerate text is refused."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lbllm_core import pipeline
from lbllm_core.config import DatasetConfig, HardwareConfig, RunConfig, problems
from lbllm_core.data import self_generated, tokens
from lbllm_core.errors import DataError, GateError, MemoryShortage
from lbllm_core.model.cache import SHARED, share_heads
from lbllm_core.model.inspect import architecture_shapes
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


@pytest.mark.parametrize("wave", [1, 8, 12, 32, 512])
def test_waves_of_any_size_write_the_same(written: Path, monkeypatch: pytest.MonkeyPatch, wave: int) -> None:
    alone = self_generated.generated_tokens(config(sequences=40), written / "a")
    monkeypatch.setattr(self_generated, "wave_size", lambda *_: wave)
    together = self_generated.generated_tokens(config(sequences=40), written / "b")
    assert together.shape == alone.shape
    assert float((alone == together).float().mean()) > 0.9  # products of other shapes round otherwise, and a token in a hundred may turn on that


def test_ids_are_those_of_transformers_own_cache(tiny_teacher) -> None:
    """Another cache, the same numbers on a CPU: stored text stays what its recipe gives."""
    model, length = tiny_teacher.model, 100
    allowed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    first, draws = torch.arange(16)[:, None] + 3, torch.rand(16, length - 1, generator=torch.Generator().manual_seed(0))
    ids, last, cache = first, first, None
    with torch.no_grad():
        for column in draws.unbind(1):
            answer = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            cumulated = (answer.logits[:, -1].float() / 0.9).softmax(-1).cumsum(-1)
            last = torch.searchsorted(cumulated, column[:, None] * cumulated[:, -1:], right=True).clamp_max(model.config.vocab_size - 1)
            ids = torch.cat([ids, last], 1)
    assert torch.equal(self_generated.sample(model, first, length, 0.9, allowed, draws), ids)


class Memory(TorchDispatchMode):
    """Bytes of tensors that torch's operators made and that still live; `made`: the size of each new one since it was emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.holders: dict[int, int] = {}
        self.made: list[int] = []

    def _gone(self, at: int, size: int) -> None:
        self.holders[at] -= 1
        if not self.holders[at]:
            del self.holders[at]
            self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            at, size = storage.data_ptr(), storage.nbytes()
            if at in given and at not in self.holders:
                continue  # a view of what was there before
            if at not in self.holders:
                self.holders[at] = 0
                self.live += size
                self.peak = max(self.peak, self.live)
                self.made.append(size)
            self.holders[at] += 1
            weakref.finalize(tensor, self._gone, at, size)
        return out


@pytest.fixture
def plain(tiny_teacher):
    """A copy of tiny that attends as it was loaded: other tests may have given the shared one a 4-bit cache."""
    model = copy.deepcopy(tiny_teacher.model)
    model.config._attn_implementation = "sdpa"
    return model


@pytest.fixture
def grouped(plain):
    """A copy of tiny that attends as on a GPU."""
    model = copy.deepcopy(plain)
    share_heads(model)
    assert model.config._attn_implementation == SHARED
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wave_takes_the_bytes_that_it_is_planned_with(plain, grouped, device: str) -> None:
    model = grouped if device == "cuda" else plain
    shapes, length = architecture_shapes(model.config, 0), 300
    allowed = torch.ones(shapes.vocabulary, dtype=torch.bool)
    with Memory() as seen:
        self_generated.sample(model, torch.full((16, 2), 5), length, 1.0, allowed, torch.rand(16, length - 2))
    planned = 16 * self_generated.sequence_bytes(shapes, length)
    assert 0.8 * planned < seen.peak < 1.1 * planned


def test_nothing_grows_with_the_text(grouped) -> None:
    """A tensor of another size at each step is one that a GPU's allocator finds no freed piece for: all steps but the first make the same sizes."""
    length = 200
    allowed = torch.ones(grouped.config.vocab_size, dtype=torch.bool)
    steps: list[list[int]] = []

    def begun(*_: object) -> None:
        steps.append(seen.made)
        seen.made = []

    with Memory() as seen:
        hook = grouped.register_forward_pre_hook(begun)
        self_generated.sample(grouped, torch.full((16, 1), 5), length, 1.0, allowed, torch.rand(16, length - 1))
        hook.remove()
    early, late = steps[20], steps[-1]
    assert max(late) <= max(early)
    assert sum(late) <= 1.02 * sum(early)  # positions and the like
    room = 16 * 4 * length * grouped.config.num_key_value_heads * grouped.config.hidden_size // grouped.config.num_attention_heads
    assert sum(size >= room for size in steps[1]) == 2 * grouped.config.num_hidden_layers  # keys and values, made in the first step


def test_each_step_attends_to_the_room_itself(grouped, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's memory-efficient kernel takes in float32: as many heads of queries as of keys, no mask, keys and values where they are stored."""
    groups = grouped.config.num_key_value_heads
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((query.shape[1], key.shape[1], value.shape[1], key.stride(), value.stride(), sorted(options)))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    self_generated.sample(grouped, torch.full((3, 1), 5), 80, 1.0, torch.ones(grouped.config.vocab_size, dtype=torch.bool), torch.rand(3, 79))
    assert grouped.config.num_attention_heads > groups
    assert len(calls) == 79 * grouped.config.num_hidden_layers
    head = grouped.config.hidden_size // grouped.config.num_attention_heads
    stored = (groups * 80 * head, 80 * head, head, 1)
    assert all(call == (groups, groups, groups, stored, stored, ["scale"]) for call in calls)


def test_waves_fit_the_device() -> None:
    gpu, gb = torch.device("cuda"), 10**9
    each = 48_000_000  # SmolLM2-135M, 1024 tokens
    sizes = [self_generated.wave_size(gpu, each, free * gb) for free in (140, 80, 24, 8, 1, 0)]
    assert sizes == [512, 256, 64, 32, 4, 1]
    assert self_generated.wave_size(gpu, 10 * each, 1000 * gb) * 10 * each <= 24 << 30
    assert self_generated.wave_size(gpu, 1, gb) == 512
    assert self_generated.wave_size(torch.device("cpu"), each, 0) == self_generated.BATCH


def test_without_memory_the_wave_is_halved_and_then_refused(written: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = self_generated.generated_tokens(config(sequences=40), written / "a")
    real, most, tried = self_generated.sample, [8], []

    def short(model: Any, first: torch.Tensor, *rest: Any) -> torch.Tensor:
        tried.append(len(first))
        if len(first) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, first, *rest)

    monkeypatch.setattr(self_generated, "sample", short)
    with caplog.at_level("WARNING"):
        ids = self_generated.generated_tokens(config(sequences=40), written / "b")
    assert tried == [16, 8, 8, 8, 8, 8]
    assert "8 sequences are now written side by side instead of 16" in caplog.text
    assert float((ids == expected).float().mean()) > 0.9
    most[0] = 0
    with pytest.raises(MemoryShortage, match=r"one sequence of 32 tokens \(CUDA out of memory\)\. Try shorter"):
        self_generated.generated_tokens(config(sequences=40), written / "c")


def test_a_teacher_that_fails_its_gate_writes_nothing(models_home: Path, tmp_path: Path) -> None:
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "models").symlink_to(models_home / "models")
    broken = dataclasses.replace(config(), model=dataclasses.replace(config().model, expected={"ppl_synthetic": 1.0}))
    with pytest.raises(GateError):
        run_pipeline(broken, tmp_path)
    assert not (tmp_path / "texts").exists()

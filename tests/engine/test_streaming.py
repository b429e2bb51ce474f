"""A sweep whose models are never whole in memory gives the bytes of one whose models are; faults cost nothing that is finished."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref

import pytest
import torch
from stage_bench import CPU
from test_hidden_states import full_after
from test_sweeps import A4, STAGES, Bench, blocks_of, stage_of

from lbllm_core.config import ModelConfig, WeightDistillConfig
from lbllm_core.engine.block_sweep import SweepPlan, sweep
from lbllm_core.engine.hidden_states import StorePlan
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import silent
from lbllm_core.errors import ArtifactError, MemoryShortage, ModelError
from lbllm_core.model.load import teacher_folder
from lbllm_core.model.streamed import StreamedDecoder, load_streamed
from lbllm_core.model.student import load_block
from lbllm_core.stages.weight_distill import distill_block

N = 8


@pytest.fixture(scope="module")
def bench(models_home):
    return Bench(models_home, sequences=N)


@pytest.fixture(scope="module")
def folder(models_home):
    return teacher_folder(ModelConfig(), models_home)


@pytest.fixture(scope="module")
def students(bench, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        work, plan = stage_of(stage, root)
        bench.sweep(root / stage, work, plan)
    return root


def streamed_sweep(bench, folder, stage, root, into, store=None):
    work, plan = stage_of(stage, root)
    return sweep(StreamedDecoder(folder, torch.device("cpu")), bench.ids, work, plan, Ledger(into), CPU, silent, store)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_streaming_is_bit_equal(bench, folder, students, tmp_path, stage, tier):
    store = StorePlan(tier, "fp32", tmp_path / "streams", 3 * 128 * bench.decoder.width * 4)
    streamed_sweep(bench, folder, stage, students, tmp_path / "made", store)
    assert blocks_of(tmp_path / "made") == blocks_of(students / stage)
    assert not list((tmp_path / "streams").glob("*")) if tier == "disk" else True


def test_one_block_at_a_time(folder):
    decoder = StreamedDecoder(folder, torch.device("cpu"))
    assert all(p.device.type == "meta" for p in decoder.model.parameters())
    block = decoder.blocks[0]
    gone = weakref.ref(block)
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 and not p.requires_grad for p in block.parameters())
    del block
    decoder.blocks[1]
    gc.collect()
    assert gone() is None


def test_tokenizer_comes_along(models_home):
    decoder, tokenizer = load_streamed(ModelConfig(), models_home, torch.device("cpu"))
    assert len(decoder.blocks) == 2
    assert len(tokenizer) <= decoder.base.embed_tokens.weight.shape[0]


@pytest.mark.parametrize("damage", ["missing", "truncated", "lacks"])
def test_bad_shard_is_named(folder, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(folder, tmp_path / "model")
    file = copied / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "missing":
        file.unlink()
    else:
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file)
    with pytest.raises(ModelError, match={"truncated": "model.safetensors cannot be read", "missing": "holds no", "lacks": r"layers\.1\.mlp\.up_proj\.weight"}[damage]):
        list(StreamedDecoder(copied, torch.device("cpu")).blocks)


def test_full_disk_loses_no_block_and_the_rerun_completes(bench, folder, students, tmp_path, monkeypatch):
    store = StorePlan("disk", "fp32", tmp_path / "streams", 3 * 128 * bench.decoder.width * 4)
    with monkeypatch.context() as patched:
        full_after(patched, 16)  # shards of both streams: embedded, one copy, and through block 0
        with pytest.raises(ArtifactError, match="the disk is full"):
            streamed_sweep(bench, folder, "weight_distill", students, tmp_path / "made", store)
    assert Ledger(tmp_path / "made").finished(2) == 1
    assert not list((tmp_path / "streams").glob("*"))
    streamed_sweep(bench, folder, "weight_distill", students, tmp_path / "made", store)
    assert blocks_of(tmp_path / "made") == blocks_of(students / "weight_distill")


def test_bf16_streams_are_the_same_in_every_tier(bench, folder, students, tmp_path):
    made = []
    for tier in ("device", "host", "disk"):
        streamed_sweep(bench, folder, "weight_distill", students, tmp_path / tier, StorePlan(tier, "bf16", tmp_path / "streams"))
        made.append(blocks_of(tmp_path / tier))
    assert made[0] == made[1] == made[2]
    assert made[0] != blocks_of(students / "weight_distill")


class ShortOfMemory:
    """A device that has no room for more than `room` sequences at once while it trains."""

    def __init__(self, job, room):
        self.job, self.room, self.seen = job, room, []

    def run(self, block, hidden):
        if torch.is_grad_enabled():
            self.seen.append(len(hidden))
            if len(hidden) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.job.run(block, hidden)

    def __getattr__(self, name):
        return getattr(self.job, name)


def trained(bench, students, folder, room):
    devices = []

    def work(job):
        devices.append(ShortOfMemory(job, room))
        state = load_block(students / "ptq_init", job.index, "none")
        return distill_block(devices[-1], state, A4, WeightDistillConfig(epochs=1, batch_size=4), 0)

    figures = bench.sweep(folder, work, SweepPlan("weight_distill", True))
    return figures, [d.seen for d in devices]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(bench, students, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    plain, _ = trained(bench, students, tmp_path / "plain", 4)
    assert not caplog.records
    short, seen = trained(bench, students, tmp_path / "short", 1)
    assert seen[0] == [4, 2, *[1] * 8]  # one step in vain, one more, then both steps one sequence at a time
    assert [r.getMessage() for r in caplog.records][:2] == [
        "block 0: the device ran out of memory; a batch is now taken in micro-batches of 2 sequences (the effective batch stays 4)",
        "block 0: the device ran out of memory; a batch is now taken in micro-batches of 1 sequences (the effective batch stays 4)",
    ]
    for a, b in zip(plain, short, strict=True):
        assert a["train_steps"] == b["train_steps"] == 2
        assert a["loss_after"] == pytest.approx(b["loss_after"], rel=1e-3)


def test_one_sequence_without_room_is_refused(bench, students, tmp_path):
    with pytest.raises(MemoryShortage, match=r"block 0: .*one sequence of 128 tokens.*Earlier blocks are kept"):
        trained(bench, students, tmp_path, 0)

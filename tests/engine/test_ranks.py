"""Two processes on one sweep: the block that one process with the same batches trains; a killed process is told and costs nothing finished."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from lbllm_core.config import (
    ActQuantConfig,
    DatasetConfig,
    HardwareConfig,
    ModelConfig,
    PtqInitConfig,
    RunConfig,
    SchemeConfig,
    WeightDistillConfig,
    problems,
)
from lbllm_core.engine import train_block
from lbllm_core.engine.launch_ranks import RankError
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.ranks import Ranks
from lbllm_core.engine.step import StepContext
from lbllm_core.model.load import load_teacher
from lbllm_core.pipeline import SWEEPS
from lbllm_core.steps import act_quant, ptq_init, weight_distill

CONFIG = RunConfig(
    model=ModelConfig(context=128),
    dataset=DatasetConfig(sequences=8),
    scheme=SchemeConfig(codebook_size=16),
    ptq_init=PtqInitConfig(sequences=8, codebook_rounds=3),  # after many rounds a sum in another order may have revived another entry of a table
    weight_distill=WeightDistillConfig(sequences=8, batch_size=4, epochs=2),
    act_quant=ActQuantConfig(sequences=8, batch_size=4),
    hardware=HardwareConfig(device="cpu", compute_dtype="fp32", threads=1),
)
TWO = replace(CONFIG, hardware=replace(CONFIG.hardware, gpus=2))
RUN = {"ptq_init": ptq_init, "weight_distill": weight_distill, "act_quant": act_quant}
BEFORE = {"weight_distill": "ptq_init", "act_quant": "weight_distill"}


def run(config, stage, root, home, into="", report=lambda p: None):
    folder = root / (into or stage)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"student": root / BEFORE[stage]} if stage in BEFORE else {}
    return RUN[stage](StepContext(config, inputs, folder, home, report)), folder


@pytest.fixture(scope="module")
def home(models_home):
    load_teacher(CONFIG.model, models_home)  # trained once, not by two processes at once
    return models_home


def merged_order(n, plan, index, ranks):
    """What two ranks do together, as one process's order: rank r holds sequences r, r + 2, ..."""
    local = [ORDER(n // 2, plan, index, Ranks(r, 2)) for r in range(2)]
    return [torch.cat([2 * mine + r for r, mine in enumerate(pair)]) for pair in zip(*local, strict=True)]


ORDER = train_block._order


@pytest.mark.parametrize("stage", SWEEPS)
def test_two_processes_are_one_with_the_same_batches(stage, home, tmp_path, monkeypatch):
    monkeypatch.setattr(train_block, "_order", merged_order)
    for earlier in SWEEPS[: SWEEPS.index(stage)]:
        run(CONFIG, earlier, tmp_path, home)
    one, alone = run(CONFIG, stage, tmp_path, home)
    heard = []
    two, together = run(TWO, stage, tmp_path, home, "two", heard.append)
    assert [(p.step, p.done) for p in heard if p.done and not p.share] == [(stage, 1), (stage, 2)]
    assert all(p.step == stage and p.done <= 2 for p in heard)
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=2e-2, abs=2e-3)
    for index in range(2):
        a, b = Ledger(alone).load(index), Ledger(together).load(index)
        assert a.keys() == b.keys()
        codes = [k for k in a if k.endswith(".codes")]
        differing = sum(int((a[k] != b[k]).sum()) for k in codes) / sum(a[k].numel() for k in codes)
        assert differing < (0.02 if index == 0 else 0.2)  # sums in another order move a few codes, and errors feed on
    figures = [Ledger(folder).figures(0) for folder in (alone, together)]
    if "loss_before" in figures[0]:
        assert figures[1]["loss_before"] == pytest.approx(figures[0]["loss_before"], rel=1e-4)
        assert figures[1]["loss_after"] == pytest.approx(figures[0]["loss_after"], rel=1e-2)


def test_two_processes_smooth_keys_with_averaged_gradients(home, tmp_path):
    """Each lays its own sequences over the positions, so the transforms are near, not equal."""
    four = replace(CONFIG, scheme=replace(CONFIG.scheme, kv_bits=4))
    folders = [run(replace(four, hardware=c.hardware), "ptq_init", tmp_path, home, name)[1] for c, name in ((CONFIG, "one"), (TWO, "two"))]
    one, two = (Ledger(folder).figures(0) for folder in folders)
    assert 0 < one["key_error_left"] < 1
    assert two["key_error_left"] == pytest.approx(one["key_error_left"], rel=0.1)
    assert two["weight_error/self_attn.k_proj"] == pytest.approx(one["weight_error/self_attn.k_proj"], rel=0.1)


def children_of(process):
    """Process ids below one, from /proc."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == process:
                found.append(int(entry))
    return found


def test_a_killed_process_is_told_and_the_rerun_finishes(home, tmp_path):
    slow = replace(TWO, weight_distill=replace(TWO.weight_distill, epochs=60))
    run(CONFIG, "ptq_init", tmp_path, home)
    killed = []

    def kill_one(progress):
        def later():
            time.sleep(0.2)
            launcher = children_of(os.getpid())
            ranks = [r for launched in launcher for r in children_of(launched)]
            os.kill(ranks[-1], signal.SIGKILL)

        if progress.done == 1 and not killed:
            killed.append(1)
            threading.Thread(target=later).start()

    with pytest.raises(RankError, match=r"one of 2 processes.*Finished blocks are kept.*same command again"):
        run(slow, "weight_distill", tmp_path, home, report=kill_one)
    folder = tmp_path / "weight_distill"
    assert Ledger(folder).finished(2) == 1
    first = (folder / "block_000.safetensors").read_bytes()
    run(slow, "weight_distill", tmp_path, home)
    assert Ledger(folder).finished(2) == 2
    assert (folder / "block_000.safetensors").read_bytes() == first


def test_what_cannot_be_shared_is_refused():
    odd = replace(TWO, weight_distill=replace(TWO.weight_distill, batch_size=3), ptq_init=replace(TWO.ptq_init, sequences=7))
    assert [p for p in problems(odd) if "gpus" in p] == [
        "ptq_init.sequences=7 is no multiple of hardware.gpus=2, which share it evenly",
        "weight_distill.batch_size=3 is no multiple of hardware.gpus=2, which share it evenly",
    ]

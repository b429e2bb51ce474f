"""Streams of hidden states: the same values in every tier, moved in place, and every fault named."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import types
from pathlib import Path

import pytest
import torch

from lbllm_core.engine import hidden_states
from lbllm_core.engine.hidden_states import (
    AHEAD,
    HiddenStates,
    StorePlan,
    checksum,
    choose_tier,
    decode,
    encode,
    relative_error,
    stored_bytes,
)
from lbllm_core.errors import ArtifactError, PreflightError

CPU = torch.device("cpu")
SIZE = (11, 6, 16)
TIERS = ("device", "host", "disk")


def states(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=g) * torch.exp(2 * torch.randn(SIZE[-1], generator=g))


def plan_of(tier, dtype, folder, sequences_a_shard=4):
    return StorePlan(tier, dtype, folder, stored_bytes((sequences_a_shard, *SIZE[1:]), dtype))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_values_and_rewriting(tier, dtype, tmp_path):
    x = states()
    with contextlib.closing(HiddenStates.of(x, plan_of(tier, dtype, tmp_path))) as stream:
        expected = decode(encode(x, dtype))
        assert torch.equal(stream.whole(), expected)
        assert torch.equal(stream[torch.tensor([9, 0, 5])], expected[[9, 0, 5]])
        for _ in range(3):  # through three "blocks", in place
            with stream.rewriting() as put:
                for part in stream.batches([slice(i, i + 3) for i in range(0, 11, 3)]):
                    put(part * 1.5 + 1)
            expected = decode(encode(expected * 1.5 + 1, dtype))
        assert torch.equal(stream.whole(), expected)
        again = stream.copy()
        assert torch.equal(torch.cat(list(again.batches([slice(i, i + 1) for i in range(11)]))), expected)
        again.close()
    assert not list(tmp_path.glob("*"))


def test_number_types():
    x = states()
    assert relative_error("fp32", x) == 0
    assert 0 < relative_error("bf16", x) < 2**-16
    assert 2**-16 < relative_error("fp8", x) < 0.04**2
    assert torch.equal(decode(encode(torch.zeros(1, 2, 8), "fp8")), torch.zeros(1, 2, 8))
    assert stored_bytes(SIZE, "fp8") == 11 * 6 * (16 + 4)


def test_checksum_sees_every_byte_and_order():
    data = torch.arange(4096, dtype=torch.int64).view(torch.uint8)
    found = {checksum(data)}
    for at in (0, 17, 4095 * 8):
        changed = data.clone()
        changed[at] ^= 1
        found.add(checksum(changed))
    swapped = data.view(torch.int64).clone()
    swapped[[3, 900]] = swapped[[900, 3]]
    found.add(checksum(swapped.view(torch.uint8)))
    assert len(found) == 5


def on_disk(tmp_path):
    return HiddenStates.of(states(), plan_of("disk", "bf16", tmp_path))


def test_corrupt_shard_is_named(tmp_path):
    stream = on_disk(tmp_path)
    shard = sorted(tmp_path.rglob("shard_00001*"))[0]
    content = bytearray(shard.read_bytes())
    content[40] ^= 4
    shard.write_bytes(content)
    assert stream[slice(0, 4)].shape[0] == 4  # the others are sound
    with pytest.raises(ArtifactError, match=r"shard_00001.*checksum [0-9a-f]{32}, expected [0-9a-f]{32}.*run the same command again"):
        stream[slice(4, 5)]


def test_missing_shard_is_named(tmp_path):
    stream = on_disk(tmp_path)
    sorted(tmp_path.rglob("shard_00002*"))[0].unlink()
    with pytest.raises(ArtifactError, match=r"shard_00002.*missing"):
        stream[slice(10, 11)]


class FullDisk:
    """A file that takes some bytes and then has no room."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def write(self, data):
        self.stream.write(bytes(data)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def full_after(monkeypatch, writes):
    """Shards can be written `writes` times; then the disk is full."""
    opened, count = Path.open, [0]

    def full(self, mode="r", *args, **kwargs):
        stream = opened(self, mode, *args, **kwargs)
        if self.name.startswith("shard_") and "w" in mode:
            count[0] += 1
            if count[0] > writes:
                return FullDisk(stream)
        return stream

    monkeypatch.setattr(Path, "open", full)


def test_full_disk(tmp_path, monkeypatch):
    full_after(monkeypatch, 1)
    with pytest.raises(ArtifactError, match=r"the disk is full.*GB left.*Finished blocks are kept.*hidden_tier=host"):
        on_disk(tmp_path)
    assert len(list(tmp_path.rglob("shard_*"))) == 1  # no torn file stays


def test_full_disk_for_real(tmp_path):
    """A file system of 256 KB, where the user may make one."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        with pytest.raises(ArtifactError, match="the disk is full"):
            HiddenStates.of(torch.randn(64, 64, 32), StorePlan("disk", "fp32", tmp_path, 32768))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_tier_is_the_first_with_room():
    assert choose_tier(10, 11, 100, 1000) == "device"
    assert choose_tier(10, -5, 100, 1000) == "host"
    assert choose_tier(500, 11, 100, 1000) == "disk"
    with pytest.raises(PreflightError, match=r"hidden states need 0\.0 GB; room: device.*host.*disk"):
        choose_tier(5000, 11, 100, 1000)


class IdleDevice:
    """Stands in for torch.cuda: what is queued is done only when somebody waits for it. Counts batches that were sent and those done with."""

    def __init__(self, monkeypatch, stream):
        self.sent, self.finished, self.most = 0, 0, 0
        monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: IdleStream(self))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, used_on: None)
        monkeypatch.setattr(hidden_states, "_cuda", types.SimpleNamespace(Event=lambda: IdleEvent(self, -1)))
        stream.side = IdleStream(self, counts=False)
        fetch = stream.backing.sent

        def counted(at, device):
            self.sent += 1
            self.most = max(self.most, self.sent - self.finished)
            return fetch(at, device)

        monkeypatch.setattr(stream.backing, "sent", counted)


class IdleStream:
    def __init__(self, device, counts=True):
        self.device, self.counts, self.marks = device, counts, 0

    def record_event(self):
        return IdleEvent(self.device, 1 if self.counts else 0)

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class IdleEvent:
    def __init__(self, device, batches):
        self.device, self.batches = device, batches

    def record(self, stream=None):
        pass

    def synchronize(self):
        assert self.batches >= 0, "an event of a copy is for the device to wait for"
        self.device.finished += self.batches


def test_batches_do_not_pile_up_on_the_device(monkeypatch):
    """Through a block in place, as a GPU would do it: at most 2 AHEAD + 1 batches are there at once, and the values are right."""
    x = torch.cat([states(k) for k in range(4)])
    stream = HiddenStates.of(x, StorePlan("host", "bf16"))
    expected = decode(encode(decode(encode(x, "bf16")) * 1.5 + 1, "bf16"))
    device = IdleDevice(monkeypatch, stream)
    with stream.rewriting() as put:
        for part in stream.batches([slice(i, i + 2) for i in range(0, 44, 2)]):
            put(part * 1.5 + 1)
    assert device.sent == 22
    assert device.most <= 2 * AHEAD + 1
    monkeypatch.undo()
    stream.side = None
    assert torch.equal(stream.whole(), expected)

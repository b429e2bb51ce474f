"""A stream of hidden states that may be larger than the GPU, larger than memory, and is still read at the speed of training.

A sweep carries two streams `(sequences, tokens, hidden)` through the model. LLaMA-2-7B at 8192 sequences of 2048 tokens is 137 GB a
stream in bf16, so where it lies is a choice (`tier`):

    device   beside the block; nothing is copied
    host     pinned memory; a batch travels over PCIe on a stream of its own while the one before is trained on
    disk     files of some sequences each ("shards"), written whole with a checksum and read through a memory map

and so is how a value is kept (`dtype`): `fp32` as it was computed; `bf16`, half; `fp8`, a quarter: e4m3 with one float32 scale a token,
the token's largest value at e4m3's largest, 448 (OCP 8-bit formats; 3 bits of mantissa: about 2.6 % of a value's size as error).
What is read is always float32 on the device where it is trained.

**Rewriting.** A stream moves through a block in place: `rewriting()` takes the new states in order while `batches()` reads the old ones,
always ahead. On disk a shard's new file replaces the old one when it is complete, so one stream and one shard are on disk at a time.
Writing goes through `write`, never through a map: a full disk is then an error with a message and not a signal. Streams are scratch;
what is finished is in the ledger, and a rerun makes the streams again.

**Memory.** Work for a GPU is queued much faster than it is done, and a batch that is queued is a batch in memory: a pass of 8192 tokens of a
LLaMA-2-7B block is some thirty launches of a thousand that fit into the queue. So nobody runs more than `AHEAD` batches ahead: before a further one
is sent, the device has to be done with the one `AHEAD` before (`_Lag`). `2 AHEAD + 1` batches of a stream are then on the device at most.

**Checksum.** Two sums of the file's 64-bit words, plain and weighted by position, modulo 2^64: fast enough (several GB/s) to check every
shard each time that it is first read after it was written, and it finds any single damaged word and any two that were swapped.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lbllm_core.errors import ArtifactError, PreflightError

SHARD_BYTES = 128 << 20
LARGEST_E4M3 = 448.0
HANDFUL = 1 << 23  # values that may exist in float64 beside all else
WORDS = 1 << 20  # words of a checksum at a time
AHEAD = 2  # batches that are on their way while one is used
_cuda: Any = torch.cuda  # its classes carry no types
NUMBER: Any = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn})
At = slice | Tensor


@dataclass(frozen=True)
class StorePlan:
    """Where streams lie and how values are kept; `folder` is where the disk tier makes its scratch folders."""

    tier: str = "device"
    dtype: str = "fp32"
    folder: Path | None = None
    shard_bytes: int = SHARD_BYTES


def encode(x: Tensor, dtype: str) -> tuple[Tensor, ...]:
    """float32 `(..., hidden)` -> what is stored: the values, and for fp8 a scale a token `(..., 1)`."""
    if dtype != "fp8":
        return (x.to(NUMBER[dtype]),)
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST_E4M3).clamp_min(1e-30)
    return (x / scale).to(torch.float8_e4m3fn), scale


def decode(parts: Sequence[Tensor]) -> Tensor:
    """Inverse of `encode`, float32."""
    values = parts[0].float()
    return values * parts[1] if len(parts) > 1 else values


def stored_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a stream `(sequences, tokens, hidden)`."""
    sequences, tokens, hidden = shape
    return sequences * tokens * (hidden * int(NUMBER[dtype].itemsize) + 4 * (dtype == "fp8"))


def checksum(data: Tensor) -> str:
    """Two 64-bit sums over the words of a uint8 tensor, as hex (see above)."""
    short = -data.numel() % 8
    words = (torch.cat([data, data.new_zeros(short)]) if short else data).view(torch.int64)
    place = torch.arange(1, WORDS + 1)
    plain = weighted = torch.zeros((), dtype=torch.int64)
    for first in range(0, len(words), WORDS):
        part = words[first : first + WORDS]
        total = part.sum()
        plain = plain + total
        weighted = weighted + (part * place[: len(part)]).sum() + total * first
    return f"{int(plain) % (1 << 64):016x}{int(weighted) % (1 << 64):016x}"


class HiddenStates:
    """A stream `(sequences, tokens, hidden)`; what is read is float32 on `device`. `close()` removes what is on disk."""

    def __init__(self, shape: Sequence[int], device: torch.device, plan: StorePlan | None = None):
        """Raises PreflightError when the host or the device has no room for it."""
        self.plan, self.device = plan or StorePlan(), device
        self.shape = torch.Size(shape)
        self.on_gpu = device.type == "cuda"
        self.side: Any = _cuda.Stream(device) if self.on_gpu and self.plan.tier != "device" else None
        self.backing: _InMemory | _OnDisk
        if self.plan.tier == "disk":
            self.backing = _OnDisk(self.shape, self.plan, self.on_gpu)
        else:
            self.backing = _InMemory(self.shape, self.plan, device)

    @classmethod
    def of(cls, states: Tensor, plan: StorePlan | None = None) -> HiddenStates:
        """A stream with the values of a tensor."""
        made = cls(states.shape, states.device, plan)
        made.fill(states[i : i + 1] for i in range(len(states)))
        return made

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: At) -> Tensor:
        """Sequences as float32 on the device."""
        return next(iter(self.batches([at])))

    def whole(self) -> Tensor:
        """Everything, as one tensor; for streams that are known to be small."""
        return self[slice(0, len(self))]

    def batches(self, chosen: Sequence[At]) -> Iterator[Tensor]:
        """The sequences of each choice in turn; on a GPU the next ones travel while one is used."""
        if self.side is None:
            for at in chosen:
                yield decode(self.backing.read(at))
            return
        used = _Lag(lambda: torch.cuda.current_stream(self.device).record_event())
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._fetch, at) for at in chosen[:AHEAD]]
            for following in range(AHEAD, AHEAD + len(chosen)):
                if following < len(chosen):
                    coming.append(pool.submit(self._fetch, chosen[following]))
                parts, ready = coming.pop(0).result()
                here = torch.cuda.current_stream(self.device)
                here.wait_event(ready)
                for part in parts:
                    part.record_stream(here)
                yield decode(parts)
                del parts
                used.queued()

    def _fetch(self, at: At) -> tuple[tuple[Tensor, ...], Any]:
        """Start the copy of some sequences to the GPU, on the side stream."""
        with torch.cuda.stream(self.side):
            parts = self.backing.sent(at, self.device)
            ready = _cuda.Event()
            ready.record(self.side)
        return parts, ready

    @contextlib.contextmanager
    def rewriting(self) -> Iterator[Callable[[Tensor], None]]:
        """A function that takes the new states `(some, tokens, hidden)`, from the first sequence on; complete on leaving.

        Raises ArtifactError when the disk is full.
        """
        at = 0
        written = _Lag(lambda: self.side.record_event())

        def put(states: Tensor) -> None:
            nonlocal at
            parts = encode(states.float(), self.plan.dtype)
            ready = None
            if self.side is not None:
                ready = _cuda.Event()
                ready.record(torch.cuda.current_stream(self.device))
                self.side.wait_event(ready)
                with torch.cuda.stream(self.side):
                    self.backing.write(at, parts)
                    for part in parts:
                        part.record_stream(self.side)
                written.queued()
            else:
                self.backing.write(at, parts)
            at += len(states)

        yield put
        if self.side is not None:
            self.side.synchronize()
        self.backing.finish()

    def fill(self, pieces: Iterator[Tensor]) -> None:
        """Write a stream from its first sequence to its last."""
        with self.rewriting() as put:
            for piece in pieces:
                put(piece)

    def copy(self) -> HiddenStates:
        """Another stream with the same values."""
        made = HiddenStates(self.shape, self.device, self.plan)
        made.fill(self.batches(handfuls(self.shape)))
        return made

    def close(self) -> None:
        """Remove what is on disk."""
        self.backing.close()


class _Lag:
    """Keeps whoever queues batches at most AHEAD of them in front of the device; `mark` records an event behind what is queued."""

    def __init__(self, mark: Callable[[], Any]):
        self.mark = mark
        self.events: deque[Any] = deque()

    def queued(self) -> None:
        """Another batch is queued: wait for the one AHEAD before it."""
        self.events.append(self.mark())
        if len(self.events) > AHEAD:
            self.events.popleft().synchronize()


def handfuls(shape: Sequence[int]) -> list[At]:
    """A few of a stream's sequences at a time: one, or as many as have HANDFUL values together."""
    count = max(1, HANDFUL // math.prod(shape[1:]))
    return [slice(i, i + count) for i in range(0, shape[0], count)]


class _InMemory:
    """Tensors on the device or in (pinned) host memory."""

    def __init__(self, shape: Sequence[int], plan: StorePlan, device: torch.device):
        pinned = plan.tier == "host" and device.type == "cuda"
        place = torch.device("cpu") if plan.tier == "host" else device
        try:
            self.parts = [torch.empty(tuple(shape), dtype=NUMBER[plan.dtype], device=place, pin_memory=pinned)]
            if plan.dtype == "fp8":
                self.parts.append(torch.empty((*shape[:2], 1), device=place, pin_memory=pinned))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            size = stored_bytes(shape, plan.dtype) / 1e9
            raise PreflightError(f"no room for a stream of hidden states of {size:.1f} GB ({plan.tier} tier): choose hardware.hidden_tier=disk, hardware.hidden_dtype=bf16 or fewer sequences ({str(error).splitlines()[0]})") from error

    def read(self, at: At) -> tuple[Tensor, ...]:
        return tuple(part[at if isinstance(at, slice) else at.to(part.device)] for part in self.parts)

    def sent(self, at: At, device: torch.device) -> tuple[Tensor, ...]:
        """Start the copy of some sequences to a GPU, straight from pinned memory."""
        if isinstance(at, slice):
            return tuple(part[at].to(device, non_blocking=True) for part in self.parts)
        made = tuple(torch.empty((len(at), *part.shape[1:]), dtype=part.dtype, device=device) for part in self.parts)
        for k, i in enumerate(at.tolist()):
            for part, room in zip(self.parts, made, strict=True):
                room[k].copy_(part[i], non_blocking=True)
        return made

    def write(self, at: int, parts: Sequence[Tensor]) -> None:
        for mine, new in zip(self.parts, parts, strict=True):
            mine[at : at + len(new)].copy_(new, non_blocking=True)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self.parts = []


class _OnDisk:
    """Shards in a scratch folder: `shard_00003.2.bin` is the second writing of the fourth."""

    def __init__(self, shape: Sequence[int], plan: StorePlan, pinned: bool):
        if plan.folder is None:
            raise PreflightError("hidden states on disk need a folder")
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="hidden-", dir=plan.folder))
        self.sequences, self.pinned = int(shape[0]), pinned
        self.numbers = [((*shape[1:],), NUMBER[plan.dtype])] + ([((shape[1], 1), torch.float32)] if plan.dtype == "fp8" else [])
        self.row = [math.prod(size) * int(number.itemsize) for size, number in self.numbers]  # bytes of a sequence, each part
        self.each: int = max(1, min(shape[0], plan.shard_bytes // sum(self.row)))
        self.files: dict[int, tuple[Path, str]] = {}
        self.maps: dict[int, Tensor] = {}
        self.round = 0
        self.pending: Tensor | None = None
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def read(self, at: At) -> tuple[Tensor, ...]:
        rows: Sequence[int] = range(self.sequences)[at] if isinstance(at, slice) else at.tolist()
        made = [torch.empty((len(rows), *size), dtype=number, pin_memory=self.pinned) for size, number in self.numbers]
        for k, shard, inside, length in self._runs(rows):
            count, offset = self._count(shard), 0
            for part, size in zip(made, self.row, strict=True):
                stored = self._map(shard)[offset + inside * size : offset + (inside + length) * size]
                part[k : k + length].view(torch.uint8).view(-1).copy_(stored)
                offset += count * size
        return tuple(made)

    def _runs(self, rows: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """(place in `rows`, shard, row inside of it, length) of neighbours in one shard: they lie together, part by part."""
        k = 0
        while k < len(rows):
            shard, inside = divmod(rows[k], self.each)
            length = 1
            while k + length < len(rows) and inside + length < self.each and rows[k + length] == rows[k] + length:
                length += 1
            yield k, shard, inside, length
            k += length

    def sent(self, at: At, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(part.to(device, non_blocking=True) for part in self.read(at))

    def _count(self, shard: int) -> int:
        return min(self.each, self.sequences - shard * self.each)

    def _map(self, shard: int) -> Tensor:
        """The bytes of a shard, checked when they are first read after they were written."""
        mapped = self.maps.get(shard)
        if mapped is None:
            path, expected = self.files[shard]
            size = self._count(shard) * sum(self.row)
            if not path.is_file() or path.stat().st_size != size:
                raise ArtifactError(f"{path}: this shard of hidden states is missing or has the wrong size; finished blocks are kept: run the same command again")
            mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            found = checksum(mapped)
            if found != expected:
                raise ArtifactError(f"{path}: this shard of hidden states has checksum {found}, expected {expected}; the disk may be failing. Finished blocks are kept: run the same command again")
            self.maps[shard] = mapped
        return mapped

    def write(self, at: int, parts: Sequence[Tensor]) -> None:
        for k, shard, inside, length in self._runs(range(at, at + len(parts[0]))):
            count, offset = self._count(shard), 0
            if self.pending is None:
                self.pending = torch.empty(count * sum(self.row), dtype=torch.uint8, pin_memory=self.pinned)
            for part, size in zip(parts, self.row, strict=True):
                room = self.pending[offset + inside * size : offset + (inside + length) * size]
                room.copy_(part[k : k + length].contiguous().view(torch.uint8).view(-1), non_blocking=True)
                offset += count * size
            if inside + length == count:
                self._hand_over(shard, self.pending)
                self.pending = None

    def _hand_over(self, shard: int, content: Tensor) -> None:
        """Write a complete shard in the background, one at a time."""
        copied = None
        if self.pinned:
            copied = _cuda.Event()
            copied.record()  # of the stream that the copies run on
        self._wait()
        self.writing = self.writer.submit(self._flush, shard, content, copied)

    def _flush(self, shard: int, content: Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        path = self.folder / f"shard_{shard:05d}.{self.round}.bin"
        try:
            with path.open("wb") as stream:
                stream.write(content.numpy().data)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.folder).free
            raise ArtifactError(f"{self.folder}: the disk is full ({free / 1e9:.1f} GB left) while hidden states are written. Finished blocks are kept: make room, or choose hardware.hidden_tier=host, hardware.hidden_dtype=bf16 or another LBLLM_HOME, and run the same command again") from error
        old = self.files.get(shard)
        self.files[shard] = (path, checksum(content))
        self.maps.pop(shard, None)
        if old is not None:
            old[0].unlink(missing_ok=True)

    def _wait(self) -> None:
        if self.writing is not None:
            done, self.writing = self.writing, None
            done.result()

    def finish(self) -> None:
        self._wait()
        self.round += 1

    def close(self) -> None:
        self.maps.clear()
        self.writer.shutdown(wait=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def choose_tier(size: int, device_free: float, host_free: float, disk_free: float) -> str:
    """The first tier that has room for `size` bytes (all streams together). Raises PreflightError with the three numbers."""
    for tier, free in (("device", device_free), ("host", host_free), ("disk", disk_free)):
        if size <= free:
            return tier
    raise PreflightError(
        f"hidden states need {size / 1e9:.1f} GB; room: device {max(device_free, 0) / 1e9:.1f}, host {max(host_free, 0) / 1e9:.1f}, disk {max(disk_free, 0) / 1e9:.1f} GB. "
        "Try fewer or shorter sequences, hardware.hidden_dtype=bf16 or fp8, or LBLLM_HOME on a larger disk"
    )


def relative_error(dtype: str, states: Tensor) -> float:
    """`|stored - x|^2 / |x|^2` of keeping `states` in a number type; float64."""
    kept = decode(encode(states.float(), dtype)).double()
    return float((kept - states.double()).square().sum() / states.double().square().sum())

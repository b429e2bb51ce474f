"""The weights file of a packed model: what may be in it, and whether it is what was written.

safetensors is a table of names, types, shapes and places, then bytes. It has no checksum, and a flipped bit in a code is a different,
perfectly valid weight. So the file's metadata carries a CRC-32 of every tensor's bytes under `crc32`, a JSON object by name, and reading
compares. (It finds accidents. It is no signature.) A file without the entry is read unchecked.

Everything that cannot be read, is missing, left over, of another type or shape, or altered is an ArtifactError that names it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lbllm_core.errors import ArtifactError

CHECKSUMS = "crc32"
Header = Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]]
TYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(path: Path) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Types (None: one the format never uses) and shapes in a weights file. Raises ArtifactError when it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (TYPES.get(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; the packed model is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); it is truncated or damaged, pack the model again") from error


def check_header(where: str, wanted: Header, found: Header) -> None:
    """ArtifactError naming the first tensor whose presence, shape or type is not the wanted one."""
    for name in sorted(wanted.keys() ^ found.keys()):
        raise ArtifactError(f"{where}: tensor {name} is {'missing' if name in wanted else 'not part of this model'}; config.json and weights do not belong together")
    for name, (dtype, shape) in wanted.items():
        actual, size = found[name]
        if size != shape:
            raise ArtifactError(f"{where}: tensor {name} has shape {size}, config.json asks for {shape}")
        if actual is None or (actual != dtype if dtype is not None else not actual.is_floating_point):
            raise ArtifactError(f"{where}: tensor {name} has type {actual or 'unknown'}, the packed format asks for {dtype or 'a float type'}")


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, in row order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata entry for these tensors."""
    return {CHECKSUMS: json.dumps({name: checksum(tensors[name]) for name in sorted(tensors)})}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a weights file with its checksums; the same tensors give the same bytes."""
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt", **checksums(tensors)})
    with path.open("r+b") as file:  # safetensors writes several metadata entries in an order that changes from call to call
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(settled) == size
        file.seek(8)
        file.write(settled)


def _recorded(metadata: Mapping[str, str] | None, path: Path) -> dict[str, int]:
    try:
        found = json.loads((metadata or {}).get(CHECKSUMS, "{}"))
        return {str(name): int(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its checksums cannot be read; it is damaged, pack the model again") from error


def read_tensors(path: Path, wanted: Header) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weights file, one at a time, when names, types and shapes are the wanted ones; else ArtifactError."""
    check_header(str(path), wanted, read_header(path))
    yield from checked_tensors(path, sorted(wanted))


def checked_tensors(path: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a weights file (all, or these) whose bytes are those that were written; else ArtifactError naming the tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            recorded = _recorded(file.metadata(), path)
            for name in sorted(file.keys()) if names is None else names:
                tensor = file.get_tensor(name)
                if recorded and checksum(tensor) != recorded.get(name):
                    raise ArtifactError(f"{path}: the bytes of tensor {name} are not those that were written (CRC-32 differs); it is damaged, pack the model again")
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); it is truncated or damaged, pack the model again") from error

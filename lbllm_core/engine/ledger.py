"""What is already done: a file a block, written whole or not at all.

A stage that dies after block 17 of 30 must go on with block 18. Each finished block is one safetensors file and one small
JSON beside it with the file's sha256 and the block's figures. The data file is written to a temporary name, flushed to disk and
renamed; the JSON follows the same way and is what makes the block count as done. On the next start a block is reused only if
its digest still matches; a damaged file is reported, set aside and done again, together with every later block, since those
were computed from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lbllm_core.engine.files import replace_atomic, sha256_file, write_atomic

log = logging.getLogger(__name__)


class Ledger:
    """The finished units of a stage inside its folder; `name` distinguishes kinds of units (block, checkpoint)."""

    def __init__(self, folder: Path, name: str = "block"):
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)

    def _paths(self, index: int) -> tuple[Path, Path]:
        stem = f"{self.name}_{index:03d}"
        return self.folder / f"{stem}.safetensors", self.folder / f"{stem}.json"

    def finished(self, total: int) -> int:
        """How many units from the first on are done and intact (0..total)."""
        for index in range(total):
            data, record = self._paths(index)
            if not (data.exists() and record.exists()):
                return index
            try:
                expected = json.loads(record.read_text())["sha256"]
            except (ValueError, KeyError, TypeError):
                expected = ""
            if sha256_file(data) != expected:
                log.warning("%s does not match its checksum: it was altered or truncated. It is set aside, and %s %d onwards is done again.", data, self.name, index)
                self._set_aside(index, total)
                return index
        return total

    def _set_aside(self, index: int, total: int) -> None:
        for later in range(index, total):
            data, record = self._paths(later)
            record.unlink(missing_ok=True)
            if later == index:
                data.replace(data.with_name(f"damaged-{data.name}.aside"))
            else:
                data.unlink(missing_ok=True)

    def save(self, index: int, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Record unit `index`: its tensors and its figures."""
        from safetensors.torch import save_file

        data, record = self._paths(index)
        replace_atomic(data, lambda temporary: save_file(dict(tensors), temporary))  # no copy in memory: a checkpoint may be gigabytes
        entry = {"sha256": sha256_file(data), "figures": dict(figures)}
        write_atomic(record, json.dumps(entry, sort_keys=True).encode())

    def load(self, index: int) -> dict[str, Tensor]:
        """Tensors of a finished unit."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self._paths(index)[0])
        return tensors

    def figures(self, index: int) -> dict[str, Any]:
        """Figures of a finished unit."""
        return dict(json.loads(self._paths(index)[1].read_text())["figures"])

"""Measured plans: which path, and for decode launches how many row tiles, warps and prefetched k tiles, by device, shape and tokens.

**Problem.** The best cut of a launch that lasts a few microseconds follows from no rule that we trust: it is measured.

The same goes for the number of tokens from which one path of many tokens beats another.

**How.** `cuda_plans.json` beside this file maps a device name to rows `[out, in, levels, tokens, path, row_tiles, warps, prefetch]`, with
`levels` such as "codebook-32". `python kernels/bench_gpu.py --only tune` measures them and writes the file. A token count between two
measured ones takes the larger one's plan, one beyond the largest that one's, and none takes a plan across `FEW`. A shape or device that
was not measured has no plan, and `cuda.py` falls back to its rules.

`LBLLM_CUDA_PLANS` names another file; it is asked when a shape is first met.

**Trade-off.** Every plan gives the same bits, so a stale table costs time and nothing else.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("cuda_plans.json")
Row = tuple[int, int, str, int, str, int, int, int]
FEW = 16  # tokens of a decode launch
FUSED = 8
HELD_CHANNELS = 512  # that a warp of an `early` launch can hold
EARLY_WARPS = 8  # that such a launch can have
_PATHS = ("fused", "decode", "sliced", "early", "narrow", "middle", "wide", "hopper128", "hopper256", "hopper_split")


@dataclass(frozen=True)
class Cut:
    """A measured plan."""

    path: str
    row_tiles: int
    warps: int
    prefetch: int


def parse(text: str) -> dict[str, list[Row]]:
    """The tables in a file's text. ValueError when a row is not what the module describes."""
    tables = json.loads(text)
    if not isinstance(tables, dict):
        raise ValueError("plans: expected an object from device names to rows")
    for device, rows in tables.items():
        for row in rows:
            if not _good(row):
                raise ValueError(f"plans of {device}: row {row} is not [out, in, levels, tokens, path, row_tiles, warps, prefetch]")
    return {device: [tuple(row) for row in rows] for device, rows in tables.items()}


def _good(row: list[Any]) -> bool:
    if len(row) != 8 or not all(isinstance(row[i], int) for i in (0, 1, 3, 5, 6, 7)) or row[4] not in _PATHS:
        return False
    if row[4] == "early" and not (row[3] <= FEW and row[1] <= HELD_CHANNELS * row[6] and row[3] / 2 <= row[6] <= EARLY_WARPS):
        return False  # no other cut holds such a layer
    return bool(0 <= row[5] <= 4 and 0 <= row[6] <= 16)


def load(path: Path = FILE) -> dict[str, list[Row]]:
    """The tables of a file; none when there is no file."""
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else {}


def place() -> Path:
    """The file in use."""
    return Path(os.environ.get("LBLLM_CUDA_PLANS") or FILE)


@functools.lru_cache(maxsize=4096)
def find(device: str, out: int, in_features: int, levels: str, tokens: int) -> Cut | None:
    """The plan for so many tokens, or None."""
    shape = (out, in_features, levels)
    rows = [row for row in load(place()).get(device, ()) if row[:3] == shape and (row[3] <= FEW) == (tokens <= FEW) and (tokens <= FUSED or row[4] != "fused")]
    if not rows or (tokens <= FEW and tokens > max(row[3] for row in rows)):
        return None
    row = min(rows, key=lambda r: (r[3] < tokens, abs(r[3] - tokens)))
    return Cut(*row[4:])


def merge(device: str, rows: list[Row], path: Path) -> None:
    """Put a device's rows into a file in place of those of the same shapes, and have later calls look again."""
    tables = load(path)
    shapes = {row[:3] for row in rows}
    tables[device] = sorted([row for row in tables.get(device, []) if row[:3] not in shapes] + rows)
    write(tables, path)
    find.cache_clear()


def write(tables: dict[str, list[Row]], path: Path) -> None:
    """One row a line, so that a change of one plan is a change of one line."""
    parts = [json.dumps(device) + ": [\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for device, rows in tables.items()]
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")

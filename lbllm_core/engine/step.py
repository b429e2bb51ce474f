"""A step: a stage as the pipeline sees it, with a name, the fields it reads and a folder it fills.

A step is a plain function `run(context) -> metrics`. It reads finished upstream folders, writes its files into its own
folder, and returns figures. Everything about *when* it may be skipped (keys, locks, manifests, checksums) is in
`engine/artifacts.py`; everything about Prefect is in `tasks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lbllm_core.config import RunConfig
from lbllm_core.engine.progress import Report

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class StepContext:
    """What a step is given. `inputs` maps an upstream role ('student', 'packed', 'teacher') to its finished folder."""

    config: RunConfig
    inputs: Mapping[str, Path]
    folder: Path
    home: Path
    report: Report


@dataclass(frozen=True)
class StepSpec:
    """A step's identity: `fields` are ALL the config fields it reads, `code` the modules whose source decides its result."""

    name: str
    fields: tuple[str, ...]
    code: tuple[str, ...]
    run: Callable[[StepContext], Metrics]
    schema: int = 1

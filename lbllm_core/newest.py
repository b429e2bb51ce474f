"""Finding the packed model that a person means: the one they name, or the newest that this home folder finished.

A packed model lies in `artifacts/pack_and_benchmark/<key>/packed`. Only folders with a manifest are finished.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lbllm_core.engine.artifacts import MANIFEST, read_manifest
from lbllm_core.errors import ArtifactError

STEP = "pack_and_benchmark"


def finished(home: Path, step: str) -> list[tuple[Path, dict[str, Any]]]:
    """Finished artifacts of a step with their manifests, newest first."""
    found = []
    for path in (home / "artifacts" / step).glob(f"*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(path.parent)
            found.append((str(manifest.get("finished", "")), path.stat().st_mtime_ns, path.parent, manifest))
    return [(folder, manifest) for _, _, folder, manifest in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def packed_folder(home: Path, named: str = "") -> Path:
    """The packed model at `named`, or the newest one of `home`. Raises ArtifactError with what to run."""
    if named:
        folder = Path(named).expanduser()
        for candidate in (folder, folder / "packed"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ArtifactError(f"{folder} holds no model (no config.json); give the folder that `make run` printed as the packed model, or one made by make export")
    for folder, _ in finished(home, STEP):
        if (folder / "packed" / "config.json").is_file():
            return folder / "packed"
    raise ArtifactError(f"no packed model in {home} yet; run `make run` first, or name one: MODEL_DIR=folder")

"""Finding the packed model that a person means: the one they name, or the newest that a run of this home folder ended with; and which run made it.

A packed model lies in `artifacts/pack_and_benchmark/<key>/packed`. Only folders with a manifest are finished. The manifest names the run that
built the folder; a run that found it there may be called otherwise, and a folder that was carried elsewhere has none: a person can say it instead.
A run packs the rows beside its final one (`stage1`, `rtn`) after it: they are newer, and not what is meant.
"""

from __future__ import annotations

import argparse
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
    """The packed model at `named`, or the newest final one of `home` (without one, the newest). Raises ArtifactError with what to run."""
    if named:
        folder = Path(named).expanduser()
        for candidate in (folder, folder / "packed"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ArtifactError(f"{folder} holds no model (no config.json); give the folder that `make run` printed as the packed model, or one made by make export")
    whole = [(folder / "packed", manifest) for folder, manifest in finished(home, STEP) if (folder / "packed" / "config.json").is_file()]
    final = [packed for packed, manifest in whole if manifest.get("made_for", {}).get("row", "final") == "final"]
    if whole:
        return final[0] if final else whole[0][0]
    raise ArtifactError(f"no packed model in {home} yet; run `make run` first, or name one: MODEL_DIR=folder")


def run_options(parser: argparse.ArgumentParser) -> None:
    """The options by which a person says which run made a packed model."""
    parser.add_argument("--model", default="", help="the model's name in the records (default: what its artifact says)")
    parser.add_argument("--experiment", default="", help="the experiment in the records (default: of the run that built it)")
    parser.add_argument("--seed", type=int, help="the seed in the records (default: of that run)")


def run_of(packed: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """`model`, `experiment` and `seed` of the run that made a packed model: what was `chosen`, else what its artifact says. Raises ArtifactError with what neither says."""
    said: dict[str, Any] = {}
    with contextlib.suppress(ArtifactError):
        said = read_manifest(packed.parent).get("made_for", {})
    given = {"model": chosen.model or said.get("model"), "experiment": chosen.experiment or said.get("experiment"), "seed": said.get("seed") if chosen.seed is None else chosen.seed}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ArtifactError(f"{packed} does not say which run made it, and records are of a model, an experiment and a seed; name what is missing: {' '.join(missing)}")
    return given

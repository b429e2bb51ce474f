"""How fast a packed model decodes beside its teacher: `python -m lbllm_core.evaluation.decode_record [--model-dir FOLDER] [--teacher FOLDER] [--out results/decode_cpu.json]`.

A packed model and its fp32 teacher on this machine's CPU, each in fresh processes (`speed.py`), in turns, so that a slow minute of the
machine meets both; a figure is the median over the turns, with the extremes beside it. The packed model is the newest of LBLLM_HOME
unless one is named; the teacher is the one that the artifact says it was made from, or an ordinary model folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.config import ModelConfig
from lbllm_core.engine.artifacts import home_folder, read_manifest
from lbllm_core.errors import ArtifactError, LbllmError
from lbllm_core.newest import packed_folder

UNITS = {"decode_tok_s": "token/s", "prefill_tok_s": "token/s", "peak_gb": "GB", "model_peak_gb": "GB", "baseline_gb": "GB", "weights_gb": "GB", "load_s": "s"}
MODEL = "model."


def teacher_config(packed: Path, folder: Path | None) -> ModelConfig:
    """The teacher of a packed artifact, or of a plain folder. Raises ArtifactError when neither says."""
    if folder is not None:
        return ModelConfig(name=folder.name, source="folder", path=str(folder.absolute()))
    try:
        fields = read_manifest(packed.parent)["parts"]["fields"]
    except (ArtifactError, KeyError) as error:
        raise ArtifactError(f"{packed} is not part of an artifact, so its teacher is not known; name it: --teacher FOLDER") from error
    return ModelConfig(**{name.removeprefix(MODEL): value for name, value in fields.items() if name.startswith(MODEL)})


def records(turns: Mapping[str, Sequence[Mapping[str, float]]], context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records in the schema of results/: medians over the turns of each engine, with the extremes."""
    made = []
    for engine, figures in turns.items():
        for name, unit in UNITS.items():
            values = [f[name] for f in figures]
            spread = {"min": min(values), "max": max(values), "turns": len(values)}
            made.append({"name": name, "value": statistics.median(values), "unit": unit, "engine": engine, **spread, **context})
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from lbllm_core.evaluation.speed import measure_packed, measure_teacher
    from lbllm_core.report.records import write_results

    parser = argparse.ArgumentParser(prog="python -m lbllm_core.evaluation.decode_record", description="Speed and memory of a packed model and its teacher.")
    parser.add_argument("--model-dir", default="")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--shape", default="smollm2_135m", help="name of the architecture in the records")
    parser.add_argument("--out", type=Path, help="a results file to write; without it the figures are only shown")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    chosen = parser.parse_args(arguments)
    try:
        home = home_folder()
        packed = packed_folder(home, chosen.model_dir)
        teacher = teacher_config(packed, chosen.teacher)
        turns: dict[str, list[Mapping[str, float]]] = {"packed": [], "fp32": []}
        for _ in range(max(1, chosen.turns)):
            turns["packed"].append(measure_packed(packed, chosen.prefill, chosen.decode, 3))
            turns["fp32"].append(measure_teacher(teacher, home, chosen.prefill, chosen.decode, 3))
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    context = {"shape": chosen.shape, "batch": 1, "context": int(turns["packed"][0]["prefill_tokens"]), "decode_tokens": chosen.decode, "threads": int(turns["packed"][0]["threads"])}
    for name, unit in UNITS.items():
        ours, theirs = (statistics.median([f[name] for f in turns[engine]]) for engine in ("packed", "fp32"))
        ratio = f"{ours / theirs:8.2f}x" if theirs else ""
        print(f"{name:14} packed {ours:10.3f}   fp32 {theirs:10.3f} {unit:8} {ratio}")
    if chosen.out:
        write_results(chosen.out, f"python -m lbllm_core.evaluation.decode_record --out {chosen.out.name}", records(turns, context))
        print(f"written: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

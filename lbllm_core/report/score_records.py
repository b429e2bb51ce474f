"""Scores files beside a record, and the rows that lm-eval makes of them in `results/method.json`.

A scores file that leaves a run carries the context of its row (`report/method.py`), so that whoever aggregates it needs neither the
run's configuration nor its artifacts. Its name is the row's: a newer one of the same row replaces the older. The teacher is nobody's
experiment: all runs of one model leave the same file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbllm_core.config import RunConfig, canonical_json
from lbllm_core.errors import ArtifactError
from lbllm_core.evaluation.request_file import Scores, read_scores, write_scores
from lbllm_core.pipeline import Finished
from lbllm_core.report.method import MEASURED, figure_records, row_context, same_row
from lbllm_core.report.records import versions, write_results
from lbllm_core.report.tables import comparison, plain

COMMAND = "python -m lbllm_core.evaluation.offline_tasks aggregate"
STEP, SCORES = "score_requests", "scores.safetensors"


def scores_folder(record: Path) -> Path:
    """Where the scores of a results file's rows lie: results/method.json -> results/method-scores."""
    return record.with_name(f"{record.stem}-scores")


def context_of(config: RunConfig, row: str, effective_bpw: float | None) -> dict[str, Any]:
    """The context of a row's accuracies; the teacher belongs to no experiment and no seed."""
    found = row_context(config, row, effective_bpw)
    return found | {"experiment": "", "seed": 0} if row == "teacher" else found


def file_name(context: Mapping[str, Any]) -> str:
    """A readable name that two rows never share and one row always has."""
    identity = canonical_json({k: v for k, v in context.items() if k not in MEASURED})
    words = [context["model"], *([context["experiment"], f"seed{context['seed']}"] if context["experiment"] else []), context["row"]]
    return f"{'-'.join(map(str, words))}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.safetensors"


def keep_scores(record: Path, config: RunConfig, finished: Sequence[Finished], rows: Sequence[Mapping[str, Any]], home: Path) -> list[Path]:
    """Copy what a run scored to the folder beside its record, each file with its row's context."""
    bits = {str(row["row"]): row.get("effective_bpw") for row in rows}
    made = []
    for done in finished:
        if done.handle.step == STEP:
            context = context_of(config, done.row, bits.get(done.row))
            made.append(scores_folder(record) / file_name(context))
            scores = read_scores(done.handle.folder(home) / SCORES)
            write_scores(made[-1], replace(scores, facts={**scores.facts, "context": context}))
    return made


def collect_scores(from_records: Sequence[Path], record: Path) -> list[Path]:
    """Copy the scores beside some records to the folder beside another."""
    made = []
    for path in (p for source in from_records for p in sorted(scores_folder(source).glob("*.safetensors"))):
        scores_folder(record).mkdir(parents=True, exist_ok=True)
        made.append(Path(shutil.copy2(path, scores_folder(record) / path.name)))
    return made


def with_context(path: Path, scores: Scores, config: RunConfig, row: str, packed: Path | None) -> None:
    """Write the scores again with the context of their row; bits a weight from the artifact that holds `packed`, where there is one."""
    beside = packed.parent / "packing.json" if packed is not None else None
    bits = json.loads(beside.read_text(encoding="utf-8"))["size"]["effective_bpw"] if beside is not None and beside.is_file() else None
    write_scores(path, replace(scores, facts={**scores.facts, "context": context_of(config, row, bits)}))


def record_figures(record: Path, results: Sequence[tuple[Scores, Mapping[str, float]]]) -> None:
    """Put accuracies into a results file, in place of older ones of the same rows. Device and versions are those of the machine that scored, of each file its own."""
    contexts = [scores.facts["context"] for scores, _ in results if "context" in scores.facts]
    if len(contexts) < len(results):
        raise ArtifactError("a scores file without the context of its row cannot be recorded; score it with its configuration (score --config run.json), or leave --record out")
    scored = [{"device": scores.facts["device"], "versions": versions() | scores.facts["versions"]} for scores, _ in results]
    found = [{**r, "measured": on} for context, on, (_, figures) in zip(contexts, scored, results, strict=True) for r in figure_records(figures, context)]
    if len({(r["name"], file_name(r)) for r in found}) < len(found):
        raise ArtifactError("two of these scores files are of the same row; leave one out")
    last = scored[-1]
    write_results(record, COMMAND, found, device=last["device"], keep=lambda old: not any(same_row(old, new) for new in found), measured_with=last["versions"])


def shown(results: Sequence[tuple[str, Scores, Mapping[str, float]]]) -> str:
    """The accuracies for a terminal, a column for each scores file; the teacher, when it is among them, is what the others are compared with."""
    rows = [{"row": "teacher" if not scores.facts["packed"] else name, **figures} for name, scores, figures in results]
    return plain(comparison(sorted(rows, key=lambda row: row["row"] != "teacher")))

"""Where the error is: by kind of linear and by block, before and after each stage; and the table of what each activation site costs.

`python -m lbllm_core.report.block_errors [--model-dir FOLDER] [--out FILE]` follows a packed model (default: the newest) back through the artifacts that it was
made from and prints the errors; with `--out` it also writes them into a results file. Nothing is measured anew: stages keep these figures as they go.

    weight_error   stage 1, each linear:  |W - W_q|^2 / |W|^2, columns weighted by the Hessian's diagonal; mean, least and largest over blocks
    block_error    |f(x) - f_q(x_q)|^2 / |f(x)|^2 of a block's output, f on the teacher's stream x, f_q on the student's own x_q, so errors of earlier blocks are in it.
                   Stage 2 with activations as they are; stages 3 and 4 with four-bit ones where the scheme has them. `before`: as the stage found the block.
                   Stages 2 and 3 measure on the first tokens of the calibration text, stage 4 on fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.engine.artifacts import MANIFEST, folder_of, home_folder, read_manifest
from lbllm_core.errors import ArtifactError, LbllmError
from lbllm_core.model.blocks import SITE_OF
from lbllm_core.newest import packed_folder, run_of, run_options
from lbllm_core.report.records import Record, write_results
from lbllm_core.report.tables import Cells, markdown

STAGE_OF = {"ptq_init": 1, "weight_distill": 2, "act_quant": 3, "end_to_end": 4}
SHOWN = 6  # blocks of a table


def student_folders(packed: Path, home: Path) -> dict[str, Path]:
    """Step -> folder of every student on the way to a packed model. Raises ArtifactError where a folder is not part of an artifact, or one has gone."""
    found: dict[str, Path] = {}
    if not (packed.parent / MANIFEST).is_file():
        raise ArtifactError(f"{packed} is not part of an artifact, so its stages are not known; name the folder that `make run` printed")
    manifest = read_manifest(packed.parent)
    while "student" in manifest["upstream"]:
        source = manifest["upstream"]["student"]
        folder = folder_of(home, source["step"], source["key"])
        manifest, found[source["step"]] = read_manifest(folder), folder
    return dict(reversed(found.items()))


def records_of(folders: Mapping[str, Path]) -> list[Record]:
    """Records of every stage that kept such figures."""
    made: list[Record] = []
    for step, folder in folders.items():
        if step == "ptq_init":
            blocks = [json.loads(path.read_text(encoding="utf-8"))["figures"] for path in sorted(folder.glob("block_*.json"))]
            for linear in SITE_OF:
                errors = [block[f"weight_error/{linear}"] for block in blocks]
                spread = {"least": min(errors), "largest": max(errors), "blocks": len(errors)}
                made.append({"name": "weight_error", "value": statistics.fmean(errors), "unit": "share of energy", "stage": 1, "linear": linear, **spread})
            continue
        curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
        for when in ("before", "after"):
            made += [{"name": "block_error", "value": v, "unit": "share of energy", "stage": STAGE_OF[step], "when": when, "block": int(i) + 1} for i, v in curves.get(f"error_{when}", ())]
    if not made:
        raise ArtifactError(f"{', '.join(map(str, folders.values())) or 'the packed model'} keeps no errors; run the stages again with this version")
    return made


def errors_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables: linears of stage 1; some blocks, before and after each later stage, and the mean over all."""
    linears = [r for r in records if r["name"] == "weight_error"]
    first: Cells = [["linear, stage 1", "mean over blocks", "least", "largest"]]
    first += [[r["linear"].rpartition(".")[2], *(f"{r[key]:.3f}" for key in ("value", "least", "largest"))] for r in linears]
    blocks = [r for r in records if r["name"] == "block_error"]
    columns = list(dict.fromkeys((r["stage"], r["when"]) for r in blocks))
    value = {(r["stage"], r["when"], r["block"]): float(r["value"]) for r in blocks}
    count = max(r["block"] for r in blocks) if blocks else 0
    shown = sorted({1 + round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if count else []
    second: Cells = [["block", *(f"{when} stage {stage}" for stage, when in columns)]]
    second += [[str(block), *(f"{value[(*column, block)]:.3f}" for column in columns)] for block in shown]
    if blocks:
        second.append([f"mean of {count}", *(f"{statistics.fmean(v for (stage, when, _), v in value.items() if (stage, when) == column):.3f}" for column in columns)])
    return f"{markdown(first)}\n{markdown(second)}"


def site_costs_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: perplexity with four-bit activations at some sites, and how far above none (`evaluation/site_costs.py`)."""
    base = next(float(r["value"]) for r in records if r["sites"] == "none")
    name = str(records[0]["name"]).removeprefix("ppl_")
    lines: Cells = [["four bits at", name, "above none"]]
    lines += [[r["sites"], f"{r['value']:.2f} ± {r['stderr']:.2f}", f"{100 * (float(r['value']) / base - 1):.1f} %"] for r in records]
    return markdown(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.report.block_errors", description="Errors of each stage on the way to a packed model.")
    parser.add_argument("--model-dir", default="", help="a packed model inside its artifact (default: the newest)")
    parser.add_argument("--out", type=Path, help="results file to write (default: none, the tables are printed)")
    run_options(parser)
    chosen = parser.parse_args(arguments)
    try:
        home = home_folder()
        packed = packed_folder(home, chosen.model_dir)
        about = run_of(packed, chosen) if chosen.out else {}
        records = [record | about for record in records_of(student_folders(packed, home))]
        if chosen.out:
            write_results(chosen.out, f"python -m lbllm_core.report.block_errors --out {chosen.out}", records)
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(errors_table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())

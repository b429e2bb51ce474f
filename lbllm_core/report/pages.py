"""The tables of README.md and docs/, generated from `results/*.json`: `python -m lbllm_core.report.pages README.md docs`.

A page holds `<!-- table: NAME -->` ... `<!-- end -->`; what stands between is replaced. Numbers are never typed by hand: a
command measured them and wrote a results file (schema: command, commit, date, device, versions, records), and the line under
each table says which. A table whose results are not there says so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import DataError
from lbllm_core.report.fault_tables import fault_table
from lbllm_core.report.kernel_tables import model_table, peers_table, product_table
from lbllm_core.report.method_tables import method_table, zero_shot_table
from lbllm_core.report.records import read_results
from lbllm_core.report.scale_tables import scale_table
from lbllm_core.report.tables import comparison, markdown, rows_of

RESULTS = Path("results")
_SLOT = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pipeline_table(content: Mapping[str, Any]) -> str:
    """The table of `make run`: a column for the teacher, each baseline and the final model."""
    return markdown(comparison(rows_of(_embedded(content))))


def times_table(content: Mapping[str, Any]) -> str:
    """Minutes a step of that run, with the total and the peak of memory."""
    mine = _embedded(content)
    lines = [["step", "row", "minutes"]]
    lines += [[r["step"], r["of_row"], f"{r['value'] / 60:.2f}" + (" (reused)" if r.get("reused") else "")] for r in mine if r["name"] == "step_s"]
    lines += [["total", "", f"{r['value'] / 60:.1f}"] for r in mine if r["name"] == "total_s"]
    peak = "".join(f"\nPeak memory of all processes: {r['value']:.1f} GB.\n" for r in mine if r["name"] == "peak_gb" and r.get("step") == "all")
    once = {"install_s": "Installing the packages", "test_s": "`make test`"}
    told = [f"{words}: {r['value'] / 60:.1f} minutes." for name, words in once.items() for r in content["records"] if r["name"] == name]
    return markdown(lines) + peak + (("\n" + " ".join(told) + "\n") if told else "")


def _embedded(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for r in content["records"] if r.get("model") == "smollm2_135m"]


def strength_table(content: Mapping[str, Any]) -> str:
    """Every row of the method at full strength and of its controls, on SmolLM2-135M-Instruct."""
    return method_table(content["records"], "smollm2_135m")


def desk_table(content: Mapping[str, Any]) -> str:
    """How long a comparison of a full store takes, and how true the time left is."""
    words = {
        "desk_compare_s": "`make compare`, from the command to the written page",
        "desk_read_s": "of it, reading the runs",
        "desk_page_s": "of it, making the HTML page",
        "desk_write_s": "writing one run into the store",
        "time_left_error": "time left after two blocks, relative error",
    }
    lines = [["what", "", ""]]
    for r in content["records"]:
        error = r["name"] == "time_left_error"
        what = words.get(r["name"], r["name"]) + (f", {r['step']}" if "step" in r else f" ({r['runs']} runs, {r['metrics_a_run']} metrics each)")
        lines.append([what, f"{100 * r['value']:.0f}" if error else f"{r['value']:.2f}", "%" if error else str(r["unit"])])
    return markdown(lines)


Table = Callable[[Mapping[str, Any]], str]
TABLES: Mapping[str, tuple[str, Table]] = MappingProxyType(
    {
        "pipeline": ("pipeline_cpu.json", pipeline_table),
        "pipeline_times": ("pipeline_cpu.json", times_table),
        "desk": ("desk.json", desk_table),
        "method": ("method.json", strength_table),
        "order": ("order_h100.json", strength_table),
        "zero_shot": ("method.json", lambda content: zero_shot_table(content["records"], "smollm2_135m")),
        "kernels_h100": ("kernels_h100.json", lambda content: product_table(content["records"], "cublas_fp16")),
        "kernels_peers": ("peers_h100.json", lambda content: peers_table(content["records"])),
        "kernels_cpu": ("kernels_cpu.json", lambda content: product_table(content["records"], "torch_fp32")),
        "decode_h100": ("decode_h100.json", lambda content: model_table(content["records"])),
        "faults": ("faults.json", lambda content: fault_table(content["records"])),
        "scale_h100": ("scale_h100.json", lambda content: scale_table(content["records"])),
        "decode_cpu": ("decode_cpu.json", lambda content: model_table(content["records"])),
    }
)


def render(name: str, results: Path = RESULTS) -> str:
    """One table with its source line. Raises DataError for a name that has no table."""
    if name not in TABLES:
        raise DataError(f"there is no table {name!r}; tables: {', '.join(TABLES)}")
    file, table = TABLES[name]
    if not (results / file).exists():
        return f"_Not measured yet: `results/{file}` is not there._\n"
    content = read_results(results / file)
    commit = re.sub(r"(?<=^[0-9a-f]{12})[0-9a-f]+", "", content["commit"])  # what says that files differed from it stays
    source = f"`{content['command']}`, commit `{commit}`, {content['date'][:10]}, {content['device']}, torch {content['versions']['torch']}"
    return f"{table(content)}\n_{source}; from `results/{file}`._\n"


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with its tables replaced."""
    return _SLOT.sub(lambda slot: slot[1] + render(slot[2], results) + slot[3], text)


def main(arguments: Sequence[str]) -> int:
    """Fill the pages that are named; folders mean their `.md` files. Prints those that changed."""
    named = [Path(a) for a in arguments]
    pages = [p for path in named for p in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            write_atomic(page, after.encode())
            print(f"{page} updated")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

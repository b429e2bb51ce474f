"""The tables of README.md and docs/, generated from `results/*.json`: `python -m lbllm_core.report.pages README.md docs`.

A page holds `<!-- table: NAME -->` ... `<!-- end -->`; what stands between is replaced. Numbers are never typed by hand: a
command measured them and wrote a results file (schema: command, commit, date, device, versions, records), and the line under
each table says which, for every way in which the records of the table were measured. A table whose results are not there says so. Seeds of one question may come from several files (`method`): then
there is a line for each file. A table may have a picture above it (`ablations`); it is drawn into the page's folder by the same command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import DataError
from lbllm_core.report.ablation_tables import ablation_tables, panels, repeats_table
from lbllm_core.report.block_errors import errors_table, site_costs_table
from lbllm_core.report.fault_tables import fault_table
from lbllm_core.report.kernel_tables import model_table, peers_table, product_table
from lbllm_core.report.method_tables import PROTOCOLS, method_table, zero_shot_table
from lbllm_core.report.plots import dot_panels
from lbllm_core.report.records import circumstances, read_results
from lbllm_core.report.scale_tables import scale_table
from lbllm_core.report.tables import comparison, markdown, rows_of

RESULTS = Path("results")
MODEL = "smollm2_135m"  # whose tables the pages show
_SLOT = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pipeline_table(content: Mapping[str, Any]) -> str:
    """The table of `make run`: a column for the teacher, each baseline and the final model."""
    return markdown(comparison(rows_of(_embedded(content))))


ONCE = MappingProxyType({"install_s": "Installing the packages", "test_s": "`make test`"})  # times of a machine, not of a model


def times_table(content: Mapping[str, Any]) -> str:
    """Minutes a step of that run, with the total and the peak of memory."""
    mine = _embedded(content)
    lines = [["step", "row", "minutes"]]
    lines += [[r["step"], r["of_row"], f"{r['value'] / 60:.2f}" + (" (reused)" if r.get("reused") else "")] for r in mine if r["name"] == "step_s"]
    lines += [["total", "", f"{r['value'] / 60:.1f}"] for r in mine if r["name"] == "total_s"]
    peak = "".join(f"\nPeak memory of all processes: {r['value']:.1f} GB.\n" for r in mine if r["name"] == "peak_gb" and r.get("step") == "all")
    told = [f"{words}: {r['value'] / 60:.1f} minutes." for name, words in ONCE.items() for r in content["records"] if r["name"] == name]
    return markdown(lines) + peak + (("\n" + " ".join(told) + "\n") if told else "")


def _embedded(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for r in content["records"] if _ours(r)]


def _ours(record: Mapping[str, Any]) -> bool:
    return record.get("model") == MODEL


def _perplexity(record: Mapping[str, Any]) -> bool:
    return _ours(record) and record["name"] in PROTOCOLS


def strength_table(content: Mapping[str, Any]) -> str:
    """Every row of the method at full strength and of its controls, on SmolLM2-135M-Instruct."""
    return method_table(content["records"], MODEL)


CPU_PROTOCOL = "ppl_embedded_16k"


def controls_table(content: Mapping[str, Any]) -> str:
    """What other formats make of the same model, and stage 1 of each level family, at the budget of a CPU."""
    return method_table(content["records"], MODEL, (CPU_PROTOCOL,))


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
SEEDS = ("method.json", "method_h200.json")  # one table of all seeds; where and when each ran stands below it


@dataclass(frozen=True)
class Source:
    """Where a table comes from: `files` of `results/` whose records `table` gets as one content, and which of the records it shows."""

    files: tuple[str, ...]
    table: Table
    shows: Callable[[Mapping[str, Any]], bool] = lambda record: True
    picture: Picture | None = None


@dataclass(frozen=True)
class Picture:
    """A picture above a table: its file, seen from the page, what it shows in words, and how it is drawn from the records into a file."""

    file: str
    words: str
    draw: Callable[[Sequence[dict[str, Any]], Path], object]


def _of(file: str, table: Callable[..., str], *more: Any) -> Source:
    return Source((file,), lambda content: table(content["records"], *more))


def ablations_picture(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a family: WikiText-2 perplexity of each variant, the recipe's as a line."""
    dot_panels(*panels(records, MODEL), path, "Ablations: WikiText-2 perplexity of each variant, the recipe's as a line", "perplexity, WikiText-2")


ABLATIONS = Picture("pictures/ablations.png", "Ablations: a panel a family, a dot a variant, the recipe's WikiText-2 perplexity as a line", ablations_picture)
TABLES: Mapping[str, Source] = MappingProxyType(
    {
        "pipeline": Source(("pipeline_cpu.json",), pipeline_table, lambda r: _ours(r) and "row" in r),
        "pipeline_times": Source(("pipeline_cpu.json",), times_table, lambda r: r["name"] in ONCE or (_ours(r) and r["name"] in ("step_s", "total_s", "peak_gb") and "row" not in r)),
        "desk": Source(("desk.json",), desk_table),
        "method": Source(SEEDS, strength_table, _perplexity),
        "order": Source(("order_h100.json",), strength_table, _perplexity),
        "controls": Source(("controls_cpu.json",), controls_table, lambda r: _ours(r) and r["name"] == CPU_PROTOCOL),
        "zero_shot": Source(SEEDS, lambda content: zero_shot_table(content["records"], MODEL), lambda r: _ours(r) and str(r["name"]).startswith("acc_")),
        "ablations": Source(("ablations_h200.json",), lambda content: ablation_tables(content["records"], MODEL), lambda r: _perplexity(r) and r["row"] in ("final", "teacher"), ABLATIONS),
        "repeats": Source(("ablations_first_h200.json", "ablations_h200.json"), lambda content: repeats_table(content["records"], MODEL), lambda r: _perplexity(r) and r["row"] == "final"),
        "kernels_h200": _of("kernels_h200.json", product_table, "cublas_fp16"),
        "kernels_h100": _of("kernels_h100.json", product_table, "cublas_fp16"),
        "kernels_peers_h200": _of("peers_h200.json", peers_table),
        "kernels_peers": _of("peers_h100.json", peers_table),
        "kernels_cpu": _of("kernels_cpu.json", product_table, "torch_fp32"),
        "decode_h200": _of("decode_h200.json", model_table),
        "decode_h100": _of("decode_h100.json", model_table),
        "errors": _of("errors_cpu.json", errors_table),
        "site_costs": _of("site_costs_cpu.json", site_costs_table),
        "faults": _of("faults.json", fault_table),
        "scale_h200": _of("scale_h200.json", scale_table),
        "scale_h100": _of("scale_h100.json", scale_table),
        "decode_cpu": _of("decode_cpu.json", model_table),
    }
)


def render(name: str, results: Path = RESULTS) -> str:
    """One table with its source lines, one for each file that it shows records of. Raises DataError for a name that has no table."""
    if name not in TABLES:
        raise DataError(f"there is no table {name!r}; tables: {', '.join(TABLES)}")
    source = TABLES[name]
    there = [file for file in source.files if (results / file).exists()]
    if not there:
        return f"_Not measured yet: {_listed(source.files)} {'is' if len(source.files) == 1 else 'are'} not there._\n"
    read = {file: read_results(results / file) for file in there}
    used = {file: content | {"records": shown} for file, content in read.items() if (shown := [r for r in content["records"] if source.shows(r)])}
    if not used:
        return f"_Not measured yet: {_listed(there)} {'holds' if len(there) == 1 else 'hold'} no such figures._\n"
    told = [source_line(file, content, len(source.files) > 1) for file, content in used.items()]
    seen = f"![{source.picture.words}]({source.picture.file})\n\n" if source.picture else ""
    return f"{seen}{source.table(merged(list(used.values())))}\n" + "\n".join(told)


def merged(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results files as one: the newest one's head, the records of all of them, what was measured first first, so that of two figures of one line and seed the newer wins."""
    ordered = sorted(contents, key=lambda content: str(content["date"]))
    dated = [(str(circumstances(content, record)["date"]), record) for content in ordered for record in content["records"]]
    return {**ordered[-1], "records": [record for _, record in sorted(dated, key=lambda pair: pair[0])]}


def source_line(file: str, content: Mapping[str, Any], with_seeds: bool = False) -> str:
    """What measured the records of a file: every distinct command, commit, day, device and torch, oldest first; after the first one only what differs from the one before.

    `with_seeds` (where several files make one table): also which seeds it holds.
    """
    ways = sorted(dict.fromkeys(_way(circumstances(content, record)) for record in content["records"]), key=lambda way: way[2])
    others = [", ".join(word for word, old in zip(way, before, strict=True) if word != old) for before, way in pairwise(ways)]
    measured = "; also ".join([", ".join(ways[0]), *others])
    seeds = sorted({int(r["seed"]) for r in content["records"] if r["row"] != "teacher"}) if with_seeds else []
    told = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})" if seeds else ""
    return f"_{measured}; from `results/{file}`{told}._\n"


def _way(measured: Mapping[str, Any]) -> tuple[str, ...]:
    """Command, commit, day, device and torch in words."""
    commit = re.sub(r"(?<=^[0-9a-f]{12})[0-9a-f]+", "", measured["commit"])  # what says that files differed from it stays
    return f"`{measured['command']}`", f"commit `{commit}`", measured["date"][:10], measured["device"], f"torch {measured['versions']['torch']}"


def _listed(files: Sequence[str]) -> str:
    return " and ".join(f"`results/{file}`" for file in files)


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with its tables replaced."""
    return _SLOT.sub(lambda slot: slot[1] + render(slot[2], results) + slot[3], text)


def draw(page: Path, results: Path = RESULTS) -> list[Path]:
    """Draw the pictures of a page's tables whose results are there, beside the page; those that are not as they were."""
    changed = []
    for name in (slot[2] for slot in _SLOT.finditer(page.read_text(encoding="utf-8"))):
        picture = TABLES[name].picture if name in TABLES else None
        there = [results / file for file in TABLES[name].files if (results / file).exists()] if picture else []
        if picture and there:
            with TemporaryDirectory() as folder:
                drawn = Path(folder) / "picture.png"
                picture.draw(merged([read_results(file) for file in there])["records"], drawn)
                content = drawn.read_bytes()
            path = page.parent / picture.file
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(exist_ok=True)
                write_atomic(path, content)
                changed.append(path)
    return changed


def main(arguments: Sequence[str]) -> int:
    """Fill the pages that are named, and draw their pictures; folders mean their `.md` files. Prints what changed."""
    named = [Path(a) for a in arguments]
    pages = [p for path in named for p in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            write_atomic(page, after.encode())
            print(f"{page} updated")
        for picture in draw(page):
            print(f"{picture} updated")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The comparison as one HTML page: everything is in the file, nothing is fetched, every number leads to its run.

    comparison   main results, zero-shot, ablations   perplexity against bits   errors by block   losses   activations   cost   samples
    what differs   lineage   not finished

Made from values alone: rows of the lab book, and for some runs what their steps kept (curves, histograms, sample texts). A run that
kept nothing, because it was made by an earlier version or has not come so far, is named as such and left out of the pictures. Curves of
many runs in one picture cannot be told apart, so the `MOST_DRAWN` best are drawn.

The page (`desk.html.j2`) has no script and forbids itself to load anything. It adapts to a phone, to paper and to a dark screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbllm_core.report.ablations import Published, tables
from lbllm_core.report.plots import COLOURS, Line, bits_chart, cost_chart, histogram_chart, lines_chart
from lbllm_core.report.runs import RunRow, differences, lineage_table, measured, run_table, teacher_table
from lbllm_core.report.standing import Entry, Table, standings
from lbllm_core.report.tables import Cells, counted

TEMPLATE = "desk.html.j2"
MOST_DRAWN = len(COLOURS)
MOST_HISTOGRAMS = 2  # runs
BLOCK_STEPS = {"ptq_init": "stage 1", "weight_distill": "stage 2", "act_quant": "stage 3", "end_to_end": "stage 4"}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Kept:
    """What a run's steps left beside their figures, as read from their JSON files, by step. `samples`: prompt, teacher, packed."""

    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] = field(default_factory=dict)
    activations: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Chart:
    """A picture (SVG) and what is to be known about it."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Page:
    """What the page is about beside the rows: its name, the question, when it was read, MLflow's pages by title, and published rows."""

    name: str
    read_on: str
    question: str = ""
    addresses: Mapping[str, str] = field(default_factory=dict)
    published: Published = field(default_factory=dict)


def drawn(rows: Sequence[RunRow]) -> list[RunRow]:
    """The runs whose curves are drawn: the best of those that have begun, by the first perplexity over its teacher's, then in their order."""
    begun = [row for row in rows if row.run_id and row.text("scheme.weight_bits") != "16"]
    name = next((n for n in measured(rows) if n.startswith("ppl_")), "")

    def rank(row: RunRow) -> float:
        value, teacher = row.value(name), row.of_teacher(name)
        return value / teacher if value is not None and teacher else float("inf")

    return sorted(begun, key=rank)[:MOST_DRAWN]


def points(rows: Sequence[RunRow]) -> dict[str, list[dict[str, Any]]]:
    """For each perplexity the runs that have it, as plain values for a plot, and their teachers at 16 bits."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in (n for n in measured(rows) if n.startswith("ppl_")):
        for row in rows:
            bits, value = row.figures.get("size/effective_bpw"), row.value(name)
            if bits is not None and value is not None:
                point = {"title": row.title, "model": row.text("model.name"), "bits": bits, "value": value, "error": row.value(f"{name}_stderr") or 0.0}
                found.setdefault(name, []).append(point | {"teacher": row.of_teacher(name), "link": row.link, "minutes": row.minutes})
    return found


def render(rows: Sequence[RunRow], kept: Mapping[str, Kept], page: Page) -> str:
    """The page. `kept`: by run id, for the runs of `drawn`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    shown = drawn(rows)
    of_bits = [(name, found) for name, found in points(rows).items() if found]
    costs = [(name, [p for p in found if p["minutes"]]) for name, found in of_bits]
    with_histograms = [row for row in shown if kept.get(row.run_id, Kept()).activations.get("act_quant")]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"svg": Markup, "counted": counted}
    return environment.get_template(TEMPLATE).render(
        page=page,
        counts=_counts(rows),
        total=len(rows),
        comparison=comparison(rows),
        teachers=_plain_table("Teachers", teacher_table(rows), []),
        ablations=tables(rows, page.published),
        bits=[Chart(bits_chart(found, name)) for name, found in of_bits],
        costs=[Chart(cost_chart(found, name)) for name, found in costs if found],
        minutes=minutes_table(rows),
        legend=[(row, COLOURS[i]) for i, row in enumerate(shown)],
        not_drawn=sum(bool(row.run_id) for row in rows) - len(shown),
        errors=error_charts(shown, kept),
        losses=loss_charts(shown, kept),
        without=without_curves(shown, kept),
        histograms=[(row, activation_charts(row, kept[row.run_id])) for row in with_histograms[:MOST_HISTOGRAMS]],
        histograms_left=len(with_histograms) - len(with_histograms[:MOST_HISTOGRAMS]),
        samples=[(row, kept[row.run_id].samples) for row in shown if kept.get(row.run_id, Kept()).samples],
        differs=_plain_table("What differs", differences(rows), [row for row in rows if row.run_id]),
        lineage=_plain_table("Lineage", lineage_table([row for row in rows if row.run_id]), [row for row in rows if row.run_id]),
        failures=[row for row in rows if row.error],
    )


def comparison(rows: Sequence[RunRow]) -> Table:
    """The first table: a line a run, figures marked as best or tied, each leading to its run."""
    cells = run_table(rows)
    marks = {name: standings(rows, name) for name in measured(rows)}
    lines = [
        [[Entry(text, marks.get(head, {}).get(place, ""), (row.link or (row.error and head == "state" and "#failures") or "") if text else "")] for head, text in zip(cells[0], cells[place + 1], strict=True)]
        for place, row in enumerate(rows)
    ]
    return Table("Comparison", cells[0], lines)


def minutes_table(rows: Sequence[RunRow]) -> Table:
    """Minutes of each step that a run's final model took, work of earlier runs included."""
    own = [row for row in rows if any(name.startswith("minutes/") for name in row.figures)]
    steps = list(dict.fromkeys(name.partition("/")[2] for row in own for name in row.figures if name.startswith("minutes/")))
    lines = []
    for row in own:
        found = [row.figures.get(f"minutes/{step}") for step in steps]
        cells = [Entry("" if value is None else f"{value:.2f}", link=row.link) for value in found]
        total = Entry("" if row.minutes is None else f"{row.minutes:.1f}", link=row.link)
        lines.append([[Entry(row.title, link=row.link)], *([cell] for cell in cells), [total]])
    return Table("Minutes of work by step", ["", *steps, "all, with the teacher's evaluation"], lines)


def error_charts(rows: Sequence[RunRow], kept: Mapping[str, Kept]) -> list[Chart]:
    """A picture a stage: the error of each block before it (dashed) and after it, a colour a run."""
    charts = []
    for step, stage in BLOCK_STEPS.items():
        names = (("weight_error", False),) if step == "ptq_init" else (("error_before", True), ("error_after", False))
        lines = [
            Line([(x + 1, y) for x, y in found], i, dashed)
            for i, curves in _once(rows, kept, step)
            for name, dashed in names
            if (found := _points(curves.get(name) or (curves.get("block_rel_mse") if name == "error_after" else None)))
        ]
        if lines:
            what = "weighted error of the weights" if step == "ptq_init" else "relative error of the outputs"
            caption = "after it; before it there are no codes" if step == "ptq_init" else "before - - -, after ———"
            charts.append(Chart(lines_chart(lines, f"{stage}: {what}", "block", "error"), caption + _shared(rows, kept, step)))
    return charts


def loss_charts(rows: Sequence[RunRow], kept: Mapping[str, Kept]) -> list[Chart]:
    """A picture a stage that trains: its loss as it trains, over blocks (stages 2 and 3) or steps (stage 4)."""
    charts = []
    for step, stage in BLOCK_STEPS.items():
        lines = []
        for i, curves in _once(rows, kept, step):
            found = _points(curves.get("loss"))
            if found:
                lines.append(Line([(x + 1, y) for x, y in found] if step == "end_to_end" else found, i))
            else:
                ends = zip(_points(curves.get("loss_before")), _points(curves.get("loss_after")), strict=False)
                coarse = [point for (x, before), (_, after) in ends for point in ((x, before), (x + 1, after))]
                lines += [Line(coarse, i)] if coarse else []
        if lines:
            charts.append(Chart(lines_chart(lines, f"{stage}: loss", "step" if step == "end_to_end" else "blocks done", "loss"), _shared(rows, kept, step).lstrip("; ")))
    return charts


def without_curves(rows: Sequence[RunRow], kept: Mapping[str, Kept]) -> list[str]:
    """Sentences about what the pictures cannot show."""
    nothing = [row for row in rows if not kept.get(row.run_id, Kept()).curves]
    told = [f"{row.title} ({row.state}) has kept no curves" for row in nothing]
    earlier = [row for row in rows if row not in nothing and not any("error_before" in curves for curves in kept[row.run_id].curves.values())]
    return told + [f"{row.title}: the error before a stage was not measured (no such stage, or a run of an earlier version)" for row in earlier]


def activation_charts(row: RunRow, kept: Kept) -> list[str]:
    """A picture a site: histograms of the first, middle and last block with their clips and knees; none where none were kept."""
    blocks = kept.activations.get("act_quant", ())
    last = kept.activations.get("end_to_end", ())
    if not blocks:
        return []
    piecewise = row.text("scheme.act_variant") == "piecewise"
    charts = []
    for site in blocks[0]:
        panels = []
        for index in sorted({0, len(blocks) // 2, len(blocks) - 1}):
            about = blocks[index].get(site, {})
            learned = (last[index].get(site, {}) if index < len(last) else {}).get("learned") or about.get("learned", ())
            if about.get("counts"):
                panels.append((f"block {index + 1}", about["counts"], _factors(learned, piecewise), _factors(about.get("searched", ()), piecewise)))
        if panels:
            charts.append(histogram_chart(panels, f"inputs of {site}"))
    return charts


def _factors(values: Sequence[float], piecewise: bool) -> list[float]:
    return [*values[:2], *(values[2:] if piecewise else (0.0, 0.0))] if values else []


def _once(rows: Sequence[RunRow], kept: Mapping[str, Kept], step: str) -> list[tuple[int, Mapping[str, Sequence[Sequence[float]]]]]:
    """(place, curves of the step) of each run that has them; runs that share the artifact are drawn once, in the first one's colour."""
    found, seen = [], set[str]()
    for i, row in enumerate(rows):
        curves, key = kept.get(row.run_id, Kept()).curves.get(step), row.lineage.get(step, row.run_id)
        if curves and key not in seen:
            seen.add(key)
            found.append((i, curves))
    return found


def _shared(rows: Sequence[RunRow], kept: Mapping[str, Kept], step: str) -> str:
    """Which runs one line stands for, as the end of a caption; empty when each has its own."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if kept.get(row.run_id, Kept()).curves.get(step):
            groups.setdefault(row.lineage.get(step, row.run_id), []).append(row.title)
    return "".join(f"; one line for the same artifact: {', '.join(titles)}" for titles in groups.values() if len(titles) > 1)


def _points(values: Sequence[Sequence[float]] | None) -> Points:
    return [(float(x), float(y)) for x, y in values or ()]


def _plain_table(title: str, cells: Cells, rows: Sequence[RunRow]) -> Table:
    """Cells as a table; with `rows`, whose lines these are, the first column leads to the runs."""
    if len(cells) < 2:
        return Table(title, [], [])
    links = [row.link for row in rows] if rows else [""] * (len(cells) - 1)
    lines = [[[Entry(text, link=link if column == 0 else "")] for column, text in enumerate(line)] for line, link in zip(cells[1:], links, strict=True)]
    return Table(title, cells[0], lines)


def _counts(rows: Sequence[RunRow]) -> list[tuple[int, str]]:
    states = dict.fromkeys(row.state for row in rows)
    return [(sum(row.state == state for row in rows), state) for state in states]

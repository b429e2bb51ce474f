"""Plots as PNG files, and as SVG for a page: perplexity bars, points, curves, histograms, dots. The only matplotlib import.

Drawn on the Agg canvas directly, without pyplot: no window, no global state, safe in threads. Equal data give equal bytes
(no date in the file), so a cached step's plots are stable. An SVG is a fragment for an HTML page: no address in it but those of the
runs that its points lead to, transparent, letters as shapes so that they lie the same in every browser.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

SPARE: Mapping[str, float] = MappingProxyType({"left": 0.75, "right": 0.15, "top": 0.35, "bottom": 0.5})  # inches around the axes of a chart
MOST_LABELS = 14  # points that are called by name; of more, those on the Pareto lines
MOST_LINES = 60  # of a table that is a picture
DOT_INCHES, PANEL_INCHES = 0.17, 0.4  # of `dot_panels`: a line, and what a panel has above and below its lines
FARTHEST = 2.0  # times the recipe's value: how far its axis goes
LINE_POINTS, LETTER_POINTS = 9.5, 4.2  # height of a label and width of its letters, in points
COLOURS = ("#4c566a", "#b0403a", "#d08a3e", "#3a7ca5", "#4f8f5b", "#7b5ea7")


@dataclass(frozen=True)
class Line:
    """A curve of `lines_chart`: points `(x, y)`, the number of its run's colour, dashed for what was before."""

    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def _figure(width: float, height: float, margins: Mapping[str, float] | None = None) -> tuple[Any, Any]:
    """A figure and its axes. Without margins (inches: left, right, top, bottom) they are fitted to the labels, which takes three drawings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if margins:
        figure.subplots_adjust(margins["left"] / width, margins["bottom"] / height, 1 - margins["right"] / width, 1 - margins["top"] / height)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return path


def as_svg(figure: Any, label: str) -> str:
    """A figure as an SVG fragment for an HTML page; `label` is what it is called for those who cannot see it."""
    import html

    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "lbllm", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    view = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"<svg[^>]*>", f'<svg {view[0] if view else ""} role="img" aria-label="{html.escape(label)}">', text, count=1)
    prefix = "s" + sha256(text.encode()).hexdigest()[:8] + "-"  # names must not meet those of another picture of the page
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}", text)


def bars(values: Mapping[str, float], path: Path, title: str, label: str, errors: Mapping[str, float] | None = None) -> Path:
    """One bar a model, its value written on it. The axis is logarithmic when the values span more than tenfold."""
    figure, axes = _figure(max(4.0, 1.3 * len(values)), 3.6)
    names, heights = list(values), list(values.values())
    spread = [errors.get(n, 0.0) for n in names] if errors else None
    drawn = axes.bar(range(len(names)), heights, yerr=spread, capsize=3, color=[COLOURS[i % len(COLOURS)] for i in range(len(names))])
    axes.bar_label(drawn, labels=[f"{v:.3g}" for v in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    if min(heights) > 0 and max(heights) > 10 * min(heights):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    return _save(figure, path)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, x_label: str, y_label: str, log: bool = True, log_x: bool = False) -> Path:
    """One line a name, from (x, y) pairs, such as the error of each block. `log`: logarithmic y when every value is positive."""
    figure, axes = _figure(6.4, 3.6)
    for index, (name, points) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, marker="o", markersize=3, linewidth=1.2, **style)
    if log and all(y > 0 for points in lines.values() for _, y in points):
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def perplexity_bars(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """A bar plot for each perplexity protocol in the result rows: `<folder>/<protocol>.png`."""
    from lbllm_core.report.tables import ROW_TITLES

    protocols = list(dict.fromkeys(n for row in rows for n in row if n.startswith("ppl_") and not n.endswith("_stderr")))
    drawn = []
    for name in protocols:
        measured = [row for row in rows if isinstance(row.get(name), (int, float))]
        values = {ROW_TITLES.get(str(r["row"]), str(r["row"])): float(r[name]) for r in measured}
        errors = {ROW_TITLES.get(str(r["row"]), str(r["row"])): float(r.get(f"{name}_stderr", 0.0)) for r in measured}
        drawn.append(bars(values, folder / f"{name}.png", name, "perplexity", errors))
    return drawn


def table_picture(cells: Sequence[Sequence[str]], path: Path, title: str) -> Path:
    """A table as a picture: the first column to the left, the others to the right, a light band on every second line.

    Of a very long one only the first lines: a picture is for showing around, the report has everything.
    """
    if len(cells) > MOST_LINES + 1:
        left_out = [f"... {len(cells) - MOST_LINES - 1} more", *[""] * (len(cells[0]) - 1)]
        cells = [*cells[: MOST_LINES + 1], left_out]
    widths = [max(len(line[i]) for line in cells) + 2 for i in range(len(cells[0]))]
    total, lines = sum(widths), len(cells)
    figure, axes = _figure(max(4.0, 0.085 * total), 0.3 * lines + 0.6, {"left": 0.1, "right": 0.1, "top": 0.35, "bottom": 0.1})
    axes.set_axis_off()
    axes.set_xlim(0, total)
    axes.set_ylim(lines, -0.6)
    axes.set_title(title, fontsize=10, loc="left")
    for row, line in enumerate(cells):
        if row and row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color="#f1f3f6", linewidth=0)
        left = 0
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            at, side = (left + 0.5, "left") if column == 0 else (left + width - 0.5, "right")
            axes.text(at, row, cell.replace("$", r"\$"), ha=side, va="center", fontsize=8.5, fontweight="bold" if row == 0 else "normal")
            left += width
    axes.axhline(0.5, color="#4c566a", linewidth=0.8)
    return _save(figure, path)


def perplexity_against_bits(points: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path, name: str) -> list[Path]:
    """For each protocol `<folder>/<name>-<protocol>.png`: perplexity over bits a weight, a colour a model, the Pareto line of each.

    `points`: by protocol, dictionaries with `title, model, bits, value, error, teacher` and `link`; the teacher is a dashed line.
    """
    return [_save(_against_bits(measured, protocol), folder / f"{name}-{protocol}.png") for protocol, measured in points.items()]


def bits_chart(measured: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """The same picture for one protocol, as SVG whose points lead to their runs."""
    return as_svg(_against_bits(measured, protocol), f"{protocol} against effective bits")


def cost_chart(measured: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """Perplexity over minutes of work, as SVG; points as in `perplexity_against_bits`, with `minutes`."""
    figure = _scatter([dict(p) | {"at": p["minutes"]} for p in measured], f"{protocol}: perplexity against minutes of work", "minutes, stages to evaluation")
    return as_svg(figure, f"{protocol} against minutes")


def _against_bits(measured: Sequence[Mapping[str, Any]], protocol: str) -> Any:
    return _scatter([dict(p) | {"at": p["bits"]} for p in measured], f"{protocol}: perplexity against effective bits", "bits a weight, everything counted")


def _scatter(measured: Sequence[Mapping[str, Any]], title: str, label: str) -> Any:
    """Perplexity `value` over `at`: points with error bars, a colour a model, the Pareto line of each, teachers as dashed lines."""
    from lbllm_core.report.runs import pareto

    figure, axes = _figure(7.2, 4.4, SPARE)
    models = list(dict.fromkeys(str(p["model"]) for p in measured))
    values = [float(p["value"]) for p in measured] + [float(p["teacher"]) for p in measured if p["teacher"]]
    if max(values) > 4 * min(values) > 0:
        _readable_log_axis(axes)
    edges: set[tuple[float, float]] = set()
    for index, model in enumerate(models):
        own, colour = [p for p in measured if p["model"] == model], COLOURS[index % len(COLOURS)]
        x, y = [p["at"] for p in own], [p["value"] for p in own]
        axes.errorbar(x, y, yerr=[p["error"] for p in own], fmt="none", capsize=2.5, elinewidth=0.9, ecolor=colour)
        axes.scatter(x, y, s=26, color=colour, zorder=3).set_urls([p.get("link") or None for p in own])
        edge = pareto([(float(p["at"]), float(p["value"])) for p in own])
        edges |= set(edge)
        axes.plot([at for at, _ in edge], [value for _, value in edge], color=colour, linewidth=1, alpha=0.5)
        for teacher in sorted({float(p["teacher"]) for p in own if p["teacher"]}):
            axes.axhline(teacher, color=colour, linewidth=1, linestyle="--")
            axes.annotate(f"{model}, teacher {teacher:.3g}", (1, teacher), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8, color=colour)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.08, y=0.12)
    few = len({(p["at"], p["value"]) for p in measured}) <= MOST_LABELS
    _label_points(figure, axes, [p for p in measured if few or (float(p["at"]), float(p["value"])) in edges])
    return figure


def _label_points(figure: Any, axes: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    """Write each point's name beside it, towards the middle; names that would overlap are moved apart and tied by a thin line."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # fixes the layout, so that data have a place on the page
    places: dict[tuple[float, float], list[str]] = {}
    for p in measured:
        places.setdefault((float(p["at"]), float(p["value"])), []).append(str(p["title"]).removeprefix(f"{p['model']} ").removeprefix("ablation_"))
    points = {place: axes.transData.transform(place) * 72 / figure.dpi for place in places}
    names = {place: ", ".join(titles if len(titles) <= 3 else [*titles[:2], f"{len(titles) - 2} more"]) for place, titles in places.items()}
    edges = [x * 72 / figure.dpi for x in axes.get_window_extent().intervalx]
    on_right = {place: _goes_right(place, points, LETTER_POINTS * len(names[place]), edges) for place in places}
    for right in (True, False):
        own = sorted((place for place in places if on_right[place] == right), key=lambda place: float(points[place][1]))
        for place, height in zip(own, apart([float(points[place][1]) for place in own], LINE_POINTS), strict=True):
            shift = height - float(points[place][1])
            tie = {"arrowstyle": "-", "color": "#9aa3b2", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if abs(shift) > 2 else None
            text = axes.annotate(names[place], place, xytext=(12 if right else -12, shift), textcoords="offset points", ha="left" if right else "right", va="center", fontsize=7.5, arrowprops=tie)
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # lines behind it do not cut its letters


def _goes_right(place: tuple[float, float], points: Mapping[tuple[float, float], Any], width: float, edges: Sequence[float]) -> bool:
    """On which side of its point a name is written: towards the middle, unless another point lies there and none on the other side."""
    x, y = points[place]
    beside = [float(p[0] - x) for p in points.values() if 0 < abs(p[0] - x) < width + 16 and abs(p[1] - y) < LINE_POINTS]
    inwards = bool(x <= sum(edges) / 2)
    free = {right: not any((dx > 0) == right for dx in beside) and (x + width + 12 < edges[1] if right else x - width - 12 > edges[0]) for right in (True, False)}
    return inwards if free[inwards] or not free[not inwards] else not inwards


def dot_panels(panels: Sequence[tuple[str, Sequence[tuple[str, float]]]], recipe: float | None, path: Path, title: str, label: str) -> Path:
    """Small multiples in three columns: a panel a title, a dot a name with its value beside it, the recipe's value as a line through all and behind the title.

    One logarithmic axis for all panels, so that distances compare. It ends at `FARTHEST` times the recipe: what lies beyond is a triangle at the edge.
    """
    columns = in_columns([DOT_INCHES * len(dots) + PANEL_INCHES for _, dots in panels], 3)
    values = [value for _, dots in panels for _, value in dots] + ([recipe] if recipe else [])
    low, high = min(values), min(max(values), FARTHEST * (recipe or min(values)))
    span = math.log(high / low) or 1.0
    limits = (low * math.exp(-0.06 * span), high * math.exp(0.3 * span))  # room for the numbers to the right
    height = max(sum(DOT_INCHES * len(panels[i][1]) + PANEL_INCHES for i in column) for column in columns) + 1.0
    width = 4.2 * len(columns)
    figure, whole = _figure(width, height, {"left": 0.1, "right": 0.1, "top": 0.4, "bottom": 0.1})
    whole.set_axis_off()
    whole.set_title(title + (f" ({recipe:.1f})" if recipe else ""), fontsize=11, loc="left")
    for place, column in enumerate(columns):
        top = height - 0.5
        for index in column:
            name, dots = panels[index]
            tall = DOT_INCHES * len(dots)
            top -= PANEL_INCHES - 0.08
            axes = figure.add_axes(((4.2 * place + 1.6) / width, (top - tall) / height, 2.45 / 4.2 / len(columns), tall / height))
            _dots(axes, name, dots, recipe, limits, last=index == column[-1], label=label)
            top -= tall + 0.08
    return _save(figure, path)


def _dots(axes: Any, name: str, dots: Sequence[tuple[str, float]], recipe: float | None, limits: tuple[float, float], last: bool, label: str) -> None:
    """One panel of `dot_panels`; the last of its column has the numbers of the axis."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(len(dots) - 0.5, -0.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter() if last else NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.tick_params(axis="both", labelsize=8, length=2)
    axes.grid(axis="x", color="#e4e7ec", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_yticks(range(len(dots)), [words for words, _ in dots])
    axes.set_title(name, fontsize=8.5, loc="left", x=-0.62, pad=3, fontweight="bold")
    if recipe is not None:
        axes.axvline(recipe, color=COLOURS[1], linewidth=1)
    edge = limits[0] * (limits[1] / limits[0]) ** 0.84
    for row, (_, value) in enumerate(dots):
        beyond = value > edge
        at = edge if beyond else value
        axes.plot([at], [row], marker=">" if beyond else "o", markersize=4.5, color=COLOURS[3])
        text = axes.annotate(f"{value:.1f}" if value < 1000 else f"{value:.0f}", (at, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # the recipe's line does not cut its digits
    if last:
        axes.set_xlabel(label, fontsize=8)


def in_columns(heights: Sequence[float], most: int) -> list[list[int]]:
    """Places 0, 1, ... in their order, in at most `most` columns, the tallest of which is as low as it can be."""

    def filled(limit: float) -> list[list[int]]:
        columns: list[list[int]] = [[]]
        for place, height in enumerate(heights):
            if columns[-1] and sum(heights[i] for i in columns[-1]) + height > limit:
                columns.append([])
            columns[-1].append(place)
        return columns

    limits = sorted({sum(heights[i:j]) for j in range(1, len(heights) + 1) for i in range(j)})
    return next(columns for columns in map(filled, limits) if len(columns) <= most)


def lines_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """Curves as SVG, in the colour of their run; y is logarithmic when everything is positive. The legend is the reader's affair."""
    figure, axes = _figure(5.2, 3.2, SPARE)
    for line in lines:
        few = len(line.points) <= 40
        axes.plot(
            [x for x, _ in line.points], [y for _, y in line.points], color=COLOURS[line.colour % len(COLOURS)], linestyle="--" if line.dashed else "-",
            linewidth=1.1, marker="o" if few else None, markersize=2.5, alpha=0.75 if line.dashed else 1.0,
        )
    values = [y for line in lines for _, y in line.points]
    if min(values) > 0:
        if max(values) < 30 * min(values):
            _readable_log_axis(axes)
        else:
            axes.set_yscale("log")
    xs = [x for line in lines for x, _ in line.points]
    if all(float(x).is_integer() for x in xs):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    return as_svg(figure, title)


def histogram_chart(blocks: Sequence[tuple[str, Sequence[int], Sequence[float], Sequence[float]]], title: str) -> str:
    """Histograms of one site one above the other, with their clips (outer pair of lines) and knees (inner pair), as SVG.

    `blocks`: `(name, counts over -1..1, learned, searched)`, the last two as `clip_max, clip_min, knee_low, knee_high`; `searched` (dotted)
    may be empty, knees are drawn where they are above 0. Heights are logarithms of counts, each histogram over its own largest.
    """
    figure, axes = _figure(5.2, 0.9 * len(blocks) + 0.8, SPARE)
    for place, (_, counts, learned, searched) in enumerate(reversed(blocks)):
        edges = [-1 + 2 * i / len(counts) for i in range(len(counts) + 1)]
        top = math.log1p(max(counts))
        axes.stairs([place + 0.85 * math.log1p(c) / top for c in counts], edges, fill=True, color="#9db4c9", baseline=place)
        for factors, style in ((searched, ":"), (learned, "-")):
            if factors:
                clip_max, clip_min, knee_low, knee_high = factors
                axes.vlines([clip_max, -clip_min], place, place + 0.92, colors=COLOURS[1], linestyles=style, linewidth=1.2)
                axes.vlines([x for x in (knee_high * clip_max, -knee_low * clip_min) if x], place, place + 0.92, colors=COLOURS[4], linestyles=style, linewidth=1.2)
    axes.set_yticks([i + 0.4 for i in range(len(blocks))], [name for name, *_ in reversed(blocks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("share of the token's range", fontsize=8)
    axes.set_title(title, fontsize=9)
    return as_svg(figure, title)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as it takes to lie `gap` apart: what is too close becomes a block around its mean."""
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _spread(blocks[-1], gap)[0] - _spread(blocks[-2], gap)[-1] < gap:
            last = blocks.pop()
            blocks[-1] += last
    return [height for block in blocks for height in _spread(block, gap)]


def _spread(block: Sequence[float], gap: float) -> list[float]:
    lowest = sum(block) / len(block) - gap * (len(block) - 1) / 2
    return [lowest + gap * i for i in range(len(block))]


def _readable_log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())

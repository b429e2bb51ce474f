"""Plots as PNG files: perplexity bars and curves over blocks. The only matplotlib import.

Drawn on the Agg canvas directly, without pyplot: no window, no global state, safe in threads. Equal data give equal bytes
(no date in the file), so a cached step's plots are stable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#4c566a", "#b0403a", "#d08a3e", "#3a7ca5", "#4f8f5b", "#7b5ea7")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return path


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


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, x_label: str, y_label: str, log: bool = True) -> Path:
    """One line a name, from (x, y) pairs, such as the error of each block. `log`: logarithmic y when every value is positive."""
    figure, axes = _figure(6.4, 3.6)
    for index, (name, points) in enumerate(lines.items()):
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, color=COLOURS[index % len(COLOURS)], marker="o", markersize=3, linewidth=1.2)
    if log and all(y > 0 for points in lines.values() for _, y in points):
        axes.set_yscale("log")
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
    """A table as a picture: the first column to the left, the others to the right, a light band on every second line."""
    widths = [max(len(line[i]) for line in cells) + 2 for i in range(len(cells[0]))]
    total, lines = sum(widths), len(cells)
    figure, axes = _figure(max(4.0, 0.085 * total), 0.3 * lines + 0.6)
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

    `points`: by protocol, dictionaries with `title, model, bits, value, error, teacher`; the teacher is a dashed line.
    """
    return [_scatter(measured, protocol, folder / f"{name}-{protocol}.png") for protocol, measured in points.items()]


def _scatter(measured: Sequence[Mapping[str, Any]], protocol: str, path: Path) -> Path:
    from lbllm_core.report.runs import pareto

    figure, axes = _figure(7.2, 4.4)
    models = list(dict.fromkeys(str(p["model"]) for p in measured))
    values = [float(p["value"]) for p in measured] + [float(p["teacher"]) for p in measured if p["teacher"]]
    if max(values) > 4 * min(values) > 0:
        _readable_log_axis(axes)
    for index, model in enumerate(models):
        own, colour = [p for p in measured if p["model"] == model], COLOURS[index % len(COLOURS)]
        axes.errorbar([p["bits"] for p in own], [p["value"] for p in own], yerr=[p["error"] for p in own], fmt="o", markersize=5, capsize=2.5, linewidth=0, elinewidth=0.9, color=colour, label=model)
        edge = pareto([(float(p["bits"]), float(p["value"])) for p in own])
        axes.plot([x for x, _ in edge], [y for _, y in edge], color=colour, linewidth=1, alpha=0.5)
        for teacher in sorted({float(p["teacher"]) for p in own if p["teacher"]}):
            axes.axhline(teacher, color=colour, linewidth=1, linestyle="--")
            axes.annotate(f"{model}, teacher {teacher:.3g}", (1, teacher), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8, color=colour)
    _label_points(axes, measured, models)
    axes.set_xlabel("bits a weight, everything counted")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{protocol}: perplexity against effective bits", fontsize=10)
    axes.margins(x=0.18, y=0.12)
    return _save(figure, path)


def _label_points(axes: Any, measured: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """Write each point's name beside it; points at one place share a label (several seeds), neighbours go to alternate sides."""
    places: dict[tuple[float, float], list[str]] = {}
    for p in measured:
        places.setdefault((float(p["bits"]), float(p["value"])), []).append(str(p["title"]).removeprefix(f"{p['model']} "))
    for index, ((bits, value), titles) in enumerate(sorted(places.items())):
        left = index % 2 == 1
        axes.annotate(", ".join(titles), (bits, value), xytext=(-7 if left else 7, 0), textcoords="offset points", ha="right" if left else "left", va="center", fontsize=7.5)


def _readable_log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())

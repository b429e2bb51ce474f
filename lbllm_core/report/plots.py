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

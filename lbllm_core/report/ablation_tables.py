"""The ablations of docs/results.md from `results/ablations_*.json`: a table a family, each line a variant beside the recipe that it changes.

The experiments are `ablation_<family>_<variant>`, laid over the recipe `method_ablations` (`base=method_ablations`). Only a run's final
row counts: bits a weight, the perplexities of the packed model, and how far each lies from the first line of its table, in per cent. That line is
the recipe's own, but for families that change more than their title says (`MEASURED_FROM`): theirs is the run that differs by the title alone.

Some of these files mean the same run once they lie over that recipe (`SAME_RUN`), and such a run is measured once. A variant that is the
recipe itself has no line: the recipe's line bears its name. A variant that is another family's variant has a line that says so.
How far two runs of one seed lie apart is told by runs that were measured twice (`repeats_table`): what lies closer says nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lbllm_core.report.ablations import FAMILIES, family_of
from lbllm_core.report.method_tables import PROTOCOLS, spread
from lbllm_core.report.records import Record
from lbllm_core.report.tables import Cells, markdown

RECIPE = "method_ablations"
# Experiments that are one configuration over RECIPE, but for their names; tests/conf/test_base.py holds this to the files.
SAME_RUN: tuple[tuple[str, ...], ...] = (
    (RECIPE, "ablation_aar_none", "ablation_act_piecewise", "ablation_levels_codebook256_g16", "ablation_order_heaviest", "ablation_smoothing_on",
     "ablation_snap_on", "ablation_stage4_on", "ablation_target_teacher", "ablation_wat_all"),
    ("ablation_beta_annealed", "ablation_bitmap_start_soft", "ablation_pairing_low_high", "ablation_wat_latent_all"),
    ("ablation_group_size_064", "ablation_levels_explicit_g64"),
)  # fmt: skip
# What the variants of a family are compared with where that is not the recipe: the rest of what they change is in it too.
MEASURED_FROM: Mapping[str, str] = MappingProxyType(
    {
        "init": "ablation_init_em",  # stored levels, no smoothing
        "group_size": "ablation_levels_explicit_g64",
        "beta": "ablation_beta_annealed",  # stored levels, latent weight and bitmap
        "bitmap_start": "ablation_beta_annealed",
        "pairing": "ablation_beta_annealed",
        "data_source": "ablation_data_size_128",
        "joint": "ablation_stages_wat_aar",  # no stage 4
    }
)
BITS = "effective_bpw"
Figures = Mapping[str, Mapping[int, float]]  # figure -> seed -> value


@dataclass(frozen=True)
class Variant:
    """A line: its name within the family, the figures of its run, and the experiment that was run where that has another name."""

    name: str
    figures: Figures
    run_as: str = ""


@dataclass(frozen=True)
class Family:
    """One ablation: its title, the word its experiments begin with, the line that the others are compared with (no figures: it was not measured), and those."""

    title: str
    prefix: str
    first: Variant
    variants: tuple[Variant, ...]


def figures_of(records: Iterable[Record], model: str) -> dict[str, dict[str, dict[int, float]]]:
    """Experiment -> figure -> seed -> value of the final rows; the teacher's stand under an empty experiment."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for r in records:
        if r["model"] == model and r["name"] in PROTOCOLS and r["row"] in ("final", "teacher"):
            figures = found.setdefault("" if r["row"] == "teacher" else str(r["experiment"]), {})
            figures.setdefault(str(r["name"]), {})[int(r["seed"])] = float(r["value"])
            if r.get(BITS):
                figures.setdefault(BITS, {})[int(r["seed"])] = float(r[BITS])
    if RECIPE not in found and (known := next((name for name in SAME_RUN[0] if name in found), "")):
        found[RECIPE] = found[known]  # a sweep of the ablations alone measures the recipe under their names
    return found


def families(figures: Mapping[str, Figures]) -> list[Family]:
    """The families that have a measured variant, in the order of `FAMILIES`, others behind them by name."""
    runs = {run: run for run in figures}
    for group in SAME_RUN:  # one run: measured under one of its names, or found in the cache and written down under each
        run = next((name for name in group if name in figures), "")
        runs |= {name: run for name in group if run and figures.get(name, figures[run]) == figures[run]}
    members: dict[str, dict[str, str]] = {}
    for experiment, run in runs.items():
        family, variant = family_of(experiment)
        if family:
            members.setdefault(family, {})[variant] = run
    made = []
    for family in [*(f for f in FAMILIES if f in members), *sorted(set(members) - set(FAMILIES))]:
        title, order = FAMILIES.get(family, (family, ()))
        base = MEASURED_FROM.get(family, RECIPE)
        base = runs.get(base, base)
        variants = sorted(members[family], key=lambda v: (order.index(v) if v in order else len(order), v))
        of, own = family_of(base)
        is_called = ", ".join(words_of(v, family) for v in variants if members[family][v] == base)
        name = (f"recipe: {is_called}" if is_called else "recipe") if base == RECIPE else is_called or f"{of.replace('_', ' ')}: {words_of(own, of)}"
        lines = [Variant(words_of(v, family), figures[run], "" if family_of(run) == (family, v) else run) for v in variants for run in [members[family][v]] if run not in (base, RECIPE)]
        if lines:
            prefix = f"ablation_{family}" + ("_*" if any(variants) else "")
            made.append(Family(title, prefix, Variant(name, figures.get(base, {})), tuple(lines)))
    return made


def words_of(variant: str, family: str) -> str:
    """`latent_frozen_bitmap` -> `latent frozen bitmap`; a family of one file has no variant and is called by its own name."""
    return variant.replace("_", " ") or family


def ablation_tables(records: Sequence[Record], model: str) -> str:
    """Markdown: the teacher and the number of seeds once, then a table a family with the recipe as its first line."""
    figures = figures_of(records, model)
    teacher = figures.get("", {})
    seeds = sorted({seed for experiment, found in figures.items() if experiment for name in found for seed in found[name]})
    top = ", ".join(f"{_text(name)} {next(iter(teacher[name].values())):.2f}" for name in PROTOCOLS if name in teacher)
    head = f"Teacher: {top}. " if top else ""
    head += f"One seed ({seeds[0]}) a line." if len(seeds) == 1 else f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; a line without ± is one seed."
    made = [f"{head} In brackets: the difference from the first line of the table.\n"]
    for family in families(figures):
        cells: Cells = [["", "bits a weight", *(_text(name) for name in PROTOCOLS)]]
        if family.first.figures:
            cells.append(_line(family.first.name, family.first.figures, {}))
        for variant in family.variants:
            of, name = family_of(variant.run_as)
            cells.append(_line(variant.name + (f" (as {of.replace('_', ' ')}: {words_of(name, of)})" if variant.run_as else ""), variant.figures, family.first.figures))
        made.append(f"**{family.title}**, `{family.prefix}`\n\n{markdown(cells)}")
    return "\n".join(made)


def repeats_table(records: Sequence[Record], model: str) -> str:
    """How far two measurements of one run (one seed) lie apart, in per cent, by protocol: half of the runs, nine of ten, the farthest.

    Runs of the family `joint` stand apart: they end before stage 4, and some of them high. `records` are in the order of time; a run
    that was measured more often counts with its first and its last figure.
    """
    called = {name: group[0] for group in SAME_RUN for name in group}
    found: dict[tuple[str, str, int], list[tuple[str, float]]] = {}
    for r in records:
        if r["model"] == model and r["name"] in PROTOCOLS and r["row"] == "final":
            name, value = str(r["experiment"]), float(r["value"])
            measured = found.setdefault((str(r["name"]), called.get(name, name), int(r["seed"])), [])
            if any(other == name for other, _ in measured) or all(value != known for _, known in measured):  # else: written down under another of its names
                measured.append((name, value))
    cells: Cells = [["", "runs measured twice", "half of them within", "nine of ten within", "the farthest apart"]]
    for joint in (False, True):
        for protocol in PROTOCOLS:
            pairs = {run: (values[0][1], values[-1][1]) for (of, run, _), values in found.items() if of == protocol and len(values) > 1 and (family_of(run)[0] == "joint") == joint}
            apart = sorted((abs(100 * (last / first - 1)), run) for run, (first, last) in pairs.items())
            if apart:
                half, most = (apart[math.ceil(share * len(apart)) - 1][0] for share in (0.5, 0.9))
                title = _text(protocol) + (", joint" if joint else "")
                cells.append([title, str(len(apart)), f"{half:.1f} %", f"{most:.1f} %", f"{apart[-1][0]:.1f} % ({apart[-1][1].removeprefix('ablation_')})"])
    return markdown(cells)


def _line(name: str, figures: Figures, recipe: Figures) -> list[str]:
    bits = figures.get(BITS, {}).values()
    return [name, f"{statistics.fmean(bits):.3f}" if bits else "", *(_cell(figures.get(p, {}), recipe.get(p, {})) for p in PROTOCOLS)]


def _cell(values: Mapping[int, float], base: Mapping[int, float]) -> str:
    """`40.51 (+1.9 %)`: the mean over seeds, and its difference from the mean of the recipe's."""
    if not values:
        return ""
    if not base:
        return spread(list(values.values()))
    more = 100 * (statistics.fmean(values.values()) / statistics.fmean(base.values()) - 1)
    return f"{spread(list(values.values()))} ({more:+.{1 if abs(more) < 100 else 0}f} %)"


def _text(protocol: str) -> str:
    return protocol.removeprefix("ppl_")


def panels(records: Sequence[Record], model: str, protocol: str = PROTOCOLS[0]) -> tuple[list[tuple[str, list[tuple[str, float]]]], float | None]:
    """What `plots.dot_panels` draws: a family's title with the perplexity of each variant, and the recipe's perplexity."""
    figures = figures_of(records, model)
    recipe = figures.get(RECIPE, {}).get(protocol)
    drawn = [(f.title, [*f.variants] if f.first.figures == figures.get(RECIPE) else [f.first, *f.variants]) for f in families(figures)]
    made = [(title, [(v.name, statistics.fmean(v.figures[protocol].values())) for v in variants if protocol in v.figures]) for title, variants in drawn]
    return [(title, dots) for title, dots in made if dots], statistics.fmean(recipe.values()) if recipe else None

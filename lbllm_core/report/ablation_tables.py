"""The ablations of docs/results.md from `results/ablations_*.json`: a table a family, each line a variant beside the recipe that it changes.

The experiments are `ablation_<family>_<variant>`, laid over the recipe `method_ablations` (`base=method_ablations`). Only a run's final
row counts: bits a weight, the perplexities of the packed model, and how far each lies from the recipe's own, in per cent.

Some of these files mean the same run once they lie over that recipe (`SAME_RUN`), and such a run is measured once. A variant that is the
recipe itself has no line: the recipe's line bears its name. A variant that is another family's variant has a line that says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    """One ablation: its title, the word its experiments begin with, which variant the recipe is (empty: none), and the other variants in order."""

    title: str
    prefix: str
    recipe_is: str
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
    return found


def families(figures: Mapping[str, Figures]) -> list[Family]:
    """The families that have a measured variant, in the order of `FAMILIES`, others behind them by name."""
    runs = {other: run for run in figures for group in SAME_RUN if run in group for other in group if other not in figures} | {run: run for run in figures}
    members: dict[str, dict[str, str]] = {}
    for experiment, run in runs.items():
        family, variant = family_of(experiment)
        if family:
            members.setdefault(family, {})[variant] = run
    made = []
    for family in [*(f for f in FAMILIES if f in members), *sorted(set(members) - set(FAMILIES))]:
        title, order = FAMILIES.get(family, (family, ()))
        variants = sorted(members[family], key=lambda v: (order.index(v) if v in order else len(order), v))
        lines = [Variant(words_of(v, family), figures[run], "" if family_of(run) == (family, v) else run) for v in variants for run in [members[family][v]] if run != RECIPE]
        if lines:
            recipe_is = ", ".join(words_of(v, family) for v in variants if members[family][v] == RECIPE)
            prefix = f"ablation_{family}" + ("_*" if any(variants) else "")
            made.append(Family(title, prefix, recipe_is, tuple(lines)))
    return made


def words_of(variant: str, family: str) -> str:
    """`latent_frozen_bitmap` -> `latent frozen bitmap`; a family of one file has no variant and is called by its own name."""
    return variant.replace("_", " ") or family


def ablation_tables(records: Sequence[Record], model: str) -> str:
    """Markdown: the teacher and the number of seeds once, then a table a family with the recipe as its first line."""
    figures = figures_of(records, model)
    recipe, teacher = figures.get(RECIPE, {}), figures.get("", {})
    seeds = sorted({seed for experiment, found in figures.items() if experiment for name in found for seed in found[name]})
    top = ", ".join(f"{_text(name)} {next(iter(teacher[name].values())):.2f}" for name in PROTOCOLS if name in teacher)
    head = f"Teacher: {top}. " if top else ""
    head += f"One seed ({seeds[0]}) a line." if len(seeds) == 1 else f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; a line without ± is one seed."
    made = [f"{head} In brackets: the difference from the recipe, `{RECIPE}`.\n"]
    for family in families(figures):
        cells: Cells = [["", "bits a weight", *(_text(name) for name in PROTOCOLS)]]
        if recipe:
            cells.append(_line(f"recipe: {family.recipe_is}" if family.recipe_is else "recipe", recipe, {}))
        for variant in family.variants:
            of, name = family_of(variant.run_as)
            cells.append(_line(variant.name + (f" (as {of}: {words_of(name, of)})" if variant.run_as else ""), variant.figures, recipe))
        made.append(f"**{family.title}**, `{family.prefix}`\n\n{markdown(cells)}")
    return "\n".join(made)


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
    made = [(f.title, [(v.name, statistics.fmean(v.figures[protocol].values())) for v in f.variants if protocol in v.figures]) for f in families(figures)]
    return [(title, dots) for title, dots in made if dots], statistics.fmean(recipe.values()) if recipe else None

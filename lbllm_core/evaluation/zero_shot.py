"""Zero-shot (and five-shot MMLU) accuracy through lm-eval, offline, on local data. The only place that imports lm_eval.

lm-eval keeps what makes the figures comparable: the task's prompt, the split of context and continuation, the metrics and
their standard errors. Each task is a generated YAML file that includes the stock one and points it at local files, so the
harness neither scans its thousands of tasks (12 s) nor asks a network for data.

Scoring is ours (`choice_scores.py`), because on a processor it is most of the time. Or somebody else's: whoever answers log-likelihoods of
token ids will do, a file too, which is how a model is measured on a machine without lm-eval (`offline_tasks.py`).

A limited run (`limit` examples a task, the first ones; a subject of MMLU is a task) says so in the metric's name: `acc_piqa_n200`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lbllm_core.data import tasks as task_data
from lbllm_core.data.tasks import TaskSource
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.errors import DataError
from lbllm_core.evaluation.choice_scores import score
from lbllm_core.evaluation.last_states import Model
from lbllm_core.evaluation.request_file import Pair
from lbllm_core.model.store import file_digest

Answer = Callable[[str, list[Pair]], list[tuple[float, bool]]]  # task, (context ids, continuation ids) -> (log-likelihood, greedy) of each
METRICS = ("acc", "acc_norm")
FEWSHOT = {task_data.MMLU: 5}
SEED = 1234
STOCK = {
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}


def zero_shot(
    model: Model, tokenizer: Any, tasks: Sequence[str], limit: int = 0, *, add_bos: bool = False, batch_tokens: int = 2048, report: Report = silent
) -> dict[str, float]:
    """Metrics of `tasks`: `acc_<task>`, `acc_stderr_<task>`, and `acc_norm_...` where the task has it, each with `_n<limit>` when limited.

    `model`: a transformers causal language model, packed or not, or a streamed one. `batch_tokens`: padded tokens a forward pass. Raises ConfigError
    (unknown task), DataError (no data), NumericalError (a choice's likelihood is not finite).
    """

    def answer(task: str, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return score(model, pairs, int(tokenizer.model_max_length), batch_tokens, lambda done, total: report(Progress(task, done, total, "choice")), report, task)

    return measure(answer, tokenizer, tasks, limit, add_bos=add_bos)[0]


def measure(answer: Answer, tokenizer: Any, tasks: Sequence[str], limit: int = 0, *, add_bos: bool = False) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of `zero_shot`, whoever answers, and facts that tell which tasks these were: {task: {version, examples, data}}.

    `data` is a sha256 of the local files. Raises what `answer` raises, ConfigError (unknown task), DataError (no data).
    """
    found: dict[str, float] = {}
    facts: dict[str, Any] = {}
    for task in tasks:
        sources = task_data.sources(task)
        figures, versions = _run(_asker(tokenizer, add_bos, partial(answer, task)), sources, limit, FEWSHOT.get(task, 0))
        found |= _named(figures, sources[0].label, limit)
        files = [[source.task, split, file_digest(path)] for source in sources for split, path in sorted(source.files.items())]
        data = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        facts[task] = {"version": " ".join(sorted(versions)), "examples": int(sum(f["n"] for f in figures)), "data": data}
    return found, facts


def _run(asker: Any, sources: Sequence[TaskSource], limit: int, fewshot: int) -> tuple[list[dict[str, float]], set[str]]:
    """lm-eval's figures of each source, {"n": examples, "total": of the split, "acc": ..., "acc_stderr": ...}, and the tasks' versions."""
    with tempfile.TemporaryDirectory(prefix="lbllm-tasks-") as name, _quiet():
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        folder = Path(name)
        for source in sources:
            (folder / f"{source.task}.yaml").write_text(_task_yaml(source, fewshot, folder / "cache"))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        built = manager.load([source.task for source in sources])["tasks"]
        for task in built.values():
            task.set_fewshot_seed(SEED)
        result = evaluate(asker, built, limit=limit or None, bootstrap_iters=1, log_samples=False)
    assert result is not None
    figures = []
    for source in sources:
        measured, count = result["results"][source.task], result["n-samples"][source.task]
        row = {"n": float(count["effective"]), "total": float(count["original"])}
        for metric in METRICS:
            if f"{metric},none" in measured:
                row |= {metric: float(measured[f"{metric},none"]), f"{metric}_stderr": float(measured[f"{metric}_stderr,none"])}
        figures.append(row)
    return figures, {str(version) for version in result["versions"].values()}


def _task_yaml(source: TaskSource, fewshot: int, cache: Path) -> str:
    """The stock task on local files. JSON strings are valid YAML."""
    import lm_eval

    stock = STOCK.get(source.task, f"mmlu/default/{source.task}.yaml")
    values: dict[str, Any] = {
        "include": str(Path(os.path.dirname(lm_eval.__file__)) / "tasks" / stock),
        "task": source.task,
        "dataset_path": source.format,
        "dataset_name": None,
        "training_split": None,
        "validation_split": source.split if source.split == "validation" else None,
        "test_split": source.split if source.split == "test" else None,
        "fewshot_split": "dev" if "dev" in source.files else None,
        "num_fewshot": fewshot,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in source.files.items()}, "cache_dir": str(cache)},
        **source.overrides,
    }
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()) + "\n"


def _named(figures: Sequence[dict[str, float]], label: str, limit: int) -> dict[str, float]:
    """Figures over all sources, weighted by examples, under their names. The error is that of a stratified mean."""
    total = sum(f["n"] for f in figures)
    suffix = f"_n{limit}" if limit and any(f["n"] < f["total"] for f in figures) else ""
    named = {}
    for metric in METRICS:
        if all(metric in f for f in figures):
            named[f"{metric}_{label}{suffix}"] = sum(f["n"] * f[metric] for f in figures) / total
            named[f"{metric}_stderr_{label}{suffix}"] = math.sqrt(sum((f["n"] * f[f"{metric}_stderr"]) ** 2 for f in figures)) / total
    return named


def _asker(tokenizer: Any, add_bos: bool, answer: Callable[[list[Pair]], list[tuple[float, bool]]]) -> Any:
    """An lm-eval model that cuts log-likelihood requests into tokens and passes them on to `answer`, nothing else."""
    from lm_eval.api.model import TemplateLM

    class Asker(TemplateLM):  # type: ignore[misc]
        """Defined here because its base class is imported here."""

        backend = "causal"

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = tokenizer.encode(string, add_special_tokens=False, verbose=False)
            wanted = add_bos if add_special_tokens is None else add_special_tokens
            return [self.prefix_token_id, *ids] if wanted and ids[:1] != [self.prefix_token_id] else ids

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answer([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise DataError("rolling likelihoods are measured by perplexity protocols, not through lm-eval")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise DataError("tasks that generate text are not supported; choose multiple-choice tasks")

    return Asker()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without progress bars and info lines; the state before is put back."""
    import datasets
    from lm_eval.api import task as task_module

    bar, task_module.tqdm = task_module.tqdm, lambda items, **_: items  # the harness has no switch for this one
    names = ("lm_eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        task_module.tqdm = bar
        if bars:
            datasets.enable_progress_bars()

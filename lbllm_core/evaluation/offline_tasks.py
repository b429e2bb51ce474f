"""Zero-shot tasks of a model that lives where lm-eval does not: build the requests here, score them there, aggregate here.

    python -m lbllm_core.evaluation.offline_tasks build --config run.json --out requests.safetensors
    python -m lbllm_core.evaluation.offline_tasks score --config run.json --requests requests.safetensors --out teacher.safetensors
    python -m lbllm_core.evaluation.offline_tasks score --config run.json --requests requests.safetensors --model-dir packed --out final.safetensors
    python -m lbllm_core.evaluation.offline_tasks aggregate --requests requests.safetensors --record results/method.json *.safetensors

`score` needs torch and transformers only, and neither the tasks nor their data; a run with `evaluation.requests=FILE` does it as its last
steps and leaves the scores beside its record. `build` and `aggregate` ask lm-eval's own tasks, with the same data and tokenizer: an
answer is looked up by its token ids, so a request that the file lacks is refused, and so are tasks of another version.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lbllm_core.config import SIX, ModelConfig, RunConfig, config_to_dict
from lbllm_core.engine.artifacts import home_folder, prepare_home
from lbllm_core.errors import DataError, LbllmError
from lbllm_core.evaluation.request_file import (
    BUILD,
    Pair,
    Requests,
    Scores,
    read_requests,
    read_scores,
    require_tokenizer,
    tokenizer_digest,
    write_requests,
)


def build(config: RunConfig, home: Path, out: Path, tasks: Sequence[str], limit: int = 0) -> Requests:
    """Write the requests of these tasks, as the tokenizer of the config's model cuts them. Raises ConfigError, DataError, ModelError."""
    from lbllm_core.evaluation.zero_shot import measure
    from lbllm_core.model.load import teacher_tokenizer
    from lbllm_core.report.records import versions

    tokenizer = teacher_tokenizer(config.model, home)
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}

    def collect(_: str, pairs: list[Pair]) -> list[tuple[float, bool]]:
        seen.update(((tuple(context), tuple(continuation)), None) for context, continuation in pairs)
        return [(0.0, False)] * len(pairs)

    _, about = measure(collect, tokenizer, tasks, limit, add_bos=config.model.add_bos)
    facts = {"model": config.model.name, "model_config": config_to_dict(config)["model"], "add_bos": config.model.add_bos}
    facts |= {"tokenizer": tokenizer_digest(tokenizer), "tasks": about, "limit": limit, "versions": versions()}
    return write_requests(out, list(seen), facts)


def tokenizer_of(requests: Requests, home: Path) -> Any:
    """The tokenizer that a requests file was built with, from the model it names. Raises DataError when it is another one now."""
    from lbllm_core.model.load import teacher_tokenizer

    model = ModelConfig(**requests.facts["model_config"])
    tokenizer = teacher_tokenizer(model, home)
    require_tokenizer(requests, tokenizer, model)
    return tokenizer


def aggregate(requests: Requests, scores: Scores, tokenizer: Any) -> dict[str, float]:
    """lm-eval's metrics from a scores file. Raises DataError for a request that was not scored and for tasks that are not those of the file."""
    from lbllm_core.evaluation.zero_shot import measure

    answers = zip(scores.values.tolist(), scores.greedy.bool().tolist(), strict=True)
    known = {(tuple(c), tuple(y)): found for (c, y), found in zip(requests.pairs(), answers, strict=True)}

    def look_up(task: str, pairs: list[Pair]) -> list[tuple[float, bool]]:
        keys = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
        missing = [i for i, key in enumerate(keys) if key not in known]
        if missing:
            text = tokenizer.decode(keys[missing[0]][0][-24:] + keys[missing[0]][1])
            raise DataError(f"{task}: {len(missing)} of {len(keys)} requests are not in the requests file, the first ends in {text!r}; build it again with these tasks and data: {BUILD}")
        return [known[key] for key in keys]

    expected = requests.facts["tasks"]
    figures, about = measure(look_up, tokenizer, list(expected), int(requests.facts["limit"]), add_bos=bool(requests.facts["add_bos"]))
    for task, facts in about.items():
        moved = [f"{name} was {expected[task].get(name)}, is {value}" for name, value in facts.items() if expected[task].get(name) != value]
        if moved:
            raise DataError(f"the task {task} is not the one that the requests were built from ({'; '.join(moved)}); build them again: {BUILD}")
    return figures


def _build(chosen: argparse.Namespace, home: Path) -> None:
    from lbllm_core.run import read_config

    tasks = [word for word in chosen.tasks.split(",") if word]
    made = build(read_config(chosen.config, chosen.overrides), home, chosen.out, tasks, chosen.limit)
    print(f"{chosen.out}: {len(made)} requests, {made.tokens} token ids, {chosen.out.stat().st_size / 1e6:.1f} MB, sha256 {made.digest}")
    for task, facts in made.facts["tasks"].items():
        print(f"  {task}: {facts['examples']} examples, version {facts['version']}")


def _score(chosen: argparse.Namespace, home: Path) -> None:
    from lbllm_core.engine.terminal import Terminal
    from lbllm_core.evaluation.request_scores import score_model
    from lbllm_core.newest import packed_folder
    from lbllm_core.report.score_records import with_context
    from lbllm_core.run import read_config

    config, requests = read_config(chosen.config, chosen.overrides), read_requests(chosen.requests)
    packed = packed_folder(home, chosen.model_dir) if chosen.model_dir else None
    scores = score_model(config, home, requests, chosen.out, packed, Terminal())
    with_context(chosen.out, scores, config, "teacher" if packed is None else "final", packed)
    print(f"{chosen.out}: {scores.values.numel()} scores, mean log-likelihood {scores.values.mean():.4f}, model {scores.facts['model_digest'][:16]}")


def _aggregate(chosen: argparse.Namespace, home: Path) -> None:
    from lbllm_core.report.score_records import record_figures, shown

    requests = read_requests(chosen.requests)
    found = [(path, read_scores(path, requests)) for path in chosen.scores]
    tokenizer = tokenizer_of(requests, home)
    results = [(path, scores, aggregate(requests, scores, tokenizer)) for path, scores in found]
    if chosen.record:
        record_figures(chosen.record, [(scores, figures) for _, scores, figures in results])
    print(shown([(path.stem, scores, figures) for path, scores, figures in results]))


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Path], None]] = MappingProxyType({"build": _build, "score": _score, "aggregate": _aggregate})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.evaluation.offline_tasks", description="Zero-shot tasks of a model on a machine without lm-eval.")
    commands = parser.add_subparsers(dest="command", required=True)
    makers = {name: commands.add_parser(name) for name in COMMANDS}
    for maker in makers.values():
        maker.add_argument("--home", type=Path, help="home folder (default: LBLLM_HOME, else .lbllm)")
    for name in ("build", "score"):
        makers[name].add_argument("--config", type=Path, help="JSON file of sections: what `make config` prints")
        makers[name].add_argument("--out", type=Path, required=True, help="file to write")
        makers[name].add_argument("overrides", nargs="*", metavar="section.field=value")
    makers["build"].add_argument("--tasks", default=",".join(SIX), help="separated by commas")
    makers["build"].add_argument("--limit", type=int, default=0, help="examples a task (0: all)")
    for name in ("score", "aggregate"):
        makers[name].add_argument("--requests", type=Path, required=True)
    makers["score"].add_argument("--model-dir", default="", help="packed model (default: the teacher of the configuration)")
    makers["aggregate"].add_argument("--record", type=Path, help="results file to add the rows to")
    makers["aggregate"].add_argument("scores", nargs="+", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        COMMANDS[chosen.command](chosen, prepare_home(chosen.home) if chosen.home else home_folder())
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The pipeline without Prefect, MLflow and Hydra: for notebooks, bare GPU machines, and debugging.

    python -m lbllm_core.run model.source=folder model.path=/models/mine
    python -m lbllm_core.run --config run.json scheme.group_size=16

`--config` is a JSON file of sections (as MLflow keeps beside each run: config.json); what it leaves out has the default of
`lbllm_core/config.py`, which is the `tiny` model. Steps, keys and artifacts are those of the flow: a run that was begun here
goes on there, and the other way round.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.config import RunConfig, config_from_dict, config_to_dict
from lbllm_core.engine.artifacts import Handle, home_folder, prepare_home, read_seconds, run_step
from lbllm_core.engine.files import disk_errors_told
from lbllm_core.engine.preflight import one_line, preflight
from lbllm_core.engine.progress import Report
from lbllm_core.engine.terminal import Terminal
from lbllm_core.errors import ConfigError, LbllmError
from lbllm_core.overrides import all_problems, explain, merged, read
from lbllm_core.pipeline import Finished, check_gate, facts, plan, why_skipped
from lbllm_core.report.expected import expectations_plain
from lbllm_core.report.method import method_records
from lbllm_core.report.records import write_results
from lbllm_core.report.score_records import keep_scores
from lbllm_core.report.summary import result_rows, step_cells, step_entries
from lbllm_core.report.tables import comparison, plain

log = logging.getLogger(__name__)


def run_pipeline(config: RunConfig, home: Path, report: Report | None = None, heard: Callable[[Finished], None] = lambda _: None) -> list[Finished]:
    """Every step of the plan, in this process; `heard` is told after each. Raises what a step raises, and GateError."""
    handles: dict[str, Handle] = {}
    finished: list[Finished] = []
    for name, reason in why_skipped(config).items():
        log.info("%s: skipped, %s", name, reason)
    for step in plan(config):
        inputs = {role: handles[source] for role, source in step.inputs.items()}
        handle = run_step(step.spec, step.config, inputs, home, report or Terminal(), facts(step.spec, step.config, home), step.row)
        handles[step.name] = handle
        if step.name == "evaluate_teacher":
            check_gate(config, handle)
        finished.append(Finished(step.row, handle, read_seconds(handle.folder(home)) / 60))
        heard(finished[-1])
    return finished


def read_config(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """A configuration from a JSON file and overrides. Raises ConfigError with every problem."""
    base: Any = {}
    if path is not None:
        try:
            base = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError([f"{path} cannot be read as JSON ({error})"]) from None
        if not isinstance(base, dict):
            raise ConfigError([f"{path} must hold an object of sections, for example {{\"scheme\": {{\"act_bits\": 16}}}}"])
    values, problems = read(overrides)
    full = merged(_over_defaults(base), values)
    origins = dict.fromkeys(base, str(path)) | dict.fromkeys(values, "given on the command line")
    problems += [explain(problem, origins) for problem in all_problems(full)]
    if problems:
        raise ConfigError(problems)
    return config_from_dict(full)


def _over_defaults(base: dict[str, Any]) -> dict[str, Any]:
    full = config_to_dict(RunConfig())
    for name, value in base.items():
        full[name] = full[name] | value if isinstance(full.get(name), dict) and isinstance(value, dict) else value
    return full


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.run", description="Binarize a model without Prefect and MLflow.")
    parser.add_argument("--config", type=Path, help="JSON file of sections")
    parser.add_argument("--home", type=Path, help="home folder for artifacts (default: LBLLM_HOME, else .lbllm)")
    parser.add_argument("--record", type=Path, help="also write the rows into this results file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    chosen = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lbllm_core").setLevel(logging.INFO)
    try:
        config = read_config(chosen.config, chosen.overrides)
        with disk_errors_told():
            home = prepare_home(chosen.home) if chosen.home else home_folder()
            log.info(one_line(config, *preflight(config, home)))
            finished = run_pipeline(config, home)
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = result_rows(finished)
    if chosen.record:
        write_results(chosen.record, f"python -m lbllm_core.run ({config.experiment})", method_records(config, rows))
        keep_scores(chosen.record, config, finished, rows, home)
    print(plain(comparison(rows)))
    if config.evaluation.expected:
        print(expectations_plain(rows, config.evaluation))
    print(plain(step_cells(step_entries(finished))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What makes a pipeline step a Prefect task that is cached and resumable.

Prefect's own cache policies do not fit (the default contains the run's id; hashing inputs and source gave stale results), so
the key is ours: the artifact's key, computed by `lbllm_core/engine/artifacts.py`. Prefect's record of a finished task is
stored *inside* the artifact folder as `prefect.json`: removing the folder removes the cache entry with it. The key function
also checks the artifact's files, so that a damaged one is set aside, together with that record, before Prefect looks for it.

Tasks exchange handles as plain JSON; tensors stay in the folder. A step is also locked, verified and resumed when it runs
without Prefect (`lbllm_core/run.py`), from the same folder under the same key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.tasks import Task

from lbllm_core import pipeline
from lbllm_core.config import RunConfig, config_from_dict, config_to_dict
from lbllm_core.engine.artifacts import (
    Handle,
    check_unless_busy,
    folder_of,
    key_of,
    key_parts,
    read_manifest,
    read_seconds,
    run_step,
)
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.engine.terminal import Terminal
from lbllm_core.errors import LbllmError
from tasks.progress import PrefectPage

PREFECT_RECORD = "prefect.json"
log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who hears about a run: `tasks/tracking.py` writes it to MLflow."""

    def progress(self, progress: Progress) -> None:
        """A step moved on."""

    def finished(self, finished: pipeline.Finished) -> None:
        """A step ended, or was reused."""


@dataclass
class Run:
    """One run of the flow as its steps see it: the config, the home folder, who listens, and what is finished so far."""

    config: RunConfig
    home: Path
    listener: Listener
    row: str = "final"
    finished: list[pipeline.Finished] = field(default_factory=list)

    def beside(self, row: str) -> Run:
        """The same run for another row of the table (`stage1`, ...), under that row's config."""
        return replace(self, row=row, config=pipeline.baseline_config(self.config, row))


class Step:
    """A step of the pipeline as a callable: `ptq_init(run)`, `weight_distill(run, student=student)`."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, run: Run, **inputs: Handle | None) -> Handle | None:
        """The step's handle; its first input, unchanged, when the config leaves the step out."""
        reason = pipeline.why_skipped(run.config).get(self.name)
        if reason:
            log.info("%s: skipped, %s", self.name, reason)
            return inputs.get("student")
        upstream = {role: handle.to_dict() for role, handle in inputs.items() if handle is not None}
        curves = run.row == "final" and self.name in pipeline.STAGES  # a row beside it would draw into the same charts
        state, key = self._run(run, upstream, curves)
        if state.name == "Cached" and not _record_is_true(state, folder_of(run.home, self.name, key)):
            state, _ = self._run(run, upstream, curves)
        handle = _handle_of(state)
        row = "teacher" if self.name == "evaluate_teacher" or (self.name == "score_requests" and not upstream) else run.row
        done = pipeline.Finished(row, handle, read_seconds(handle.folder(run.home)) / 60)  # as when it is reused: cells of a sweep compare
        run.finished.append(done)
        run.listener.finished(done)
        return handle

    def _run(self, run: Run, upstream: dict[str, Any], curves: bool) -> tuple[State[Any], str]:
        """Prefect's final state of the step, and the key under which it looked for a record (empty: it could not be computed)."""
        asked: list[str] = []

        def key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
            asked.append(step_key(self.name, parameters) or "")
            return f"{self.name}/{asked[-1][:16]}/{PREFECT_RECORD}" if asked[-1] else None

        prefect_task = Task(
            fn=partial_body(self.name, run.listener.progress if curves else silent, run.row),
            name=self.name,
            task_run_name=self.name if run.row == "final" else f"{run.row}: {self.name}",
            persist_result=True,
            result_serializer="json",
            result_storage=run.home / "artifacts",
            cache_policy=CacheKeyFnPolicy(cache_key_fn=key),
        )
        state = prefect_task(config_to_dict(run.config), upstream, str(run.home), return_state=True)
        return cast("State[Any]", state), asked[-1] if asked else ""


def partial_body(name: str, heard: Report, row: str) -> Callable[..., dict[str, Any]]:
    """The function that Prefect runs for a step: everything it needs comes as plain values."""

    def body(config: dict[str, Any], upstream: dict[str, Any], home: str) -> dict[str, Any]:
        terminal, page = Terminal(), PrefectPage(name)

        def report(progress: Progress) -> None:
            for listener in (terminal, page, heard):
                listener(progress)

        typed, inputs = config_from_dict(config), _handles(upstream)
        spec = pipeline.spec_of(name, typed)
        handle = run_step(spec, typed, inputs, Path(home), report, pipeline.facts(spec, typed, Path(home)), row)
        return handle.to_dict() | {"reused": handle.reused}

    body.__name__ = body.__qualname__ = name
    return body


def step_key(name: str, parameters: dict[str, Any]) -> str | None:
    """The key of the artifact that a task is about; a damaged one is set aside. None (always run) when it cannot be computed.

    Prefect would hide an exception here; the task's body computes the same key, so the reason is raised there.
    """
    try:
        home, config = Path(parameters["home"]), config_from_dict(parameters["config"])
        spec = pipeline.spec_of(name, config)
        key = key_of(key_parts(spec, config, _handles(parameters["upstream"]), pipeline.facts(spec, config, home)))
        check_unless_busy(home, name, key)
    except Exception:
        log.debug("no cache key for %s", name, exc_info=True)
        return None
    return key


def _handles(values: dict[str, Any]) -> dict[str, Handle]:
    return {role: Handle.from_dict(value) for role, value in values.items()}


def _record_is_true(state: State[Any], folder: Path) -> bool:
    """Whether what Prefect has kept of a finished task is the handle of the artifact beside it; another or a damaged record is removed.

    The manifest guards the files of an artifact, and Prefect's record is none of them.
    """
    try:
        kept = Handle.from_dict(cast("dict[str, Any]", state.result(raise_on_failure=False)))
        if kept == Handle.from_dict(read_manifest(folder)["handle"]):
            return True
    except Exception:
        log.debug("Prefect's record in %s cannot be read", folder, exc_info=True)
    log.warning("%s: Prefect's record %s is not that of this artifact; it is removed, the step is looked at anew", folder.parent.name, folder / PREFECT_RECORD)
    (folder / PREFECT_RECORD).unlink(missing_ok=True)
    return False


def _handle_of(state: State[Any]) -> Handle:
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    cached = state.name == "Cached"
    if cached:
        log.info("%s: reused %s", result["step"], result["key"][:16])
    return replace(Handle.from_dict(result), reused=cached or bool(result.get("reused")))


class KnownErrorsAreSentences(logging.Filter):
    """Prefect logs every exception with its traceback; an error of ours is a sentence for the user, so only that is kept."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true; drops the traceback of an LbllmError."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, LbllmError):
            record.exc_info, record.exc_text = None, None
            record.msg, record.args = str(error), ()
        return True


def prepare_logging() -> None:
    """Let our messages through at INFO, and install the filter on the loggers that Prefect reports failures to."""
    for name in ("lbllm_core", "lbllm_kernels", "tasks", "flows"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, KnownErrorsAreSentences) for f in logger.filters):
            logger.addFilter(KnownErrorsAreSentences())

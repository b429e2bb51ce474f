"""What a run writes into MLflow, the lab book.

An experiment a question: a sweep has one of its own, with what it compares as its description; single runs share another. In it
one flat run a configuration, found again by its tag `lbllm.config`: a run that was killed goes on in the same row and ends
as FINISHED. Metrics are buffered and sent in batches (one call costs as much as five hundred metrics). A name with a slash
becomes a section of charts: `stage2/loss`, `eval/ppl_...`, `size/...`; rows beside the final one carry their own name in
front. Curves count blocks or steps from 1; `training_loss` of a stage that works block by block counts hundredths of a block.
A step that was reused brings its curves along.

The lab book must never cost the run: every entry is kept until the store took it, in order and with its own time; what could
not be delivered when the run ends lies in `$LBLLM_HOME/mlflow-pending/`, and the next run delivers it.

Only this file writes to MLflow. The store is a sqlite file under the home folder, or the database that MLFLOW_BACKEND_STORE_URI
names (MLflow's own word for it), which several machines can share; a server, when there is one, shows the same store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lbllm_core.config import SECTIONS, RunConfig, config_to_dict, digest, select
from lbllm_core.engine.artifacts import MANIFEST
from lbllm_core.engine.files import write_atomic
from lbllm_core.engine.progress import Progress
from lbllm_core.errors import ConfigError
from lbllm_core.pipeline import STAGES, Finished
from tasks import run_texts
from tasks.row_guard import RowGuard
from tasks.system_metrics import SystemMetrics

log = logging.getLogger(__name__)
FLUSH_SECONDS = 10.0
RETRY_SECONDS = 60.0  # between attempts while the store is down
BUSY_SECONDS = 3.0
STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
SQLITE = "sqlite:///"
DATABASES = (SQLITE, "postgresql+psycopg2://")  # the driver by its name: which one stands behind postgresql:// changes with SQLAlchemy's version
ROW_SECONDS = 2.0  # a row is never locked for longer, except by the run that owns it
NOTE, OURS = "mlflow.note.content", "lbllm.description"  # what MLflow shows as the description, and what we wrote there
SHOWN_PARAMS = ("model.name", "experiment", "scheme.name", "seed")
STAGE_PARAMS = ("weight_distill.enabled", "weight_distill.trained", "act_quant.enabled", "act_quant.trained", "end_to_end.enabled")  # always told: MLflow's plots call what is missing "unknown"
RUN_NAME, DURATION = "attributes.`Run Name`", "attributes.`Duration`"  # columns of MLflow's table of runs
NAME_PIXELS, CELL_PIXELS, LETTER_PIXELS = 300, 36, 7  # so wide that neither heads nor names are cut
SECTION_OF = {
    "evaluate_teacher": "eval",
    "ptq_init": "stage1",
    "weight_distill": "stage2",
    "act_quant": "stage3",
    "end_to_end": "stage4",
    "pack_and_benchmark": "pack",
    "evaluate_model": "eval",
    "evaluate_control": "eval",
    "score_requests": "eval",
}


def store_uri(home: Path) -> str:
    """The tracking store: the database that MLFLOW_BACKEND_STORE_URI names, else a sqlite file of the home folder.

    ConfigError when it names something else; its value is not shown, it may hold a password.
    """
    named = os.environ.get(STORE_VARIABLE, "")
    if named and not named.startswith(DATABASES):
        raise ConfigError([f"{STORE_VARIABLE} begins with none of {', '.join(DATABASES)}; give a database's address (postgresql+psycopg2://user@host/name), or unset it"])
    if named.startswith("postgresql") and importlib.util.find_spec("psycopg2") is None:
        raise ConfigError([f"{STORE_VARIABLE} names a Postgres, whose driver is not installed: python -m pip install -c constraints.txt -e '.[postgres]'"])
    return named or f"{SQLITE}{home / 'mlflow.db'}"


def store_file(home: Path) -> Path | None:
    """The file of an sqlite store, whether it is there yet or not; None when the store is a database of several machines."""
    uri = store_uri(home)
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def store_exists(home: Path) -> bool:
    """Whether there is a store to read; a database of several machines is taken for there."""
    file = store_file(home)
    return file is None or file.exists()


def artifact_uri(home: Path) -> str:
    """Where MLflow keeps tables, plots and manifests of a home folder."""
    return (home / "mlflow-artifacts").as_uri()


def row_digest(config: RunConfig) -> str:
    """What a row is known by, its tag `lbllm.config`: everything of the configuration but how it is tracked."""
    return digest(config, [f for f in ("experiment", "seed", *SECTIONS) if f != "tracking"])


@dataclasses.dataclass
class Entries:
    """What is to be written about one run: who it is, and the events that the store has not taken yet."""

    experiment: str
    config_digest: str
    name: str
    resume: bool = True
    run_id: str = ""
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    experiment_id: str = ""


class LabBook:
    """The MLflow row of one run; a context manager that ends it as FINISHED, FAILED or KILLED.

    `about`: what the run tests, a sentence; `prefect`: the address of its page there. Both become its description.
    """

    def __init__(self, config: RunConfig, home: Path, about: str = "", prefect: str = ""):
        self.config, self.home, self.enabled = config, home, config.tracking.enabled
        store_uri(home)  # one that cannot be is refused before anything is computed
        self.about, self.prefect = about, prefect
        self.digest = row_digest(config)
        self.entries = Entries(config.tracking.sweep or config.tracking.experiment, self.digest, run_texts.row_name(config))
        self._told: set[tuple[str, int]] = set()
        self._system: SystemMetrics | None = None
        self._flushed = time.monotonic()
        self._warned = False
        self._row = _row_lock(home, self.digest)
        self._guard: RowGuard | None = None

    def __enter__(self) -> LabBook:
        if self.enabled:
            (self.home / "runs").mkdir(parents=True, exist_ok=True)
            try:
                self._row.acquire(timeout=ROW_SECONDS)
            except Timeout:  # the same configuration runs in another process: it keeps its row, this run gets its own
                self.entries.resume = False
            with suppress(OSError):  # no room for one more process or its log: the run does without
                self._guard = RowGuard(self.home, self.digest if self.entries.resume else "")
            _deliver_left_over(self.home)
            self._first_page()
            self.flush()
            self._system = SystemMetrics(self._metrics)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._system is not None:
            self._system.stop()
        status = "FINISHED" if kind is None else "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
        if error is not None:
            self._note("tags", {"lbllm.error": str(error)[:4000]})
        self._note("status", status)
        self.flush()
        if self.entries.events:
            _keep_for_later(self.home, self.entries)
        if self._guard:
            self._guard.end()
        self._row.release()

    def progress(self, progress: Progress) -> None:
        """A point on the step's curves; figures of single linears stay in the artifact."""
        section = SECTION_OF.get(progress.step, progress.step)
        figures = {name: value for name, value in progress.figures.items() if "/" not in name}
        at = progress.done
        if progress.share:  # within a block only its loss
            figures, at = ({"training_loss": figures["loss"]} if "loss" in figures else {}), _hundredths(progress.units)
        elif "loss_after" in figures:  # that says the same
            figures.pop("loss", None)
        named = {f"{section}/{name}": value for name, value in figures.items()}
        self._told |= {(name, at) for name in named}
        self._metrics(named, at)
        if time.monotonic() - self._flushed > (RETRY_SECONDS if self._warned else FLUSH_SECONDS):
            self.flush()

    def finished(self, finished: Finished) -> None:
        """A step's final figures; those of a reused step are written again, into this run."""
        handle, row = finished.handle, finished.row
        front = "" if row == "final" else f"{row}/"
        section = SECTION_OF[handle.step]
        self._metrics({f"{front}{name if '/' in name else f'{section}/{name}'}": value for name, value in handle.metrics.items()})
        self._metrics({f"{front}minutes/{handle.step}": finished.minutes})
        self._note("tags", {f"lbllm.artifact.{front}{handle.step}".replace("/", "."): f"{handle.step}/{handle.key[:16]}"})
        manifest = handle.folder(self.home) / MANIFEST
        self._note("file", {"path": str(manifest), "folder": f"manifests/{front}{handle.step}"})
        if row == "final":
            self._kept(handle.folder(self.home), handle.step)
        self.flush()

    def _kept(self, folder: Path, step: str) -> None:
        """What a step left beside its figures: curves (points that this run did not draw itself), histograms, sample texts."""
        for name in ("curves.json", "activations.json", "samples.json"):
            if (folder / name).exists():
                self._note("file", {"path": str(folder / name), "folder": f"steps/{step}"})
        with suppress(OSError, ValueError):
            self.text("samples.md", run_texts.samples(json.loads((folder / "samples.json").read_text(encoding="utf-8"))))
        curves = {}
        with suppress(OSError, ValueError):
            curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
        section, by_block = SECTION_OF[step], step in STAGES and step != "end_to_end"
        for name, points in curves.items():
            in_blocks = by_block and name == "loss"
            full = f"{section}/{'training_loss' if in_blocks else name}"
            for x, value in points:
                at = _hundredths(x) if in_blocks else int(x) + 1
                if (full, at) not in self._told:
                    self._metrics({full: value}, at)

    def figures(self, figures: dict[str, float]) -> None:
        """Figures of the run as a whole: what was expected, and by how much it was missed."""
        self._metrics(figures)

    def text(self, name: str, content: str) -> None:
        """A text file beside the run: the resolved config, the result table."""
        self._note("text", {"name": name, "content": content})

    def file(self, path: Path, folder: str = "") -> None:
        """A file beside the run: a plot."""
        self._note("file", {"path": str(path), "folder": folder})

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment; empty while the store has not taken anything."""
        return self.entries.experiment_id

    @property
    def run_id(self) -> str:
        """MLflow's id of this run; empty while the store has not taken anything."""
        return self.entries.run_id

    def flush(self) -> None:
        """Send what is buffered. Trouble is reported once and the entries are kept."""
        self._flushed = time.monotonic()
        if not self.enabled:
            self.entries.events.clear()
            return
        known = self.entries.run_id
        try:
            deliver(self.home, self.entries)
            self._warned = False
        except Exception as error:
            if not self._warned:
                log.warning("MLflow's store does not answer (%s); the run goes on, its entries are kept and sent later", _brief(error))
            self._warned = True
        if self._guard and self.entries.run_id != known:
            self._guard.watch(self.entries.run_id)

    def _first_page(self) -> None:
        c = self.config
        fields = [f for f in ("experiment", "seed", *SECTIONS) if f != "tracking"]
        default = select(RunConfig(), fields)
        changed = {name: value for name, value in select(c, fields).items() if value != default[name] and not isinstance(value, dict)}
        always = select(c, (*SHOWN_PARAMS, *STAGE_PARAMS))
        self._note("params", {name: _plain(value) for name, value in (changed | always).items()})
        tags = {"lbllm.model": c.model.name, "lbllm.scheme": c.scheme.name, "lbllm.experiment": c.experiment, "lbllm.home": str(self.home)}
        if c.tracking.sweep:
            tags["lbllm.sweep"] = c.tracking.sweep
        if self.prefect:
            tags["lbllm.prefect"] = self.prefect
        self._note("tags", tags | {NOTE: run_texts.description(c, self.about, self.prefect)})
        self.text("environment.json", run_texts.environment())
        self.text("config.json", json.dumps(config_to_dict(c), indent=1, sort_keys=True))

    def _metrics(self, figures: dict[str, float], step: int = 0) -> None:
        now = time.time_ns() // 1_000_000
        self._note("metrics", [[name, float(value), now, step] for name, value in figures.items()])

    def _note(self, kind: str, content: Any) -> None:
        self.entries.events.append({"kind": kind, "content": content})


def _hundredths(blocks: float) -> int:
    return round(100 * blocks)


def deliver(home: Path, entries: Entries) -> None:
    """Write all events into the store and remove each that was taken. Raises whatever MLflow raises."""
    if not entries.events:
        return
    import mlflow.entities as kinds

    _probe(home)
    client = _client(home)
    if not entries.run_id:
        entries.run_id = _find_or_create(client, entries, home)
    events = entries.events
    while events:
        kind, content = events[0]["kind"], events[0]["content"]
        taken = 1
        if kind == "metrics":
            while taken < len(events) and events[taken]["kind"] == "metrics":
                taken += 1
            points = [kinds.Metric(*point) for event in events[:taken] for point in event["content"]]
            for i in range(0, len(points), 1000):  # the store's limit for one batch
                client.log_batch(entries.run_id, metrics=points[i : i + 1000])
        elif kind == "params":
            client.log_batch(entries.run_id, params=[kinds.Param(*item) for item in content.items()])
        elif kind == "tags":
            client.log_batch(entries.run_id, tags=[kinds.RunTag(*item) for item in content.items()])
        elif kind == "text":
            client.log_text(entries.run_id, content["content"], content["name"])
        elif kind == "file":
            if Path(content["path"]).is_file():
                client.log_artifact(entries.run_id, content["path"], content["folder"] or None)
        elif kind == "status":
            client.set_terminated(entries.run_id, content)
        del events[:taken]


def _client(home: Path) -> Any:
    """MLflow's client on the home's store. It would tell of the tables it makes, and log a traceback of an error that it raises: callers say it in a sentence."""
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return MlflowClient(store_uri(home))


def _probe(home: Path) -> None:
    """Raise the database's error within seconds when the store cannot be written: MLflow itself would retry for minutes, or an hour."""
    file = store_file(home)
    if file is None:
        import sqlalchemy

        engine = sqlalchemy.create_engine(store_uri(home), poolclass=sqlalchemy.pool.NullPool, connect_args={"connect_timeout": int(BUSY_SECONDS)})
        engine.connect().close()
        return
    with closing(sqlite3.connect(file, timeout=BUSY_SECONDS)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _find_or_create(client: Any, entries: Entries, home: Path) -> str:
    experiment = entries.experiment_id = _experiment(client, entries.experiment, home)
    if entries.resume:
        rows = client.search_runs([experiment], f"tags.`lbllm.config` = '{entries.config_digest}'", max_results=1)
        if rows and rows[0].info.status != "FINISHED":
            client.update_run(rows[0].info.run_id, status="RUNNING")
            return str(rows[0].info.run_id)
    made = client.create_run(experiment, run_name=entries.name, tags={"lbllm.config": entries.config_digest})
    return str(made.info.run_id)


def close_row(home: Path, run_id: str, digest: str, reason: str) -> bool:
    """End a row whose process is gone, unless it ended or its configuration (`digest`) runs again; False when the store is to be asked once more.

    Without a digest the row is one that no other run takes up.
    """
    from mlflow import MlflowClient

    try:
        _probe(home)
        client = MlflowClient(store_uri(home))
        with suppress(Timeout), _row_lock(home, digest).acquire(timeout=0) if digest else nullcontext():
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_tag(run_id, "lbllm.error", reason[:4000])
                client.set_terminated(run_id, "KILLED")
    except Exception as error:
        log.warning("MLflow's store did not take the end of the run %s (%s)", run_id, _brief(error))
        return False
    return True


def _row_lock(home: Path, digest: str) -> FileLock:
    """Held by the process whose run is the row of this configuration; the kernel frees it when that process dies."""
    return FileLock(home / "runs" / f"{digest[:16]}.lock")


def _experiment(client: Any, name: str, home: Path) -> str:
    """The experiment's id; made when it is not there, and brought back when a person deleted it (its name stays taken)."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=f"{artifact_uri(home)}/{name}"))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
        log.warning("the MLflow experiment %s had been deleted; it is restored, because runs of it are written", name)
    return str(found.experiment_id)


def describe_experiment(home: Path, name: str, text: str) -> None:
    """Write what an experiment is to find out as its description, unless a person wrote one. Trouble is only reported."""
    try:
        if store_exists(home):
            _probe(home)
        client = _client(home)
        experiment = client.get_experiment(_experiment(client, name, home))
        if experiment.tags.get(NOTE, experiment.tags.get(OURS)) == experiment.tags.get(OURS):
            for tag in (OURS, NOTE):
                client.set_experiment_tag(experiment.experiment_id, tag, text)
    except Exception as error:
        log.warning("MLflow's store did not take the description of %s (%s)", name, _brief(error))


def close_rows(home: Path, sweep: str, reason: str) -> int:
    """End the rows of a sweep that still say they run though their process is gone: nobody holds their lock. Returns how many.

    A process that was killed could not do it. The row goes on when its configuration runs again.
    """
    if not store_exists(home):
        return 0
    closed = 0
    try:
        _probe(home)
        client = _client(home)
        wanted = f"tags.`lbllm.sweep` = '{sweep}' and attributes.status = 'RUNNING'"
        rows = client.search_runs([e.experiment_id for e in client.search_experiments()], wanted)
        for row in rows:
            with suppress(Timeout), _row_lock(home, row.data.tags.get("lbllm.config", "")).acquire(timeout=0):
                client.set_tag(row.info.run_id, "lbllm.error", reason[:4000])
                client.set_terminated(row.info.run_id, "KILLED")
                closed += 1
    except Exception as error:
        log.warning("MLflow's store did not take the end of a run of the sweep %s (%s)", sweep, _brief(error))
    return closed


def share_columns(home: Path, experiment_id: str, metrics: Iterable[str], params: Iterable[str], sweep: str = "") -> str:
    """A view of MLflow's run table with the columns that matter, figures first, and with `sweep` only its runs, as the key of its address.

    `metrics`: names that runs have, in the order of the columns, of which the view takes some; `params`: those that tell the runs apart. MLflow keeps a
    shared view as a tag of the experiment, as JSON; `?viewStateShareKey=<key>` opens it. Empty when the store is down or the
    experiment is gone: the table is there without it.
    """
    known = list(metrics)
    scores = [name for name in known if name.startswith("eval/") and "stderr" not in name]
    figures = [name for name in (*scores, "size/effective_bpw", "size/disk_mb", "speed/decode_tok_s") if name in known]
    columns = [*(f"metrics.`{name}`" for name in figures), *(f"params.`{name}`" for name in dict.fromkeys((*params, *SHOWN_PARAMS)))]
    widths = {column: CELL_PIXELS + LETTER_PIXELS * len(column.split("`")[1]) for column in columns} | {RUN_NAME: NAME_PIXELS, DURATION: 90}
    view = {"searchFilter": f"tags.`lbllm.sweep` = '{sweep}'" if sweep else "", "orderByKey": "attributes.start_time", "orderByAsc": True}
    view |= {"selectedColumns": [*columns, DURATION], "columnOrder": [RUN_NAME, *columns, DURATION], "columnWidths": widths}
    text = json.dumps(view, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        _probe(home)
        _client(home).set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", text)
    except Exception as error:
        log.warning("MLflow's store did not take the view of %s (%s)", sweep or "all runs", _brief(error))
        return ""
    return key


def _keep_for_later(home: Path, entries: Entries) -> None:
    folder = home / "mlflow-pending"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{time.time_ns()}-{os.getpid()}.json", json.dumps(dataclasses.asdict(entries)).encode())
        log.warning("MLflow's store did not take %d entries; they lie in %s and go in with the next run", len(entries.events), folder)


def _deliver_left_over(home: Path) -> None:
    for path in sorted((home / "mlflow-pending").glob("*.json")):
        try:
            entries = Entries(**json.loads(path.read_text(encoding="utf-8")))
            deliver(home, entries)
            path.unlink()
        except Exception as error:
            log.warning("entries of an earlier run in %s cannot go into MLflow yet (%s)", path, _brief(error))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _brief(error: Exception) -> str:
    """What an error says first; of one that the store's libraries wrapped, what sqlite said."""
    lines = str(error).splitlines()
    said = next((line for line in lines if line.startswith("(sqlite3.")), lines[0] if lines else "")
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__

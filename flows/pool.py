"""A Prefect work pool as the sender of a sweep's cells sees it: runs that wait, that a worker has taken, that ended, that were lost.

Workers on any number of machines (`flows/worker.py`) take runs of the deployment `lbllm/<pool>` out of the pool, one at a time
each, and run them in processes of their own. The deployment carries the home folder and the settings of the flow, so that a
worker needs nothing but the server's address.

A process that dies cannot say so. One that had begun is missed by its heartbeat: the server's automation marks its run as
crashed after 90 seconds (`flows/serve.py`). One that its worker had taken but not begun never had a heartbeat; it is lost when
its worker is offline, which the server knows after 90 seconds too. Plain HTTP: a sweep does not load Prefect.
"""

from __future__ import annotations

import time
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from flows.prefect_runs import OPEN_STATES, post, set_state
from flows.servers import HOST, flow_environment
from lbllm_core.errors import LbllmError

ENTRY = "flows.full_pipeline.lbllm"
CONFLICT = 409  # HTTP's code for what is there already
PAGE = 200  # as many runs as the server gives at once
TAKEN_SECONDS = 120.0  # a run that was taken by nobody knows whom has that long to begin


class PoolError(LbllmError):
    """The server does not answer, or does not take what is asked of it."""


@dataclass(frozen=True)
class PoolRun:
    """A run of the pool: Prefect's state type and message, who has it (empty: nobody), since when (seconds of the epoch), its run time (s)."""

    run: str
    state: str
    message: str = ""
    worker: str = ""
    since: float = 0.0
    seconds: float = 0.0

    def lost(self, online: Iterable[str], now: float) -> bool:
        """Whether its worker took it and died before it began."""
        if self.state != "PENDING":
            return False
        return self.worker not in online if self.worker else now - self.since > TAKEN_SECONDS


@dataclass(frozen=True)
class Pool:
    """A work pool of the server at `api`, and the deployment whose runs go into it. Everything raises PoolError."""

    api: str
    name: str
    deployment: str

    def send(self, title: str, overrides: Sequence[str], sweep: str) -> str:
        """Make a run, to be taken by the next free worker; returns its id."""
        body = {"name": title, "parameters": {"overrides": list(overrides)}, "tags": [sweep]}
        return str(_ask(f"{self.api}/deployments/{self.deployment}/create_flow_run", body)["id"])

    def unfinished(self, sweep: str) -> dict[tuple[str, ...], str]:
        """The runs of a sweep that an earlier sender left in the pool, by their overrides."""
        wanted = {"tags": {"all_": [sweep]}, "deployment_id": {"any_": [self.deployment]}, "state": {"type": {"any_": OPEN_STATES}}}
        found = _ask(f"{self.api}/flow_runs/filter", {"flow_runs": wanted, "limit": PAGE})
        return {tuple((run.get("parameters") or {}).get("overrides") or ()): str(run["id"]) for run in found}

    def look(self, runs: Sequence[str]) -> dict[str, PoolRun]:
        """How runs are, by id; one that somebody deleted is missing."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(runs), PAGE):
            found += _ask(f"{self.api}/flow_runs/filter", {"flow_runs": {"id": {"any_": list(runs[start : start + PAGE])}}, "limit": PAGE})
        return {run["id"]: _pool_run(run) for run in found}

    def online(self) -> set[str]:
        """The names of the workers that the server has heard of within their last three heartbeats."""
        return {str(worker["name"]) for worker in _ask(f"{self.api}/work_pools/{self.name}/workers/filter", {}) if worker["status"] == "ONLINE"}

    def lose(self, run: str) -> None:
        """Mark a run whose worker is gone."""
        with _told():
            set_state(self.api, run, "CRASHED", "its worker was lost before it began")

    def take_back(self, run: str) -> None:
        """Take a run that has not begun out of the pool."""
        with _told():
            set_state(self.api, run, "CANCELLED", "taken back by its sender")

    def page(self, run: str) -> str:
        """Where Prefect shows a run."""
        return f"{self.api.removesuffix('/api')}/runs/flow-run/{run}"


def open_pool(home: Path, port: int, name: str) -> Pool:
    """The pool on the server at this port, made when it is not there, with its deployment as this home needs it. PoolError when refused."""
    api = f"http://{HOST}:{port}/api"
    with _told():
        try:
            post(f"{api}/work_pools/", {"name": name, "type": "process"})
        except urllib.error.HTTPError as error:
            if error.code != CONFLICT:
                raise
    facts = {"name": name, "flow_id": _ask(f"{api}/flows/", {"name": "lbllm"})["id"], "entrypoint": ENTRY, "work_pool_name": name, "enforce_parameter_schema": False}
    told = {"description": "a cell of a sweep, for the workers of this pool", "job_variables": {"env": flow_environment(home)}}
    return Pool(api, name, str(_ask(f"{api}/deployments/", facts | told)["id"]))


@contextmanager
def _told() -> Iterator[None]:
    """Trouble with the server as a PoolError."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise PoolError(f"Prefect's server refuses {error.url} ({_words(error)})") from error
    except (OSError, ValueError, HTTPException) as error:
        raise PoolError(f"Prefect's server does not answer ({error})") from error


def _ask(url: str, body: Any) -> Any:
    with _told():
        return post(url, body)


def _words(error: urllib.error.HTTPError) -> str:
    return f"{error.code}: {error.read().decode('utf-8', 'replace')[:300]}"


def _pool_run(run: dict[str, Any]) -> PoolRun:
    state = run.get("state") or {}
    text = str(state.get("timestamp") or "")
    since = datetime.fromisoformat(text).timestamp() if text else time.time()
    worker = str((run.get("labels") or {}).get("prefect.worker.name", ""))
    message = str(state.get("message") or "").removeprefix("Flow run encountered an exception: ")
    return PoolRun(run["id"], str(state.get("type", "")), message, worker, since, float(run.get("total_run_time") or 0.0))

"""The Prefect runs whose process is gone, of a sweep or of one `make run`: marked as crashed at once.

A killed process cannot end its own run; the server's automation would notice after 90 seconds without a heartbeat
(`flows/serve.py`), but a server that lives only as long as the sweep may be gone by then. The cells of a sweep run one after
the other under the sweep's lock, so a run with its tag that is still open while no cell runs has no process; those of a
deployment belong to a work pool (`flows/pool.py`) and are left alone.

Plain HTTP: the process of a sweep does not load Prefect.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

OPEN_STATES = ["RUNNING", "PENDING", "SCHEDULED", "CANCELLING"]
BUSY = 503  # HTTP's code for "again, later": Prefect's for an sqlite file that others are writing to
BUSY_SECONDS = 120.0
log = logging.getLogger(__name__)


def mark_crashed(api: str, sweep: str, reason: str) -> int:
    """Mark the open runs of the flow `lbllm` with this tag as crashed; returns how many. A server that does not answer is left to its automation."""
    ours = {"tags": {"all_": [sweep]}, "state": {"type": {"any_": OPEN_STATES}}, "deployment_id": {"is_null_": True}}
    wanted = {"flow_runs": ours, "flows": {"name": {"any_": ["lbllm"]}}}
    return _mark(api, wanted, reason)


def mark_run_crashed(api: str, overrides: Sequence[str], reason: str) -> int:
    """The same for the run that was started with these overrides and whose process the caller has seen die."""
    wanted = {"flow_runs": {"state": {"type": {"any_": OPEN_STATES}}}, "flows": {"name": {"any_": ["lbllm"]}}}
    return _mark(api, wanted, reason, lambda run: (run.get("parameters") or {}).get("overrides") == list(overrides))


def _mark(api: str, wanted: dict[str, Any], reason: str, meant: Callable[[dict[str, Any]], bool] = lambda run: True) -> int:
    try:
        found = [run for run in post(f"{api}/flow_runs/filter", wanted) if meant(run)]
        for run in found:
            set_state(api, run["id"], "CRASHED", f"{reason[:500]}; a retry continues from the finished steps")
    except (OSError, ValueError) as error:
        log.warning("Prefect's server did not take the end of a run (%s); it marks it itself after 90 seconds", error)
        return 0
    return len(found)


def set_state(api: str, run: str, state: str, message: str) -> None:
    """Say that a run has ended so (CRASHED, CANCELLED), whatever Prefect thinks of it. Raises OSError."""
    post(f"{api}/flow_runs/{run}/set_state", {"state": {"type": state, "name": state.capitalize(), "message": message}, "force": True})


def post(url: str, body: Any) -> Any:
    """The server's answer to a JSON body; while it is busy it is asked again. Raises OSError (an HTTPError when it refuses) and ValueError."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline, pause = time.monotonic() + BUSY_SECONDS, 0.2
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            if error.code != BUSY or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 3.0)

"""Registers `lbllm/full-pipeline` and `lbllm-sweep/sweep` and serves both: `python -m flows.serve` (started by `make up`).

A served flow runs in a process of its own. When that process, or this one, is killed, the run would stay `Running` for
ever; so every run sends a heartbeat, and an automation marks a run without one for 90 seconds as Crashed.
`prefect flow-run retry` then finishes it from the cache.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import cast

from prefect import serve
from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

from flows.full_pipeline import lbllm
from flows.servers import up_lock
from flows.sweep_deployment import lbllm_sweep
from lbllm_core.engine.artifacts import home_folder

AUTOMATION = "lbllm: a run without a heartbeat has crashed"
HEARTBEAT = "prefect.flow-run.heartbeat"
LOCK_SECONDS = 10.0
SILENCE = timedelta(seconds=90)
log = logging.getLogger(__name__)


def watch_heartbeats() -> None:
    """Create the automation on the server in use, once."""
    try:
        if Automation.read(name=AUTOMATION):
            return
    except ValueError:  # there is none of that name
        pass
    ended = {f"prefect.flow-run.{word}" for word in ("Completed", "Failed", "Cancelled", "Crashed")}
    Automation(
        name=AUTOMATION,
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ended},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(name=None, force=False, state=StateType.CRASHED, message="no heartbeat for 90 seconds; retry continues from the finished steps")],
    ).create()


def main() -> None:
    """Serve until stopped."""
    held = up_lock(home_folder())
    held.acquire(timeout=LOCK_SECONDS)
    watch_heartbeats()
    pipeline = lbllm.to_deployment("full-pipeline", description=(lbllm.__doc__ or "").strip())
    sweep = lbllm_sweep.to_deployment("sweep", description=(lbllm_sweep.__doc__ or "").strip())
    serve(*cast("list[RunnerDeployment]", [pipeline, sweep]), print_starting_message=False)  # outside of a loop they are no coroutines


if __name__ == "__main__":
    main()

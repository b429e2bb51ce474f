"""`make worker`: this machine takes cells of sweeps from a Prefect work pool, one at a time, until it is stopped.

    python -m flows.worker [--pool lbllm]

The same as `prefect worker start --pool lbllm --type process --limit 1` with LBLLM_HOME set, after a look at what a person
would else find out late: whether the server of `make up` answers, here or through a tunnel, and whether the locks of the home
folder reach this machine. The process that serves the deployments holds `servers/up.lock` in the home; a worker that could
take that lock would not wait for others at the lock of a step either, and two machines could build it at once.

A cell is a process of its own, which ends with its worker; its run is then sent again (`flows/pool_sweep.py`).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout

from flows import servers
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.files import disk_errors_told
from lbllm_core.errors import LbllmError

POOL = "lbllm"


class WorkerError(LbllmError):
    """This machine cannot work for the pool."""


def check_locks(home: Path) -> None:
    """Raise WorkerError when the lock of the process that serves the deployments is free for this one."""
    try:
        with servers.up_lock(home).acquire(timeout=0):
            pass
    except Timeout:
        return
    raise WorkerError(
        f"{home} is not locked by a running `make up`: either that runs with another LBLLM_HOME or is half stopped (make status), or the locks of "
        "this folder do not reach other machines (sshfs; NFS mounted with nolock or local_lock). Share it with locks, such as NFS 4 has"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: become Prefect's worker, or return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description="Take cells of sweeps from a Prefect work pool, one at a time.")
    parser.add_argument("--pool", default=POOL, help="the work pool; it is made when it is not there")
    chosen = parser.parse_args(arguments)
    try:
        with disk_errors_told():
            home = home_folder()
            port = servers.shared_prefect(home)
            check_locks(home)
    except LbllmError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    name = f"{socket.gethostname()}-{os.getpid()}"
    print(f"worker {name} takes cells from the pool {chosen.pool} into {home}; Ctrl-C stops it", flush=True)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", chosen.pool, "--type", "process", "--limit", "1", "--name", name]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script ignores it for what it starts in the background; Prefect stops a worker with it
    os.execve(sys.executable, command, os.environ | servers.environment(home, port))


if __name__ == "__main__":
    sys.exit(main())

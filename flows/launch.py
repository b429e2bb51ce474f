"""What the Makefile's targets do: `python -m flows.launch run|preflight|doctor|up|down|status [section.field=value ...]`.

`run` checks the configuration and does the preflight before anything is started, finds or starts a Prefect server, runs the
flow in a process of its own, prints the result table and where to look next, and stops what it started. `preflight` only tells
what a run would need, `doctor` what this machine has. `up` and `down` start and stop the three background programs. Exit
codes: 0; 1 for a run that failed; 2 when what was given cannot be used (configuration, model, text, machine too small); 130
when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from flows import lab_book, servers
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.files import disk_errors_told
from lbllm_core.errors import LbllmError
from tasks.tracking import store_uri

FLOW_PROCESS = ("-m", "flows.once")


def run(home: Path, overrides: Sequence[str], record: Path | None) -> int:
    """Run the flow once on the embedded default, or as the overrides say, in a process of its own.

    The flow's process sends its last logs and events to the server when it ends, so it must end before the server does;
    and if the system kills it for its memory, this one still cleans up.
    """
    from flows.compose import compose

    config = compose(overrides)
    refused = subprocess.run([sys.executable, "-m", "flows.launch", "preflight", "--brief", *overrides], check=False).returncode
    if refused:  # a process of its own, so that torch does not stay in this one's memory while the run needs it
        return refused
    memory, began = PeakMemory(), time.monotonic()
    (home / "results").mkdir(exist_ok=True)
    answer = home / "results" / f".of-process-{os.getpid()}.json"
    with servers.prefect_for_this_run(home) as port:
        command = [sys.executable, *FLOW_PROCESS, str(answer), *overrides]
        code = subprocess.run(command, env=os.environ | servers.environment(home, port), check=False).returncode
        if code < 0:
            _tell_of_kill(-code, f"http://{servers.HOST}:{port}/api", overrides)
    if code or not answer.exists():
        answer.unlink(missing_ok=True)
        return code if code > 0 else 1
    from flows.outcome import print_outcome, record_results

    result = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    seconds = time.monotonic() - began
    print_outcome(config, result, home, seconds, memory.peak_gb())
    if record is not None:
        record_results(record, config, result, seconds, memory.peak_gb())
    return 0


def _tell_of_kill(number: int, api: str, overrides: Sequence[str]) -> None:
    """The flow's process could not say itself why it ended, here or on Prefect's page (in MLflow: `tasks/row_guard.py`)."""
    from flows.prefect_runs import mark_run_crashed

    why = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    reason = f"the flow's process was ended by signal {number}{why}"
    print(f"\n{reason}; finished blocks and steps are kept, the same command goes on from there", file=sys.stderr)
    mark_run_crashed(api, overrides, reason)


def show_config(overrides: Sequence[str]) -> int:
    """The resolved configuration as JSON, for `python -m lbllm_core.run --config` on a machine without Hydra."""
    from flows.compose import compose
    from lbllm_core.config import config_to_dict

    print(json.dumps(config_to_dict(compose(overrides)), indent=1, sort_keys=True))
    return 0


def preflight(home: Path, overrides: Sequence[str], brief: bool) -> int:
    """What a run would need, held against what there is; a table, or one line."""
    from flows.compose import compose
    from lbllm_core.engine import preflight as check

    config = compose(overrides)
    found, limits = check.preflight(config, home)
    print(check.one_line(config, found, limits) if brief else check.report(config, found, limits), flush=True)
    return 0


def up(home: Path) -> int:
    """Prefect's server, MLflow's page and the served deployment; what already runs is left as it is."""
    with servers.one_at_a_time(home):
        wanted = servers.prefect_port()
        store_uri(home)  # one that cannot be is refused before anything is started
        machine = servers.elsewhere(home)
        if machine:
            raise servers.ServerError(f"{machine} runs the servers of this home; `make worker` takes work from them, or `make down` there first")
        prefect = servers.prefect_that_answers(home)
        if prefect and prefect.port != wanted:
            raise servers.ServerError(f"a run of this home uses a Prefect server on port {prefect.port}; wait for its end, then `make up` starts one on {wanted}")
        prefect = prefect or servers.start_prefect(home, "up", wanted)
        servers.keep(home, "prefect")
        mlflow = servers.running(home, "mlflow") or servers.start_mlflow(home, servers.mlflow_port())
        if not servers.running(home, "deployment"):
            servers.start_deployment(home, prefect.port)
    print(f"Prefect   http://{servers.HOST}:{prefect.port}")
    print(f"MLflow    http://{servers.HOST}:{mlflow.port}")
    columns = lab_book.columns_address(home, lab_book.read_rows(home))
    if columns:
        print(f"          the newest runs with the columns that matter: {columns}")
    print("serving   lbllm/full-pipeline, lbllm-sweep/sweep")
    print()
    prefix = Path(sys.executable).parent / "prefect"
    shown = os.path.relpath(prefix) if prefix.is_relative_to(Path.cwd()) else prefix
    print("From this folder (with .venv activated the first word is `prefect` alone):")
    print(f"  {shown} deployment run lbllm/full-pipeline --watch")
    print(f"  {shown} deployment run lbllm/full-pipeline -p model=tiny --watch")
    print(f"  {shown} deployment run lbllm-sweep/sweep -p models='[\"tiny\"]' -p seeds='[0, 1]' --watch")
    print("Stop all three: make down")
    return 0


def down(home: Path) -> int:
    """Stop what `up` started, nothing else."""
    with servers.one_at_a_time(home):
        for name in ("deployment", "mlflow", "prefect"):
            print(f"{name}: {'stopped' if servers.stop(home, name) else 'was not running'}")
    return 0


def status(home: Path) -> int:
    """What runs, and where."""
    machine = servers.elsewhere(home)
    for name in ("prefect", "mlflow", "deployment"):
        server = servers.running(home, name)
        address = f" http://{servers.HOST}:{server.port}" if server and server.port else ""
        print(f"{name}: {'runs' + address + f' (process {server.pid})' if server else f'runs on {machine}' if machine else 'not running'}")
    return 0


class PeakMemory:
    """The largest resident memory of this process and all its children, sampled twice a second."""

    def __init__(self) -> None:
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        root = psutil.Process()
        while True:
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)
            time.sleep(0.5)

    def peak_gb(self) -> float:
        """In units of 10^9 bytes."""
        return self._peak / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.launch", description="Run LBLLM's flow, or its background programs.")
    parser.add_argument("action", choices=("run", "preflight", "doctor", "up", "down", "status", "config"))
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--record", type=Path, help="also write the measured times into this results file")
    parser.add_argument("--full", action="store_true", help="evaluate on complete splits (evaluation=full)")
    parser.add_argument("--brief", action="store_true", help="preflight: one line instead of the table")
    chosen = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    overrides = [*(["evaluation=full"] if chosen.full else []), *chosen.overrides]
    try:
        if chosen.action == "config":
            return show_config(overrides)
        if chosen.action == "doctor":
            from flows.doctor import doctor

            return doctor()
        with disk_errors_told():
            home = home_folder()
            if chosen.action == "run":
                return run(home, overrides, chosen.record)
            if chosen.action == "preflight":
                return preflight(home, overrides, chosen.brief)
            return {"up": up, "down": down, "status": status}[chosen.action](home)
    except LbllmError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; finished blocks and steps are kept, the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""The background programs of a home folder: Prefect's server, MLflow's page, the served deployment.

Each is a process group of its own, recorded in `$LBLLM_HOME/servers/<name>.json` with its id *and* its start time (an id
alone may belong to someone else after a reboot). Stopping touches exactly what is recorded. A server that `make run` started
for itself goes when the last run that uses it is gone, also when that run was killed; one of `make up` stays until `make down`.

All listen on the loopback only. Where several machines share a home, one of them runs its servers; the others reach them on the
same ports of their own loopback, through an ssh tunnel. Both servers keep sqlite files in the home, or use the databases that
PREFECT_API_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI name. This module imports neither Prefect nor MLflow: both read their settings from the
environment when they are imported, and `environment` is what they must find there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import ConfigError, LbllmError
from tasks.tracking import artifact_uri, store_file, store_uri

HOST = "127.0.0.1"
MLFLOW_PORT = 5226
MEND_SECONDS = 2.0
SILENT_SECONDS = 60.0  # a server that runs and has not answered for so long hangs: Prefect's can, when many write to its sqlite file (docs/log.md, entry 45)
START_SECONDS = 180.0  # a fresh home migrates its database first
AGAIN_SECONDS = 15.0  # what one that started long ago gets to answer
log = logging.getLogger(__name__)
SETTINGS = Path(__file__).resolve().parent.parent / "prefect.toml"


class ServerError(LbllmError):
    """A background program did not start, or its port is taken."""


@dataclass(frozen=True)
class Server:
    """A running background program: process id, its start time, port (0: none), who keeps it (`up` or `run`), and on which machine."""

    name: str
    pid: int
    created: float
    port: int
    keeper: str
    host: str = field(default_factory=socket.gethostname)

    def alive(self) -> bool:
        """True while this very process runs."""
        return _alive(self.pid, self.created)


def prefect_port() -> int:
    """LBLLM_PREFECT_PORT, else the port in `prefect.toml`, which the bare `prefect` command uses."""
    chosen = _chosen_port("LBLLM_PREFECT_PORT")
    if chosen:
        return chosen
    url = str(tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["api"]["url"])
    return int(url.rpartition(":")[2].partition("/")[0])


def mlflow_port() -> int:
    """LBLLM_MLFLOW_PORT, else ours."""
    return _chosen_port("LBLLM_MLFLOW_PORT") or MLFLOW_PORT


def _chosen_port(variable: str) -> int:
    """A port from the environment; 0 when the variable is not set."""
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and 1024 <= int(text) <= 65535):
        raise ConfigError([f"{variable}={text!r} is no port; give a number from 1024 to 65535, or unset it"])
    return int(text or 0)


def environment(home: Path, port: int) -> dict[str, str]:
    """What Prefect, MLflow and the Hugging Face libraries must find in the environment."""
    return flow_environment(home) | {"PREFECT_API_URL": f"http://{HOST}:{port}/api"}


def flow_environment(home: Path) -> dict[str, str]:
    """The part of it that is the same on every machine that shares the home."""
    (home / "prefect").mkdir(parents=True, exist_ok=True)  # Prefect waits in vain for a nested home that does not exist
    return {
        "LBLLM_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "lbllm_core,tasks,flows",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",  # progress is told by the steps themselves
    }


@contextlib.contextmanager
def prefect_for_this_run(home: Path) -> Iterator[int]:
    """A Prefect server to run a flow on, as its port: the one that is up, else one of our own, stopped after its last user.

    A server that dies or hangs meanwhile is started again on the same port: a flow waits minutes for every answer of one that is gone.
    """
    if elsewhere(home):
        yield shared_prefect(home)
        return
    users = home / "servers" / "users"
    users.mkdir(parents=True, exist_ok=True)
    mine = users / f"{os.getpid()}.json"
    with _one_at_a_time(home):
        server = prefect_that_answers(home) or start_prefect(home, "run", _free_port(prefect_port()))
        write_atomic(mine, json.dumps({"pid": os.getpid(), "created": psutil.Process().create_time()}).encode())
    try:
        with _mended(home, server):
            yield server.port
    finally:
        with _one_at_a_time(home):
            mine.unlink(missing_ok=True)
            now = running(home, "prefect")
            if now and now.keeper == "run" and not _live_users(users):
                stop(home, "prefect")


def shared_prefect(home: Path) -> int:
    """The port of this machine's loopback where the server of `make up` answers: it runs here, or a tunnel leads to it. ServerError says how."""
    port = prefect_port()
    if answers(f"http://{HOST}:{port}/api/health"):
        return port
    machine = elsewhere(home)
    tunnel = f"ssh -N -L {port}:{HOST}:{port} -L {mlflow_port()}:{HOST}:{mlflow_port()} {machine or 'MACHINE'}"
    raise ServerError(f"no Prefect server answers at {HOST}:{port}; `make up` on {machine or 'one machine'}, and on every other one a tunnel to it: {tunnel}")


@contextlib.contextmanager
def kept_up(home: Path) -> Iterator[None]:
    """The Prefect server of this machine is started again while the block lasts, when it dies or hangs.

    One on another machine is left alone, and so is one that `make down` stopped, until `make up`.
    """
    server = running(home, "prefect")
    with _mended(home, server, unless_stopped=True) if server else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _mended(home: Path, server: Server, unless_stopped: bool = False) -> Iterator[None]:
    over = threading.Event()
    threading.Thread(target=_mend, args=(home, server, over, unless_stopped), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _mend(home: Path, server: Server, over: threading.Event, unless_stopped: bool) -> None:
    """Keep a Prefect server on the port until `over`: a run beside this one, or a person, may be faster."""
    heard = time.monotonic()
    while not over.wait(MEND_SECONDS):
        noted = _recorded_here(home, "prefect")
        if noted is None and unless_stopped:
            continue
        server = noted or server
        if server.alive():
            if _healthy(server, SILENT_SECONDS / 4):
                heard = time.monotonic()
            if time.monotonic() - heard < SILENT_SECONDS:
                continue
        with _one_at_a_time(home):
            now = _recorded_here(home, "prefect")
            lives = now is not None and now.alive()
            if over.is_set() or (now is None and unless_stopped) or (lives and (now != server or _healthy(server))):
                continue
            try:
                if lives:
                    log.warning("Prefect's server does not answer any more (it hangs); it is started again, the run goes on")
                else:
                    log.warning("Prefect's server is gone (was it killed?); it is started again, the run goes on")
                stop(home, "prefect")
                server = start_prefect(home, server.keeper, server.port)
                heard = time.monotonic()
            except LbllmError as error:
                log.warning("Prefect's server could not be started again: %s", error)


def _healthy(server: Server, seconds: float = MEND_SECONDS) -> bool:
    return answers(f"http://{HOST}:{server.port}/api/health", seconds)


def prefect_that_answers(home: Path) -> Server | None:
    """The recorded Prefect server, once it answers; one that does not (its starter was killed, it hangs) is stopped."""
    server = running(home, "prefect")
    deadline = max(time.time() + AGAIN_SECONDS, server.created + START_SECONDS) if server else 0.0
    while server is not None and server.alive() and time.time() < deadline:
        if _healthy(server):
            return server
        time.sleep(0.3)
    if server is not None:
        stop(home, "prefect")
    return None


def start_prefect(home: Path, keeper: str, port: int) -> Server:
    """Prefect's server, answering on `port`. Raises ServerError with the end of its log."""
    command = ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return start(home, "prefect", command, keeper, port, lambda: answers(f"http://{HOST}:{port}/api/health"))


def start_mlflow(home: Path, port: int) -> Server:
    """MLflow's page over the home's store, without its job runners: two processes instead of ten."""
    named = [] if store_file(home) is None else ["--backend-store-uri", store_uri(home)]  # an address with a password stays in the environment
    options = [*named, "--default-artifact-root", artifact_uri(home), "--host", HOST, "--port", str(port), "--workers", "1"]
    return start(home, "mlflow", ["-m", "mlflow", "server", *options], "up", port, lambda: answers(f"http://{HOST}:{port}/health"))


def start_deployment(home: Path, port: int) -> Server:
    """The process that serves both deployments on the Prefect server at `port`; `lbllm-sweep/sweep` is registered last."""
    url = f"http://{HOST}:{port}/api/deployments/name/lbllm-sweep/sweep"
    before = time.time()
    return start(home, "deployment", ["-m", "flows.serve"], "up", 0, lambda: _registered_since(url, before), port)


def start(home: Path, name: str, command: list[str], keeper: str, port: int, ready: Callable[[], bool], prefect: int | None = None) -> Server:
    """Start `python <command>` in the background, record it, and wait until it is ready."""
    if port and not _is_free(port):
        raise ServerError(f"port {port}, where {name} would listen, is taken by another program; set LBLLM_{name.upper()}_PORT to a free one")
    output = home / "logs" / f"{name}.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    variables = os.environ | environment(home, prefect or port)
    with output.open("ab") as stream:
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=variables, cwd=SETTINGS.parent, start_new_session=True)
    server = Server(name, process.pid, psutil.Process(process.pid).create_time(), port, keeper)
    _record(home, server)
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(home, name)
            tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise ServerError(f"{name} did not start; the end of {output}:\n{tail}")
        time.sleep(0.3)
    return server


def elsewhere(home: Path) -> str:
    """The other machine that runs the servers of a shared home, while it holds their lock; empty when there is none."""
    there = _recorded(home, "prefect")
    if there is None or there.host == socket.gethostname():
        return ""
    try:
        with up_lock(home).acquire(timeout=0):
            return ""
    except Timeout:
        return there.host


def up_lock(home: Path) -> FileLock:
    """Held by the process that serves the deployments, so that other machines see that it lives and that the locks of this folder reach them."""
    return FileLock(home / "servers" / "up.lock")


def _recorded(home: Path, name: str) -> Server | None:
    try:
        return Server(**json.loads((home / "servers" / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _recorded_here(home: Path, name: str) -> Server | None:
    """The recorded program of this machine, alive or not."""
    server = _recorded(home, name)
    return server if server is not None and server.host == socket.gethostname() else None


def running(home: Path, name: str) -> Server | None:
    """The recorded program, if it is alive on this machine; a record of a dead one is removed, that of another machine is left alone."""
    server = _recorded_here(home, name)
    if server is None:
        return None
    if server.alive():
        return server
    (home / "servers" / f"{name}.json").unlink(missing_ok=True)
    return None


def keep(home: Path, name: str) -> None:
    """From now on the program belongs to `make up`, whoever started it."""
    server = running(home, name)
    if server:
        _record(home, Server(**(asdict(server) | {"keeper": "up"})))


def stop(home: Path, name: str) -> bool:
    """Stop the recorded program and its children; True when there was one."""
    server = running(home, name)
    if server is None:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, stubborn = psutil.wait_procs(family, timeout=15)
        for member in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(stubborn, timeout=5)
    (home / "servers" / f"{name}.json").unlink(missing_ok=True)
    return True


def answers(url: str, seconds: float = 2.0) -> bool:
    """True when the address answers with success, within so many seconds."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as reply:
            return bool(200 <= reply.status < 300)
    except (OSError, ValueError):
        return False


def _registered_since(url: str, since: float) -> bool:
    from datetime import datetime

    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            updated = str(json.loads(reply.read())["updated"])
    except (OSError, ValueError, KeyError):
        return False
    return bool(datetime.fromisoformat(updated).timestamp() >= since - 1)


def _record(home: Path, server: Server) -> None:
    (home / "servers").mkdir(parents=True, exist_ok=True)
    write_atomic(home / "servers" / f"{server.name}.json", json.dumps(asdict(server)).encode())


def _alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _live_users(users: Path) -> int:
    count = 0
    for path in users.glob("*.json"):
        try:
            user = json.loads(path.read_text(encoding="utf-8"))
            alive = _alive(user["pid"], user["created"])
        except (OSError, ValueError, KeyError):
            alive = False
        if alive:
            count += 1
        else:
            path.unlink(missing_ok=True)
    return count


def _one_at_a_time(home: Path) -> FileLock:
    (home / "servers").mkdir(parents=True, exist_ok=True)
    return FileLock(home / "servers" / ".lock")


def one_at_a_time(home: Path) -> FileLock:
    """Held while programs of a home are started or stopped."""
    return _one_at_a_time(home)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port(wanted: int) -> int:
    """`wanted` when nobody listens there, else any free port: a run of its own needs no fixed address."""
    if _is_free(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

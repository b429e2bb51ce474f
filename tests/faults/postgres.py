"""A Postgres of one's own for a trial: in a temporary folder, on the loopback, with a password, gone afterwards.

It refuses to run as root; then the programs run as `postgres`, where there is such a user, else as `nobody`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import Skipped
from flow_stack import free_port

START_SECONDS = 60.0
USER = "lbllm"


@dataclass(frozen=True)
class Postgres:
    """A running server: where it listens, the password of its user, and its process."""

    port: int
    password: str
    pid: int

    def url(self, database: str, driver: str = "") -> str:
        """The address of one of its databases, for SQLAlchemy."""
        return f"postgresql{driver}://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def rows(self, database: str, query: str) -> list[tuple[object, ...]]:
        """What a query gives."""
        import psycopg2

        with contextlib.closing(psycopg2.connect(self.url(database))) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())


@contextlib.contextmanager
def postgres(*databases: str) -> Iterator[Postgres]:
    """A server with these databases. Skipped where the programs or the driver are not installed."""
    programs = _programs()
    if importlib.util.find_spec("psycopg2") is None:
        raise Skipped("psycopg2 is not installed (pip install -e '.[postgres]')")
    place = Path(tempfile.mkdtemp(prefix="lbllm-postgres-"))
    who = _user()
    try:
        password = secrets.token_hex(16)
        (place / "password").write_text(password)
        if who is not None:
            for path in (place, place / "password"):
                shutil.chown(path, who)
        initdb = [str(programs / "initdb"), "-D", str(place / "data"), "-U", USER, "--auth=scram-sha-256", f"--pwfile={place / 'password'}", "-E", "UTF8", "--no-sync"]
        done = subprocess.run(initdb, user=who, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"initdb: {done.stderr}")
        port = free_port()
        command = [str(programs / "postgres"), "-D", str(place / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={place}"]
        with (place / "log").open("wb") as out:
            process = subprocess.Popen(command, user=who, cwd=place, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            server = Postgres(port, password, process.pid)
            _create(server, databases, process, place / "log")
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # its fast shutdown
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(30)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _create(server: Postgres, databases: tuple[str, ...], process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = psycopg2.connect(server.url("postgres"))
            break
        except psycopg2.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Postgres did not start: {log.read_text()[-500:]}") from None
            time.sleep(0.2)
    with contextlib.closing(connection):
        connection.autocommit = True
        with connection.cursor() as cursor:
            for name in databases:
                cursor.execute(f"CREATE DATABASE {name}")


def _programs() -> Path:
    """The folder with `initdb` and `postgres`; distributions keep them out of the path."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise Skipped("the programs of Postgres (initdb, postgres) are not installed (apt-get install postgresql)")


def _user() -> str | None:
    """Whose the server is, where this process is root's."""
    if os.getuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"

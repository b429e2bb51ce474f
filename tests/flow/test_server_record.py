"""Prefect servers that do not answer: starting, hanging, dead, on another machine. None is taken for one that answers, nor left behind."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from flow_stack import free_port

from flows import launch, servers
from flows.servers import Server


@pytest.fixture
def recorded(tmp_path: Path):
    """A process that sleeps, recorded as the Prefect server of a home."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    port = free_port()
    servers._record(tmp_path, Server("prefect", process.pid, psutil.Process(process.pid).create_time(), port, "run"))
    yield tmp_path, process, port
    process.kill()
    process.wait()


def test_one_that_never_answers_is_stopped(recorded, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    home, process, _ = recorded
    monkeypatch.setattr(servers, "START_SECONDS", 0.5)
    monkeypatch.setattr(servers, "AGAIN_SECONDS", 1.0)
    assert servers.running(home, "prefect") is not None
    assert servers.prefect_that_answers(home) is None
    process.wait(10)
    assert servers.running(home, "prefect") is None


def test_one_that_is_still_starting_is_waited_for(recorded) -> None:  # type: ignore[no-untyped-def]
    home, process, port = recorded

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    late: list[http.server.HTTPServer] = []
    threading.Timer(1.0, lambda: late.append(http.server.HTTPServer(("127.0.0.1", port), Health)) or threading.Thread(target=late[0].serve_forever, daemon=True).start()).start()
    found = servers.prefect_that_answers(home)
    assert found is not None
    assert found.port == port
    late[0].shutdown()
    assert process.poll() is None


HANGS = """
import http.server, pathlib, sys, time
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if pathlib.Path(sys.argv[2]).exists():
            time.sleep(600)
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_one_that_hangs_or_dies_in_a_sweep_is_started_again(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one that a person stops stays stopped."""
    hang = tmp_path / "hang"

    def start(home: Path, keeper: str, port: int) -> Server:
        hang.unlink(missing_ok=True)
        return servers.start(home, "prefect", ["-c", HANGS, str(port), str(hang)], keeper, port, lambda: servers.answers(f"http://127.0.0.1:{port}/api/health"))

    monkeypatch.setattr(servers, "MEND_SECONDS", 0.2)
    monkeypatch.setattr(servers, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(servers, "start_prefect", start)
    first = start(tmp_path, "up", free_port())
    try:
        with servers.kept_up(tmp_path):
            time.sleep(3.0)
            assert servers.running(tmp_path, "prefect") == first, "one that answers is left alone"
            if how == "hangs":
                hang.touch()
            else:
                psutil.Process(first.pid).kill()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (servers.running(tmp_path, "prefect") or first).pid == first.pid:
                time.sleep(0.1)
            second = servers.running(tmp_path, "prefect")
            with servers.one_at_a_time(tmp_path):
                servers.stop(tmp_path, "prefect")
            time.sleep(1.0)
            assert servers.running(tmp_path, "prefect") is None
        assert second is not None
        assert (second.pid != first.pid, second.port, second.keeper) == (True, first.port, "up")
        assert not first.alive()
    finally:
        servers.stop(tmp_path, "prefect")


def of_another_machine(home: Path, keeper: str = "up") -> None:
    """The record of a Prefect server that runs on another machine which shares the home; its process id is one of ours by chance."""
    me = psutil.Process()
    servers._record(home, Server("prefect", me.pid, me.create_time(), free_port(), keeper, "another-machine"))


def test_the_servers_of_another_machine_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another_machine(tmp_path)
    monkeypatch.setenv("LBLLM_PREFECT_PORT", str(free_port()))
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    with servers.up_lock(tmp_path).acquire(timeout=0):
        assert servers.elsewhere(tmp_path) == "another-machine"
        assert servers.running(tmp_path, "prefect") is None
        assert not servers.stop(tmp_path, "prefect")
        assert (tmp_path / "servers" / "prefect.json").exists()
        with pytest.raises(servers.ServerError, match=r"ssh -N -L .* another-machine"), servers.prefect_for_this_run(tmp_path):
            pass
        with pytest.raises(servers.ServerError, match="another-machine runs the servers of this home"):
            launch.up(tmp_path)


def test_the_record_of_a_machine_that_is_gone_hinders_nobody(tmp_path: Path) -> None:
    of_another_machine(tmp_path)
    assert servers.elsewhere(tmp_path) == "", "nobody holds the lock"
    assert servers.running(tmp_path, "prefect") is None
    assert servers.prefect_that_answers(tmp_path) is None


def test_none_is_none(tmp_path: Path) -> None:
    assert servers.prefect_that_answers(tmp_path) is None


def test_a_flow_without_a_server_ends_with_a_sentence(tmp_path: Path) -> None:
    import os

    variables = os.environ | servers.environment(tmp_path, free_port()) | {"PREFECT_CLIENT_MAX_RETRIES": "0"}
    done = subprocess.run([sys.executable, "-m", "flows.once", str(tmp_path / "answer.json"), "model=tiny"], capture_output=True, text=True, env=variables, check=False, timeout=300)
    assert done.returncode == 1
    assert "Prefect's server does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "does not answer" in (tmp_path / "answer.json").read_text()


def test_the_reason_of_a_run_outlives_a_server_that_cannot_record_it():
    import httpx

    from flows.once import _reason
    from lbllm_core.errors import ArtifactError

    refusal = httpx.HTTPStatusError("500", request=httpx.Request("POST", "http://x"), response=httpx.Response(500))
    try:
        try:
            raise ArtifactError("no space left")
        except ArtifactError:
            raise refusal from None
    except httpx.HTTPStatusError as error:
        found = _reason(error)
    assert str(found) == "no space left"
    assert _reason(ValueError()) is None

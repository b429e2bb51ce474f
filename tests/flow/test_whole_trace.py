"""What the whole session leaves behind, last in order: servers that only this machine can reach, and no secret in anything written.

Every command of the flow tests had secrets in its environment (`flow_stack.SECRETS`): as a run typed by a person, a deployment and a sweep.
"""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import psutil
from flow_stack import SECRETS, SMALL, Stack

TYPED = "hf_planted0on0the0command0line"


def test_servers_listen_on_the_loopback_alone(stack: Stack) -> None:
    listening = []
    for pid in stack.pids().values():
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            listening += [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {stack.prefect, stack.mlflow} <= {address.port for address in listening}
    assert [a for a in listening if not ipaddress.ip_address(a.ip).is_loopback] == []


def test_servers_cannot_be_reached_from_outside(stack: Stack) -> None:
    """By another address of this machine, where it has one."""
    others = {a.address for cards in psutil.net_if_addrs().values() for a in cards if a.family == socket.AF_INET and not ipaddress.ip_address(a.address).is_loopback}
    for address in sorted(others):
        for port in (stack.prefect, stack.mlflow):
            with socket.socket() as probe:
                probe.settimeout(2)
                assert probe.connect_ex((address, port)) != 0, f"{address}:{port} answers"


def test_a_page_of_another_origin_is_refused(stack: Stack) -> None:
    """A site that a person visits must not read or write the lab book through their browser."""
    import urllib.error
    import urllib.request

    import pytest

    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
        request = urllib.request.Request(f"http://127.0.0.1:{stack.mlflow}/api/2.0/mlflow/experiments/create", b'{"name": "theirs"}', {"Content-Type": "application/json", **headers})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 403


def test_no_secret_is_written(stack: Stack) -> None:
    """Logs, MLflow's and Prefect's databases, artifacts, results: everything under the home folder, as bytes."""
    done, _ = stack.run()
    assert done.returncode == 0, done.stderr
    refused = stack.call("-m", "flows.launch", "run", *SMALL, f"hub.token={TYPED}")
    assert refused.returncode == 2
    planted = [*SECRETS.values(), TYPED]
    said = [done.stdout, done.stderr, refused.stdout, refused.stderr]
    assert not [secret for secret in planted if any(secret in text for text in said)]
    files = [p for p in stack.home.rglob("*") if p.is_file() and not p.is_symlink()]
    assert {"mlflow.db", "prefect.db", "prefect.log", "deployment.log"} <= {p.name for p in files}
    assert found_in(files, planted) == []
    assert found_in([_with(stack.home / "with a secret.txt", planted[0])], planted), "the search finds what is there"


def found_in(files: list[Path], secrets: list[str]) -> list[str]:
    """Which of the files hold which secret, as text or as UTF-16."""
    wanted = [(secret, form) for secret in secrets for form in (secret.encode(), secret.encode("utf-16-le"))]
    return [f"{secret[:8]} in {file}" for file in files for data in [file.read_bytes()] for secret, form in wanted if form in data]


def _with(file: Path, text: str) -> Path:
    file.write_text(f"TOKEN={text}")
    return file

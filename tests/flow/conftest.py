"""One real stack for the flow tests: Prefect's server, MLflow's page and the served deployment, started as `make up` does."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from flow_stack import Stack, free_port


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("flow") / "home of tests", free_port(), free_port())
    made.home.mkdir()
    up = made.call("-m", "flows.launch", "up")
    pids = made.pids()
    family = [c for pid in pids.values() for c in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]]
    try:
        assert up.returncode == 0, up.stderr
        assert set(pids) == {"prefect", "mlflow", "deployment"}
        assert f"http://127.0.0.1:{made.prefect}" in up.stdout
        assert f"http://127.0.0.1:{made.mlflow}" in up.stdout
        yield made
    finally:
        down = made.call("-m", "flows.launch", "down")
    assert down.returncode == 0, down.stderr
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "`down` stops all that `up` started"

"""Other libraries beside ours, rehearsed without a GPU: packages and timers are stand-ins, the sharing of time and the table are real."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from kernel_scripts import load

from lbllm_core.report.kernel_tables import peers_table

SHAPES = ((64, 64), (128, 64))
TOKENS = (1, 256)


class Clock:
    def __init__(self, seconds: float):
        self.end, self.said = time.monotonic() + seconds, []

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def peers(monkeypatch):
    module = load("bench_peers")
    for name, value in {
        "cublas_us": lambda n, k, m: 20.0, "int8_us": lambda n, k, m: 16.0, "ours_us": lambda weights, x: 5.0, "weights_of": lambda *a: [None],
        "activations": lambda m, k: None, "first_call": lambda layers, m, k: layers[0](m), "library_us": lambda layers, m, k: layers[0](m), "installed": lambda name: True, "warm": lambda *a: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.cuda, "planned", lambda m, weight: ("decode", None))
    return module


def library(module, name: str, run, share: float = 1.0):
    return module.Library(name, lambda n, k: [lambda m: run(n, m)], share)


def test_every_row_of_every_library(peers, monkeypatch):
    monkeypatch.setattr(peers, "LIBRARIES", {"humming_w2": library(peers, "a", lambda n, m: 8.0), "gemlite_a16w2": library(peers, "b", lambda n, m: 10.0)})
    records = list(peers.measure(Clock(60), TOKENS, SHAPES))
    assert len(records) == 5 * len(TOKENS) * len(SHAPES)
    table = peers_table(records)
    assert "| N x K | M | cuBLAS fp16 | ours, stored, G=128 | GemLite A16W2 | Humming W2A16 | cuBLASLt int8 |" in table
    assert "| 128 x 64 | 256 | 20 us | 5 us, 4.00x | 10 us, 2.00x | 8 us, 2.50x | 16 us, 1.25x |" in table


def test_a_slow_tuner_costs_its_own_shape_and_is_said(peers, monkeypatch):
    def run(n: int, m: int) -> float:
        if n == 64 and m == 256:
            time.sleep(30)
        return 10.0

    monkeypatch.setattr(peers, "LIBRARIES", {"gemlite_a16w2": library(peers, "b", run)})
    clock, start = Clock(2.0), time.monotonic()
    records = list(peers.measure(clock, (1, 256, 4), SHAPES))
    assert time.monotonic() - start < 20
    reached = {(r["n"], r["m"]) for r in records if r["op"] == "gemlite_a16w2" and r["name"] == "kernel_us"}
    assert reached == {(64, 1), (128, 1), (128, 256), (128, 4)}
    assert {(r["n"], r["m"], r["why"]) for r in records if r["name"] == "not_reached"} == {(64, 256, "time"), (64, 4, "time")}
    assert sum("not measured" in text for text in clock.said) == 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    line = next(line for line in peers_table(records).splitlines() if line.startswith("| 64 x 64 | 256 |"))
    assert "| not reached |" in line


def test_a_library_that_fails_or_is_absent_ends_nothing(peers, monkeypatch):
    def fails(n: int, m: int) -> float:
        raise ValueError("no such kernel")

    monkeypatch.setattr(peers, "LIBRARIES", {"humming_w2": library(peers, "absent", fails), "gemlite_a16w2": library(peers, "b", fails)})
    monkeypatch.setattr(peers, "installed", lambda name: name != "absent")
    clock = Clock(60)
    records = list(peers.measure(clock, TOKENS, SHAPES))
    assert [r["why"] for r in records if r["name"] == "not_reached"] == ["ValueError: no such kernel"] * 4
    assert "humming_w2: absent is not installed" in clock.said
    table = peers_table(records)
    assert "Humming" not in table
    assert table.count("| failed |") == 4


def test_processes_that_compile_ahead_are_ended(monkeypatch, tmp_path):
    peers = load("bench_peers")
    script = tmp_path / "script.py"
    script.write_text("import sys, time\ntime.sleep(60 if sys.argv[4] == '256' else 0)\n")
    monkeypatch.setattr(peers, "__file__", str(script))
    monkeypatch.setattr(peers.os, "cpu_count", lambda: 4)
    started: list[subprocess.Popen] = []
    real = subprocess.Popen
    monkeypatch.setattr(peers.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    clock, start = Clock(60), time.monotonic()
    peers.warm(clock, ["gemlite_a16w2"], SHAPES, 4.0)
    assert time.monotonic() - start < 20
    assert all(process.poll() is not None for process in started)
    assert clock.said == ["compiled ahead: 4 of 6 rows ended by themselves"]


def catches_everything(limit) -> None:
    with limit(0.1):
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue


def test_the_limit_passes_a_library_that_catches_everything():
    peers = load("bench_peers")
    with pytest.raises(peers.OverTime):
        catches_everything(peers.limit)


def test_absent_packages_are_known_by_their_names():
    peers = load("bench_peers")
    assert {library.module for library in peers.LIBRARIES.values()} == {"gemlite", "humming"}
    assert not peers.installed("a_package_that_is_not_there")

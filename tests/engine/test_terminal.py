"""Progress as a person reads it: a time left that is true, whole lines without control characters in a file, one line rewritten on a terminal."""

from __future__ import annotations

import io

import pytest

from lbllm_core.engine import terminal
from lbllm_core.engine.progress import Progress
from lbllm_core.engine.terminal import Clock, Terminal, describe


def block(done: int, share: float = 0.0, begins: bool = False) -> Progress:
    return Progress("weight_distill", done, 30, "block", {}, share, begins)


def test_time_before_the_first_unit_is_not_counted() -> None:
    clock = Clock(0.0)
    assert clock.left(block(0, begins=True), 100.0) is None, "loading took 100 s"
    assert clock.left(block(0, 0.5), 105.0) == pytest.approx(295.0), "half a block in 5 s: 29.5 are left"
    assert clock.left(block(1), 110.0) == pytest.approx(290.0)


def test_a_slow_first_unit_is_left_out_once_others_tell() -> None:
    clock = Clock(0.0)
    clock.left(block(0, begins=True), 0.0)
    clock.left(block(1), 60.0)
    assert clock.left(block(2), 70.0) == pytest.approx(10.0 * 28), "the second block alone"
    assert clock.left(block(3), 80.0) == pytest.approx(10.0 * 27)


def test_blocks_of_an_earlier_attempt_cost_nothing() -> None:
    clock = Clock(0.0)
    assert clock.left(block(20, begins=True), 30.0) is None
    assert clock.left(block(21), 40.0) == pytest.approx(90.0)


def test_a_second_phase_begins_anew() -> None:
    clock = Clock(0.0)
    clock.left(Progress("ppl_x", 1, 2, "window"), 10.0)
    assert clock.left(Progress("piqa", 5, 100, "choice"), 11.0) is None
    assert clock.left(Progress("piqa", 10, 100, "choice"), 12.0) == pytest.approx(18.0)
    assert Clock(0.0).left(Progress("ppl_x", 1, 4, "window"), 3.0) == pytest.approx(9.0), "a step that does not say when it begins"


def test_a_line_says_where_it_is() -> None:
    figures = {"loss": 0.0123, "loss_before": 0.0456, "tokens_per_s": 1650.4, "train_steps": 8.0, "seconds": 3.0}
    line = describe(Progress("weight_distill", 2, 30, "block", figures, 0.5), 240.0)
    assert line.startswith("weight_distill")
    assert "block 3 of 30 (50 %)" in line
    assert line.endswith("loss 0.0123 (0.0456 before)  1650 tokens/s  4 min left")
    assert describe(Progress("weight_distill", 2, 30, "block", {"loss": 0.5}), 240.0, bar=False) == "block 2 of 30  loss 0.5  4 min left"
    done = describe(Progress("weight_distill", 30, 30, "block", figures | {"block_rel_mse": 0.2}), 0.0)
    assert "block 30 of 30 [##########]" in done
    assert "error 0.2" in done
    assert "left" not in done
    assert "ppl 21.5" in describe(Progress("ppl_x", 3, 8, "window", {"ppl": 21.5}), None)
    assert "weight error 0.2" in describe(Progress("ptq_init", 3, 8, "block", {"weight_error/a": 0.1, "weight_error/b": 0.3, "snap_error/a": 9.0}), None)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_whole_lines_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(times)))
    file, screen = io.StringIO(), Screen()
    for stream in (file, screen):
        listener = Terminal(stream)
        for done in range(31):
            listener(block(done))
    lines = file.getvalue().splitlines()
    assert not [c for c in file.getvalue() if c != "\n" and not c.isprintable()]
    assert 5 <= len(lines) < 12, "one every few seconds"
    assert "30 of 30" in lines[-1]
    assert screen.getvalue().count("\r") == 31
    assert screen.getvalue().count("\n") == 1

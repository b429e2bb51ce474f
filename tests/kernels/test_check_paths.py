"""The script that checks a GPU finds what is wrong; its comparisons run on the CPU here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_scripts import load
from lbllm_kernels.paths import REFERENCE


@pytest.fixture(scope="module")
def script():
    return load("check_paths")


def row_of(script, monkeypatch, path):
    monkeypatch.setattr(script, "SHAPES", ((33, 130),))
    monkeypatch.setattr(script, "MODES", (("codebook", 32),))
    return script.check_without_gpu(path, torch.device("cpu"))


def test_an_exact_path_passes(script, monkeypatch):
    row = row_of(script, monkeypatch, REFERENCE)
    assert row.cases == len(script.TOKENS)
    assert row.integers > 100_000
    assert not any(row.wrong.values())


def one_off(y):
    if y.numel() > 10:
        y.view(-1)[-1] = 12345
    return y


@pytest.mark.parametrize(("part", "kind"), [("linear", "fp32"), ("accumulate", "sums")])
def test_one_wrong_number_is_found(script, monkeypatch, part, kind):
    right = getattr(REFERENCE, part)
    row = row_of(script, monkeypatch, dataclasses.replace(REFERENCE, **{part: lambda *a: one_off(right(*a))}))
    assert row.wrong[kind] >= len(script.TOKENS) - 1
    assert row.first.startswith(kind)


def test_output_that_is_not_written_is_found(script, monkeypatch):
    """What `torch.empty` gives is poison, not the right answer of the run before."""

    def lazy(tokens, weight, dtype):
        y = torch.empty(tokens.q.shape[0], weight.weight.shape[0], dtype=torch.float32)
        y[:, :-1] = REFERENCE.linear(tokens, weight, torch.float32)[:, :-1]
        return y.to(dtype)

    with script.poisoned():
        row = row_of(script, monkeypatch, dataclasses.replace(REFERENCE, linear=lazy))
    assert row.wrong["fp32"] > 0


def test_no_gpu_is_said(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "nothing was checked" in capsys.readouterr().err
    assert script.main(["--device", "cpu", "--paths", "magic"]) == 2
    assert "known: " in capsys.readouterr().err

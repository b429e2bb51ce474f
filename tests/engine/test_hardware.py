"""`auto` becomes one device and one type, which the step's key can name."""

from __future__ import annotations

import pytest
import torch

from lbllm_core.config import HardwareConfig
from lbllm_core.engine import hardware
from lbllm_core.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "units", "cuda", "device", "dtype"),
    [
        ("auto", False, False, "cpu", torch.float32),
        ("auto", True, False, "cpu", torch.bfloat16),
        ("auto", False, True, "cuda", torch.bfloat16),
        ("fp32", True, True, "cuda", torch.float32),
        ("bf16", False, False, "cpu", torch.bfloat16),
    ],
)
def test_auto_is_resolved(monkeypatch, asked, units, cuda, device, dtype):
    monkeypatch.setattr(hardware, "cpu_has_bf16_units", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    found = hardware.resolve(HardwareConfig(compute_dtype=asked))
    assert (found.device.type, found.compute_dtype) == (device, dtype)
    assert found.describe() == {"device": device, "compute_dtype": str(dtype).removeprefix("torch.")}


def test_cpu_is_kept_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.resolve(HardwareConfig(device="cpu", compute_dtype="fp32")).device.type == "cpu"


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda.*choose"):
        hardware.resolve(HardwareConfig(device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_run_in_the_compute_type(dtype):
    a = torch.randn(4, 4)
    with hardware.Hardware(torch.device("cpu"), dtype).autocast():
        assert (a @ a).dtype == dtype

"""Dispatch: ranges and reasons from the table, forced paths, and one behaviour behind every row of the table of paths."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from lbllm_kernels import cpu, dispatch, paths, reference
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import PackedWeight, to_device
from lbllm_kernels.synthetic import random_packed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FACTORS = ActFactors("piecewise", 0.9, 0.95)


def usable(device):
    """Paths that can run here on weights of that device."""
    packed = to_device(random_packed(16, 64, 32), torch.device(device))
    rows = [p for p in paths.PATHS.values() if p.device in (device, "")]
    return [p.name for p in rows if p.state()[0] and p.unsupported(packed) is None]


HERE = [(device, name) for device in DEVICES for name in usable(device)]


@pytest.mark.parametrize(("device", "name"), HERE)
@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
def test_every_path_is_the_reference(device, name, mode, tokens, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, name)
    packed = to_device(random_packed(37, 150, 32, mode, entries=20), torch.device(device))
    bias = torch.randn(37, device=device)
    prepared = dispatch.prepare(packed, "piecewise", bias)
    assert prepared.choice == dispatch.Choice(name, f"{dispatch.PATH_VARIABLE}={name}")
    x = torch.randn(tokens, 150, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        y = dispatch.linear(x.to(dtype), prepared, FACTORS)
        assert y.dtype == dtype
        assert torch.equal(y, reference.linear(x.to(dtype), packed, FACTORS, bias))
    q = torch.randint(0, 128, (tokens, 150), dtype=torch.int8, device=device)
    assert torch.equal(dispatch.accumulate(q, prepared), reference.accumulate(q, packed))
    if tokens:
        route = prepared.route(tokens)
        expected = reference.quantize(x, FACTORS)
        ours = route.path.in_order(dispatch.quantize(x, FACTORS, route))
        for mine, theirs in zip(ours, (expected.q, expected.scale, expected.zero), strict=True):
            assert torch.equal(mine, theirs)
        rebuilt = route.path.rebuild(150, 37, 32, *route.weight.layout)
        assert torch.equal(route.path.linear(dispatch.quantize(x, FACTORS, route), rebuilt, torch.float32), dispatch.linear(x, prepared, FACTORS))


@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize(("out", "channels"), [(1, 1), (16, 64), (37, 150), (77, 333)])
def test_stored_tensors_come_back_bit_by_bit(mode, out, channels):
    if not cpu.library().levels:
        pytest.skip(cpu.library().reason)
    packed = dataclasses.replace(random_packed(out, channels, 32, mode, entries=20), bias=torch.randn(out))
    prepared = dispatch.prepare(packed, "uniform", keep_stored=False)
    assert prepared.stored is None
    for field in dataclasses.fields(PackedWeight):
        before, after = getattr(packed, field.name), getattr(prepared.packed, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, field.name


@pytest.mark.parametrize(
    ("name", "words"),
    [("fastest", "names no path; choose one of cpu_amx, .*reference"), ("triton", "cannot be had: no GPU"), ("cpu_avx2", "group size 8 is not a multiple of 16")],
)
def test_a_forced_path_never_falls_back(name, words, monkeypatch):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if name == "cpu_avx2" and not cpu.library().levels:
        pytest.skip(cpu.library().reason)
    monkeypatch.setenv(dispatch.PATH_VARIABLE, name)
    with pytest.raises(dispatch.PathError, match=words):
        dispatch.prepare(random_packed(8, 64, 8), "uniform")


@pytest.mark.skipif(cpu.library().functions is None, reason="the CPU path is not built")
def test_a_forced_path_needs_quantized_activations(monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "cpu_avx2")
    with pytest.raises(dispatch.PathError, match="activations are not quantized"):
        dispatch.prepare(random_packed(8, 64, 32), "none")
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    assert dispatch.prepare(random_packed(8, 64, 32), "none").choice.path == "reference"


def a_path(name, present=True, refuses=None):
    """The reference under another name."""
    return dataclasses.replace(paths.REFERENCE, name=name, device="cpu", state=lambda: (present, f"{name} state"), unsupported=lambda packed: refuses)


@pytest.fixture
def table(monkeypatch):
    """A table with ranges, and paths to fill it."""

    def install(ranges, rows, measured=True):
        monkeypatch.setattr(dispatch, "table", lambda: {"cpu": {"measured": measured, "ranges": ranges}})
        monkeypatch.setattr(dispatch, "PATHS", {row.name: row for row in rows} | {"reference": paths.REFERENCE})

    return install


def test_ranges_decide_by_the_number_of_tokens(table):
    table([{"up_to": 4, "paths": ["a", "b"]}, {"up_to": None, "paths": ["b"]}], [a_path("a"), a_path("b")])
    prepared = dispatch.prepare(random_packed(8, 64, 32), "uniform")
    assert [prepared.route(n).path.name for n in (1, 4, 5, 1000)] == ["a", "a", "b", "b"]
    assert prepared.choice == dispatch.Choice("a up to 4 tokens, b beyond", "a state; b state")


def test_equal_neighbours_are_one_route(table):
    table([{"up_to": 4, "paths": ["a", "b"]}, {"up_to": None, "paths": ["b"]}], [a_path("a", refuses="odd"), a_path("b")], measured=False)
    prepared = dispatch.prepare(random_packed(8, 64, 32), "uniform")
    assert len(prepared.routes) == 1
    assert prepared.routes[0].up_to is None
    assert prepared.choice == dispatch.Choice("b", "b state; thresholds of cpu not measured (not a: odd)")


def test_what_is_absent_or_refuses_is_passed_over_with_the_reason(table):
    table([{"up_to": None, "paths": ["a", "b", "lost"]}], [a_path("a", present=False), a_path("b", refuses="too odd")])
    assert dispatch.choose(random_packed(8, 64, 32), "uniform") == dispatch.Choice("reference", "too odd")


def test_an_unknown_device_gets_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "device_kinds", lambda device: ["quantum"])
    assert dispatch.choose(random_packed(8, 64, 32), "uniform").path == "reference"


def test_the_table_is_sound():
    for kind, entry in json.loads(dispatch.TABLE.read_text()).items():
        assert isinstance(entry["measured"], bool), kind
        ends = [r["up_to"] for r in entry["ranges"]]
        assert ends[-1] is None
        assert ends[:-1] == sorted(ends[:-1])
        assert all(r["paths"] and "reference" not in r["paths"] for r in entry["ranges"])


@pytest.mark.parametrize("device", DEVICES)
def test_bad_input_is_named(device):
    prepared = dispatch.prepare(to_device(random_packed(8, 64, 32), torch.device(device)), "uniform")
    for x, words in (
        (torch.zeros(2, 60, device=device), "takes 64 channels"),
        (torch.zeros((), device=device), "takes 64 channels"),
        (torch.zeros(2, 64, dtype=torch.int32, device=device), "takes a float type"),
        (torch.zeros(2, 64, device="meta"), "x is on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            dispatch.linear(x, prepared, ActFactors("uniform"))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_reach_the_integers(device, monkeypatch):
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    packed = to_device(random_packed(8, 640, 32), torch.device(device))
    x = torch.randn(3, 640, device=device)
    for variant in ("uniform", "none"):
        prepared = dispatch.prepare(packed, variant)
        plain = dispatch.linear(x, prepared, ActFactors(variant))
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(dispatch.linear(x, prepared, ActFactors(variant)), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_misaligned_and_strided_input(device):
    prepared = dispatch.prepare(to_device(random_packed(8, 64, 32), torch.device(device)), "uniform")
    room = torch.randn(5 * 64 + 1, device=device)
    odd, wide = room[1:].view(5, 64), torch.randn(5, 128, device=device)
    for x in (odd, wide[:, ::2], wide[:, :64], torch.randn(64, 5, device=device).T, torch.randn(1, 64, device=device).expand(5, 64)):
        assert torch.equal(dispatch.linear(x, prepared, ActFactors("uniform")), dispatch.linear(x.clone().contiguous(), prepared, ActFactors("uniform")))

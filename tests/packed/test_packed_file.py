"""A weights file written from tensors that come one at a time is the file that safetensors writes, whole or not there."""

from __future__ import annotations

import json
import random
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm_core.errors import ArtifactError
from lbllm_core.model import packed_file
from lbllm_core.model.packed_file import TYPES, checked_tensors, checksums, read_header, write_tensors


def tensors():
    g = torch.Generator().manual_seed(0)
    made = {f"{name}.{i}": torch.randint(0, 100, shape, generator=g).to(dtype) for name, dtype in TYPES.items() for i, shape in enumerate([(3, 5), (7,), (), (0, 4)])}
    return made | {"block.ä": torch.randn(6, 4, generator=g).T, "last": torch.ones(1 << 16, dtype=torch.uint8)}


def parts(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def test_it_is_what_safetensors_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_file, "COPIED", 1000)
    made = {name: t.contiguous() for name, t in tensors().items()}
    write_tensors(tmp_path / "ours", tensors().items())
    save_file(made, tmp_path / "theirs", metadata={"format": "pt", **checksums(made)})
    (ours, data), (theirs, expected) = parts(tmp_path / "ours"), parts(tmp_path / "theirs")
    assert [n for n in ours if n != "__metadata__"] == [n for n in theirs if n != "__metadata__"]
    assert ours == theirs
    assert data == expected
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    assert all(torch.equal(t, made[name]) for name, t in load_file(tmp_path / "ours").items())
    assert dict(checked_tensors(tmp_path / "ours")).keys() == read_header(tmp_path / "ours").keys() == made.keys()


def test_the_order_of_arrival_does_not_matter(tmp_path):
    shuffled = list(tensors().items())
    random.Random(1).shuffle(shuffled)
    write_tensors(tmp_path / "a", tensors().items())
    write_tensors(tmp_path / "b", shuffled)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_tensor_is_held_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def come():
        for i in range(8):
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = torch.full((1000,), i)
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor.int()

    write_tensors(tmp_path / "file", come())


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    def come():
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    write_tensors(tmp_path / "file", {"old": torch.ones(2)}.items())
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "file", come())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert list(load_file(tmp_path / "file")) == ["old"]


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="two tensors are called a"):
        write_tensors(tmp_path / "file", [("a", torch.ones(1)), ("a", torch.ones(1))])
    assert not list(tmp_path.iterdir())

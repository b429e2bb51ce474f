"""Finished blocks: kept when intact; set aside, named and redone when not, together with everything that came from them."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lbllm_core.engine.ledger import Ledger, sha256_file, write_atomic


def filled(folder, n=4):
    ledger = Ledger(folder)
    for i in range(n):
        ledger.save(i, {"x": torch.full((100,), float(i)), "code": torch.arange(5, dtype=torch.uint8)}, {"loss": i / 3, "seconds": 1.0})
    return ledger


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def garble(path):
    path.with_suffix(".json").write_text("{")


def forget(path):
    path.with_suffix(".json").write_text(json.dumps({"figures": {}}))


def test_units_come_back(tmp_path):
    ledger = filled(tmp_path)
    assert Ledger(tmp_path).finished(4) == 4
    assert Ledger(tmp_path).finished(6) == 4
    assert torch.equal(ledger.load(2)["x"], torch.full((100,), 2.0))
    assert ledger.load(2)["code"].dtype == torch.uint8
    assert ledger.figures(2) == {"loss": 2 / 3, "seconds": 1.0}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", [truncate, flip, garble, forget])
@pytest.mark.parametrize("index", [0, 2])
def test_damage_is_set_aside_with_all_that_followed(tmp_path, damage, index, caplog):
    filled(tmp_path)
    path = tmp_path / f"block_{index:03d}.safetensors"
    damage(path)
    bad = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert Ledger(tmp_path).finished(4) == index
    assert path.name in caplog.text
    assert f"block {index} onwards" in caplog.text
    assert (tmp_path / f"damaged-{path.name}.aside").read_bytes() == bad
    kept = {f"block_{i:03d}.{kind}" for i in range(index) for kind in ("safetensors", "json")}
    assert {p.name for p in tmp_path.iterdir()} == kept | {f"damaged-{path.name}.aside"}
    assert Ledger(tmp_path).finished(4) == index  # and again, without a second complaint
    assert caplog.text.count("does not match") == 1


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_half_a_unit_is_no_unit(tmp_path, suffix):
    ledger = filled(tmp_path)
    (tmp_path / f"block_001.{suffix}").unlink()
    assert ledger.finished(4) == 1


def test_kinds_do_not_mix(tmp_path):
    filled(tmp_path)
    other = Ledger(tmp_path, "checkpoint")
    assert other.finished(4) == 0
    other.save(0, {"x": torch.zeros(2)}, {})
    assert other.finished(4) == 1
    assert Ledger(tmp_path).finished(4) == 4


def test_saving_again_replaces(tmp_path):
    ledger = filled(tmp_path)
    ledger.save(1, {"x": torch.ones(3)}, {"loss": 9.0})
    assert ledger.finished(4) == 4
    assert ledger.load(1)["x"].shape == (3,)
    assert json.loads((tmp_path / "block_001.json").read_text())["sha256"] == sha256_file(tmp_path / "block_001.safetensors")


def test_a_write_that_dies_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

"""Packed folders that were cut, flipped, overwritten or mixed up: each loads to the same logits, or is an ArtifactError; nothing is written.

One file and one harm an example, drawn by hypothesis. A weight that is not the one that was written must never come out: whatever happens to
`model.safetensors`, a model that loads computes what the sound one computes. `LBLLM_LONG_TESTS=1` draws many more.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbllm_core.errors import ArtifactError
from lbllm_core.model import tiny
from lbllm_core.model.packed_folder import load_packed, load_tokenizer, pack_student

EXAMPLES = 300 if os.environ.get("LBLLM_LONG_TESTS") else 80
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
IDS = torch.arange(1, 17)[None]
harms = st.one_of(
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("overwrite"), st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40))),
    st.tuples(st.just("replace"), st.one_of(st.binary(max_size=60), st.sampled_from([b"{}", b"[]", b"null", b"1", b'"text"', b"{\x00}", "{\"a\": \"é\"}".encode("latin-1"), b"[" * 3000]))),
    st.tuples(st.just("extend"), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("swap"), st.sampled_from(FILES)),
    st.tuples(st.just("remove"), st.none()),
)


def harm(folder: Path, file: str, kind: str, how: Any) -> None:
    """Do it to one file."""
    path = folder / file
    data = bytearray(path.read_bytes())
    if kind == "flip":
        for place, bit in how:
            data[int(place * len(data))] ^= 1 << bit
    elif kind == "cut":
        data = data[: int(how * len(data))]
    elif kind == "overwrite":
        start = int(how[0] * len(data))
        data[start : start + len(how[1])] = how[1]
    elif kind == "replace":
        data = bytearray(how)
    elif kind == "extend":
        data += how
    elif kind == "swap":
        data = bytearray((folder / how).read_bytes())
    path.write_bytes(bytes(data))
    if kind == "remove":
        path.unlink()


@pytest.fixture(scope="module")
def sound(tmp_path_factory, scheme, make_teacher, make_student):
    folder = tmp_path_factory.mktemp("sound")
    teacher = make_teacher()
    pack_student(teacher, make_student(teacher, scheme), folder, scheme, tokenizer=tiny.tokenizer())
    assert all((folder / name).is_file() for name in FILES)
    return folder


@pytest.fixture(scope="module")
def logits(sound):
    with torch.no_grad():
        return load_packed(sound)(IDS).logits


@pytest.mark.parametrize("file", FILES)
def test_one_file_harmed(file, sound, logits, tmp_path, record_property):
    seen: Counter[str] = Counter()
    folder = tmp_path / "packed"
    shutil.copytree(sound, folder)
    names = sorted(p.name for p in folder.iterdir())

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(harms)
    def check(chosen):
        shutil.copy(sound / file, folder / file)
        harm(folder, file, *chosen)
        written = {p.name: p.read_bytes() for p in folder.iterdir()}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                model = load_packed(folder)
                load_tokenizer(folder, optional=True)
                found = model(IDS).logits
            seen["loaded"] += 1
            if file != "config.json":  # another number there (an epsilon, an angle) is another, valid model
                assert torch.equal(found, logits), f"{chosen} gave another model"
        except ArtifactError as error:
            seen["refused" if str(error).strip() else "silent"] += 1
        assert not seen["silent"]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == written, "loading wrote into the folder"

    check()
    record_property("inputs", sum(seen.values()))
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    assert sorted(p.name for p in sound.iterdir()) == names
    if file == "model.safetensors":
        assert seen["refused"] > 0.9 * sum(seen.values())
    if file == "README.md":
        assert not seen["refused"]

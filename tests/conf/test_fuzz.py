"""Overrides and config files that nobody thought of: each composes, or is a ConfigError in sentences; nothing else escapes, nothing is written.

Words are drawn from what exists (keys, groups, their files), from what is nearly so, and from any text. `LBLLM_LONG_TESTS=1` draws many more.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows import compose as composing
from flows import launch
from lbllm_core.config import SECTIONS, RunConfig, config_from_dict, config_to_dict, problems
from lbllm_core.errors import ConfigError
from lbllm_core.overrides import field_types
from lbllm_core.run import read_config

LONG = bool(os.environ.get("LBLLM_LONG_TESTS"))
KEYS = sorted(field_types())
GROUPS = composing.groups()
MANY = settings(max_examples=1500 if LONG else 150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=150 if LONG else 25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

any_text = st.text(max_size=40)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from(["1e400", "-0", "0x10", "1_000", "٣", "²", "nan", "-inf", "9" * 5000])).map(str)
values = st.one_of(any_text, numbers, st.sampled_from(["true", "null", "[]", "{}", "[a,b", "{a: }", "{a: {b: 1}}", "${seed}", "${oc.env:HOME}", "'", '"', "../..", "/", "a,b", "\x00", "[" * 400]))
keys = st.one_of(
    st.sampled_from(KEYS), st.sampled_from(sorted(GROUPS)), st.sampled_from(SECTIONS), any_text, st.builds(lambda key, i: key[:i] + key[i + 1 :], st.sampled_from(KEYS), st.integers(0, 20))
)
files = st.sampled_from(sorted(GROUPS)).flatmap(lambda group: st.sampled_from(GROUPS[group]).map(lambda word: f"{group}={word}"))
overrides = st.lists(st.one_of(st.builds(lambda key, value: f"{key}={value}", keys, values), files, any_text), max_size=4)
plain = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)), max_leaves=6)
sections = st.dictionaries(st.one_of(st.sampled_from([*SECTIONS, "seed", "experiment"]), any_text), st.one_of(plain, st.dictionaries(st.sampled_from([k.rpartition(".")[2] for k in KEYS]), plain, max_size=4)), max_size=4)


_real = composing._compose_files


@functools.cache
def _composed(choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return _real(dict(choices))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hydra once for a set of files, and an empty working folder."""
    monkeypatch.setattr(composing, "_compose_files", lambda choices: json.loads(json.dumps(_composed(tuple(sorted(choices.items()))))))
    monkeypatch.chdir(tmp_path)


def judged(made: RunConfig | None, error: ConfigError | None) -> str:
    """What is always true of a result: a sound configuration that survives JSON, or sentences."""
    if error is not None:
        assert error.problems
        assert all(isinstance(p, str) and p.strip() and "Traceback" not in p for p in error.problems)
        return "refused"
    assert made is not None
    assert not problems(made)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(made), allow_nan=False))) == made
    return "composed"


def test_overrides(record_property: Any, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @MANY
    @given(overrides)
    def check(words: list[str]) -> None:
        for read in (composing.compose, lambda given: read_config(None, given)):
            try:
                seen[judged(read(words), None)] += 1
            except ConfigError as error:
                seen[judged(None, error)] += 1

    check()
    record_property("inputs", sum(seen.values()))
    assert seen["refused"] > seen["composed"] > 10
    assert not list(tmp_path.iterdir())


def test_config_files(record_property: Any, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @MANY
    @given(st.one_of(sections, plain))
    def check(content: Any) -> None:
        file = tmp_path / "run.json"
        file.write_text(json.dumps(content))
        try:
            seen[judged(read_config(file, []), None)] += 1
        except ConfigError as error:
            seen[judged(None, error)] += 1
        file.unlink()

    check()
    record_property("inputs", sum(seen.values()))
    assert seen["refused"] > 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["preflight", "config"])
def test_as_typed(action: str, record_property: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_home: Path) -> None:
    """Through the command line to the end: exit code 0 or 2, no traceback, and outside the home folder nothing is written."""
    home = tmp_path / "home"
    home.mkdir()
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (home / "models").symlink_to(models_home / "models")
    monkeypatch.setenv("LBLLM_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    seen: Counter[int] = Counter()

    @FEW
    @given(overrides)
    def check(words: list[str]) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = launch.main([action, *(["model=tiny"] if action == "preflight" else []), *words])
            except SystemExit as refused:  # argparse, of a word that begins like an option
                code = int(refused.code or 0)
        assert code in (0, 2), (code, said.getvalue())
        assert "Traceback" not in said.getvalue()
        assert code == 0 or said.getvalue().strip()
        seen[code] += 1

    check()
    record_property("inputs", sum(seen.values()))
    assert seen[2]
    assert [p.name for p in tmp_path.iterdir()] == ["home"]

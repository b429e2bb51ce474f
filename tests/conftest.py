"""Fixtures that every test folder shares: the home with the cached models, the tiny model, the data folder, and files of conf/ composed once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Choices = Mapping[str, str]


@pytest.fixture(scope="session")
def models_home() -> Path:
    """A home folder that keeps `tiny` (trained in 15 s) between test runs; its content is checked by digest on every use."""
    return Path(os.environ.get("LBLLM_HOME", Path(__file__).resolve().parents[1] / ".lbllm"))


@pytest.fixture(scope="session")
def tiny_teacher(models_home: Path):
    """The tiny model of seed 0 as a Teacher."""
    from lbllm_core.config import ModelConfig
    from lbllm_core.model.load import load_teacher

    return load_teacher(ModelConfig(), models_home)


@pytest.fixture
def data_folder() -> Path:
    """LBLLM_DATA; skips where it is not set."""
    value = os.environ.get("LBLLM_DATA", "")
    if not value:
        pytest.skip("LBLLM_DATA is not set: it names the folder with development data (stories260K, WikiText-2, tasks)")
    return Path(value)


@pytest.fixture(scope="session")
def through_hydra() -> Callable[[Choices], dict[str, Any]]:
    """Hydra takes a twelfth of a second for a set of files; the files do not change while the tests run."""
    from flows import compose

    real = compose._compose_files
    cached = functools.cache(lambda choices: real(dict(choices)))
    return lambda choices: cached(tuple(sorted(choices.items())))


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch, through_hydra: Callable[[Choices], dict[str, Any]]) -> None:
    """Each set of choices goes through Hydra once; everything after it is done every time."""
    from flows import compose

    monkeypatch.setattr(compose, "_compose_files", through_hydra)

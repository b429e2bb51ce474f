"""Fixtures that every test folder shares: the home with the cached models, the tiny model, and the data folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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

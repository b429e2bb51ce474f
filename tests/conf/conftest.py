"""Hydra takes a twelfth of a second for a set of files; the files do not change while the tests run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest

from flows import compose


@functools.cache
def _composed(choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return _real(dict(choices))


_real = compose._compose_files


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of choices goes through Hydra once; everything after it is done every time."""

    def compose_files(choices: Mapping[str, str]) -> dict[str, Any]:
        return _composed(tuple(sorted(choices.items())))

    monkeypatch.setattr(compose, "_compose_files", compose_files)

"""The table of measured plans: rows found, the next larger token count, nothing where nothing was measured, bad files named."""

from __future__ import annotations

import pytest
from lbllm_kernels import cuda_plans

TABLES = {
    "a card": [(64, 128, "codebook-32", 1, "fused", 2, 16, 64), (64, 128, "codebook-32", 8, "decode", 1, 8, 0), (64, 128, "codebook-32", 16, "decode", 3, 8, 16),
               (64, 128, "codebook-32", 32, "narrow", 0, 0, -1), (64, 128, "codebook-32", 512, "hopper128", 0, 0, -1), (7, 128, "codebook-32", 8, "fused", 1, 8, 0)],
}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("LBLLM_CUDA_PLANS", str(tmp_path / "plans.json"))
    cuda_plans.write(TABLES, cuda_plans.place())
    cuda_plans.find.cache_clear()
    yield
    cuda_plans.find.cache_clear()


@pytest.mark.parametrize(("tokens", "cut"), [(1, ("fused", 2, 16, 64)), (2, ("decode", 1, 8, 0)), (8, ("decode", 1, 8, 0)), (9, ("decode", 3, 8, 16)), (17, ("narrow", 0, 0, -1)), (33, ("hopper128", 0, 0, -1)), (5000, ("hopper128", 0, 0, -1))])
def test_the_next_larger_token_count_serves(tables, tokens, cut):
    found = cuda_plans.find("a card", 64, 128, "codebook-32", tokens)
    assert found == (None if cut is None else cuda_plans.Cut(*cut))


@pytest.mark.parametrize("asked", [("another card", 64, 128, "codebook-32"), ("a card", 65, 128, "codebook-32"), ("a card", 64, 128, "explicit-32")])
def test_nothing_where_nothing_was_measured(tables, asked):
    assert cuda_plans.find(*asked, 1) is None


@pytest.mark.parametrize("tokens", [9, 16, 17])
def test_no_plan_is_stretched_over_what_its_path_takes(tables, tokens):
    assert cuda_plans.find("a card", 7, 128, "codebook-32", tokens) is None


def test_a_written_table_comes_back(tmp_path):
    cuda_plans.write(TABLES, tmp_path / "plans.json")
    assert cuda_plans.load(tmp_path / "plans.json") == TABLES
    assert len((tmp_path / "plans.json").read_text().splitlines()) == 10


def test_new_rows_replace_those_of_their_shape_and_are_found_at_once(tables):
    assert cuda_plans.find("a card", 64, 128, "codebook-32", 1).warps == 16
    cuda_plans.merge("a card", [(64, 128, "codebook-32", 1, "fused", 1, 4, 0)], cuda_plans.place())
    assert cuda_plans.find("a card", 64, 128, "codebook-32", 1).warps == 4
    assert cuda_plans.find("a card", 64, 128, "codebook-32", 8) is None
    assert cuda_plans.find("a card", 7, 128, "codebook-32", 8) is not None


def test_no_file_is_no_plan(tmp_path):
    assert cuda_plans.load(tmp_path / "absent.json") == {}


@pytest.mark.parametrize("row", ['[64, 128, "codebook-32", 1, "slow", 2, 16, 64]', "[1, 2]", '[64, 128, "codebook-32", 1, "fused", 5, 16, 64]', '[64, 128, "codebook-32", "1", "fused", 1, 16, 64]', '[64, 4097, "codebook-32", 8, "early", 1, 8, 0]',
                                  '[64, 128, "codebook-32", 16, "early", 1, 9, 0]', '[64, 128, "codebook-32", 32, "early", 1, 8, 0]'])
def test_a_bad_row_is_named(row):
    with pytest.raises(ValueError, match="plans of a card: row"):
        cuda_plans.parse(f'{{"a card": [{row}]}}')


def test_the_committed_table_is_good():
    cuda_plans.parse(cuda_plans.FILE.read_text() if cuda_plans.FILE.is_file() else "{}")

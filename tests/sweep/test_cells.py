"""Words become cells: each once, in order, the model winning over the experiment; everything wrong told at once."""

from __future__ import annotations

import pytest

from flows import cells
from flows.cells import Request, default_name, words
from flows.compose import groups
from lbllm_core.config import SECTIONS, digest
from lbllm_core.errors import ConfigError


def titles(**given: str) -> list[str]:
    return [cell.title for cell in cells.cells(Request(**{key: words(value) for key, value in given.items()}))[1]]  # type: ignore[arg-type]


def problems(request: Request) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        cells.cells(request)
    return caught.value.problems


def test_words() -> None:
    assert words(" a, b,,a\tc ") == ("a", "b", "c")
    assert words("") == ()


def test_each_model_gets_its_own_default_experiment() -> None:
    assert titles(models="llama1,tiny,smollm2_135m") == ["llama1 embedded seed 0", "tiny tiny seed 0", "smollm2_135m embedded seed 0"]


def test_models_by_experiments_by_seeds_each_once() -> None:
    found = titles(models="smollm2_135m", experiments="embedded,smoke,embedded", seeds="0 1")
    assert found == [f"smollm2_135m {experiment} seed {seed}" for experiment in ("embedded", "smoke") for seed in (0, 1)]
    assert titles(models="tiny", experiments="tiny") == titles(models="tiny") == titles(experiments="tiny") == ["tiny tiny seed 0"]
    assert titles(models="tiny", seeds="3,03") == ["tiny tiny seed 3"]  # two words for one cell


def test_the_model_wins_over_the_experiments_own() -> None:
    _, (cell,) = cells.cells(Request(models=("stories260k",), experiments=("smoke",), overrides=("dataset.seq_len=128",)))
    assert (cell.config.model.name, cell.config.model.path, cell.config.experiment) == ("stories260k", "models/stories260K", "smoke")
    assert cell.config.model.blocks == 4  # a single value of the experiment stays
    assert cell.config.dataset.seq_len == 128
    assert cell.config.tracking.sweep


def test_words_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"model": ("tiny", "smollm2_135m", "llama2"), "experiment": ("ablation_a", "ablation_b", "paper_one", "paper_recipe", "tiny", "embedded")}
    own = {"paper_one": "llama2"}
    monkeypatch.setattr(cells, "_model_of", lambda name: own.get(name, ""))
    every = known["experiment"]
    assert cells._pairs(["tiny"], ["ablations", "tiny"], every, []) == [("tiny", "ablation_a"), ("tiny", "ablation_b"), ("tiny", "tiny")]
    assert cells._pairs([], ["paper"], every, []) == [("", "paper_one")]
    found: list[str] = []
    assert cells._pairs(["llama2", "tiny"], ["paper"], every, found) == [("llama2", "paper_one")]
    assert len(found) == 1
    assert "no row of tiny" in found[0]


def test_a_word_for_many_without_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    cells._pairs(["tiny"], ["ablations"], ("tiny",), found)
    assert "ablation_*" in found[0]


def test_everything_wrong_at_once() -> None:
    found = problems(Request(("tiny", "lama2"), ("embeded",), ("0", "-1", "x"), ("scheme.weight_bit=2",), "../up"))
    text = "\n".join(found)
    for word in ("did you mean llama2?", "did you mean embedded?", "'-1'", "'x'", "did you mean scheme.weight_bits?", "SWEEP"):
        assert word in text
    assert text.count("scheme.weight_bits?") == 1, "what is wrong with every cell is told once"


def test_a_cell_that_does_not_compose_is_named() -> None:
    (found,) = problems(Request(("smollm2_135m", "tiny"), ("embedded",)))
    assert found.startswith("tiny x embedded: dataset.seq_len=512")


def test_nothing_asked() -> None:
    (found,) = problems(Request())
    assert "MODELS" in found
    assert "EXPERIMENTS" in found


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a'b", "x" * 101, "a..b", "ä"])
def test_names_that_could_escape(name: str) -> None:
    assert any("SWEEP" in problem for problem in problems(Request(("tiny",), name=name)))


def test_a_sweeps_name_is_its_words() -> None:
    assert default_name(Request(("tiny", "llama1"), ("smoke",), ("1", "0"))) == "llama1+tiny--smoke--0+1"
    assert default_name(Request(("llama1", "tiny"), ("smoke",), ("0", "1"))) == "llama1+tiny--smoke--0+1"
    long = default_name(Request(tuple(f"model_{i}" for i in range(40))))
    assert len(long) <= 100
    assert long != default_name(Request(tuple(f"model_{i}" for i in range(41))))
    first, second = (default_name(Request(("tiny",), overrides=(o,))) for o in ("seed=1", "seed=2"))
    assert first != second


@pytest.mark.usefixtures("composed_once")
def test_ablations_over_another_recipe() -> None:
    """A file is a cell, also where two mean one run: the second finds every step done, and has a row of its own name."""
    request = Request(("smollm2_135m",), ("ablations",), overrides=("base=method_ablations",))
    name, found = cells.cells(request)
    known = [experiment for experiment in groups()["experiment"] if experiment.startswith("ablation_")]
    assert [cell.title for cell in found] == [f"smollm2_135m {experiment} seed 0" for experiment in known]
    assert (len(found), len({digest(cell.config, list(SECTIONS)) for cell in found})) == (73, 61)
    assert all("base=method_ablations" in cell.overrides for cell in found)
    assert {cell.config.end_to_end.steps for cell in found} == {80}, "the recipe's, not the default's"
    assert name != default_name(Request(("smollm2_135m",), ("ablations",))), "another base is another sweep"


@pytest.mark.usefixtures("composed_once")
def test_a_mistyped_recipe_is_told_once_and_a_recipe_among_the_experiments_is_named() -> None:
    (found,) = problems(Request(("smollm2_135m",), ("ablation_stage4_off", "ablation_stage4_on"), overrides=("base=method_ablation",)))
    assert found.startswith("base=method_ablation is no recipe")
    assert "did you mean method_ablations?" in found
    (found,) = problems(Request(("smollm2_135m",), ("ablation_stage4_off", "method"), overrides=("base=method_ablations",)))
    assert found.startswith("smollm2_135m x method: base=method_ablations: conf/experiment/method.yaml is laid over no other recipe")

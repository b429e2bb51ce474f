"""What README and the manual tell people to type exists: targets and their variables, words of conf/, modules, options, deployments.

Reads text and composes configurations: nothing is run.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flows.cells import Request, cells
from flows.cells import words as cell_words
from flows.compose import compose, groups
from lbllm_core.errors import LbllmError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ANYWHERE = {"ARGS", "PYTHON", "LBLLM_HOME", "LBLLM_PREFECT_PORT", "LBLLM_MLFLOW_PORT"}  # read by the Makefile's head, or by the programs
DEPLOYMENTS = {"lbllm/full-pipeline": ("full_pipeline.py", "lbllm"), "lbllm-sweep/sweep": ("sweep_deployment.py", "lbllm_sweep")}
OWN = re.compile(r"(_|^model=)mine$")  # a file that the reader is told to write
MADE_UP = re.compile(r"…|\.\.\.|\bname$")


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and what stands between backticks."""
    for block in re.findall(r"^(?:```|~~~)\w*\n(.*?)^(?:```|~~~)", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))


def typed(start: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every command in the pages that begins so, behind settings like `X=1 make run`; comments are left out."""
    found = []
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            match = re.match(rf"(?:[A-Z_]+=\S+ +)*({start}.*)", line)
            if match:
                words = re.split(r"  +(?=[a-z])|\s+#|\s*[|>]|;", match[1])[0]
                found.append((page.name, shlex.split(words)))
    return found


@cache
def makefile() -> dict[str, str]:
    """Each target with its rule."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name: name + rest for name, rest in re.findall(r"^([a-z-]+)(:.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)}


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if not MADE_UP.search(word) and not OWN.search(word)]


@pytest.mark.usefixtures("composed_once")
def test_make() -> None:
    commands = typed("make ")
    assert len(commands) > 60
    for page, (_, target, *settings) in commands:
        target, settings = target.rstrip(".,:"), [word for word in settings if re.match(r"[A-Z_]+=", word)]
        assert target in makefile(), f"{page}: make {target}"
        for setting in settings:
            name, _, value = setting.partition("=")
            assert name in ANYWHERE or re.search(rf"\$\$?\(?{name}\b", makefile()[target]), f"{page}: make {target} reads no {name}"
            if name == "ARGS" and target != "sweep":  # a sweep's go to each of its cells, below
                compose(overrides(value.split()))
        if target == "sweep" and any(word.startswith(("MODELS=", "EXPERIMENTS=")) for word in settings):
            given = {name: value for name, _, value in (setting.partition("=") for setting in settings)}
            models, experiments, seeds = (tuple(overrides(list(cell_words(given.get(name, ""))))) for name in ("MODELS", "EXPERIMENTS", "SEEDS"))
            cells(Request(models, experiments, seeds, tuple(overrides(given.get("ARGS", "").split()))))


def test_choices_outside_of_commands() -> None:
    """`experiment=method`, `model=tiny` and the like, wherever they stand between backticks."""
    known = groups()
    found = 0
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            for group, value in re.findall(rf"(?<![\w.])({'|'.join(known)})=([\w-]+)", line):
                found += 1
                assert value in known[group] or OWN.search(f"{group}={value}") or MADE_UP.search(value), f"{page.name}: {group}={value}"
    assert found > 20


def source(words: list[str]) -> tuple[Path, list[str]]:
    """The file that `python -m module` or `python file` runs, and the words behind it."""
    if words[1] != "-m":
        return ROOT / words[1], words[2:]
    below = words[2].replace(".", "/")
    return next((p for p in (ROOT / f"{below}.py", ROOT / "kernels" / f"{below}.py", ROOT / below / "__main__.py") if p.exists()), ROOT / f"{below}.py"), words[3:]


def test_python() -> None:
    commands = [command for command in typed("python ") if len(command[1]) > 1]
    assert len(commands) > 15
    for page, words in commands:
        file, rest = source(words)
        assert file.exists(), f"{page}: {' '.join(words)}"
        text = file.read_text(encoding="utf-8")
        for word in rest:
            assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in text, f"{page}: {file.name} has no {word}"
        if file.name == "run.py":
            compose(overrides([word for word in rest if "=" in word]))


def test_deployments() -> None:
    commands = [words for _, words in typed("prefect deployment run ") if len(words) > 3]
    assert len(commands) >= 4
    for words in commands:
        file, name = DEPLOYMENTS[words[3]]
        tree = ast.parse((ROOT / "flows" / file).read_text(encoding="utf-8"))
        (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        given = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-p"}
        assert given <= {argument.arg for argument in function.args.args}, words


def test_what_is_wrong_is_found() -> None:
    assert list(code("a `make run\n ARGS=x` b\n```\nmake up \\\n  X=1\n```\n    python x.py\n")) == ["make up    X=1", "python x.py", "make run ARGS=x"]
    assert "run" in makefile()
    assert "runs" not in makefile()
    assert "$(FULL)" in makefile()["run"]
    assert "$(FULL)" not in makefile()["up"]
    with pytest.raises(LbllmError):
        compose(["experiment=metod"])

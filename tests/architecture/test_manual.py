"""The manual says what is so: links lead somewhere, troubleshooting headings are messages of the source, the equation map names what exists.

Reads text only: no network, no Sphinx (`make docs` builds with every warning an error).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lbllm_core.overrides import field_types

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [p for folder in ("lbllm_core", "kernels/lbllm_kernels", "tasks", "flows") for p in sorted((ROOT / folder).rglob("*.py"))]
GAP = "…"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = "reference/"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """`docs/build.py`, which is a program and no package."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_build"] = module
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """What can stand behind a # for this page, as GitHub and MyST make it from headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def without_code(text: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        if file.startswith(GENERATED) and page.parent.name == "docs":
            assert re.fullmatch(r"reference/(settings|choices|commands|modules)\.md", file)
            continue
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


def test_every_picture_is_shown() -> None:
    shown = {Path(target).name for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8"))}
    assert {p.name for p in (ROOT / "docs" / "pictures").iterdir()} <= shown


def test_every_page_is_in_the_contents() -> None:
    listed = set(re.findall(r"^([a-z/]+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_generated_pages(build: ModuleType, tmp_path: Path) -> None:
    build.prepare(tmp_path / "source")
    settings = (tmp_path / "source" / "reference" / "settings.md").read_text()
    assert not [key for key in field_types() if f"`{key}`" not in settings]
    assert "`codebook`, `explicit`" in settings
    choices = (tmp_path / "source" / "reference" / "choices.md").read_text()
    assert not [p for p in (ROOT / "conf").glob("*/*.yaml") if f"`{p.stem}`" not in choices]
    assert "`make test-faults`" in (tmp_path / "source" / "reference" / "commands.md").read_text()
    modules = (tmp_path / "source" / "reference" / "modules.md").read_text()
    for words in ("## lbllm_core.quant.weight", "class QuantizedWeight", "def run_step("):
        assert words in modules
    for page in (tmp_path / "source").glob("*.md"):
        for target in LINK.findall(without_code(page.read_text())):
            if "://" not in target and not target.startswith("#"):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def messages() -> Iterator[str]:
    """Every text in the source, with a gap for each value that is put in."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sdr]", GAP, node.value)


def test_troubleshooting_headings_are_messages() -> None:
    """A heading's words between the gaps stand in one message, in their order."""
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) >= 20
    known = list(messages())
    assert not [h for h in headings if not any(re.search(".*".join(re.escape(part.strip()) for part in h.split(GAP)), m, re.DOTALL) for m in known)]
    assert not [h for h in headings if sum(len(part.strip()) for part in h.split(GAP)) < 15], "too little to know it by"
    assert not any(re.search(re.escape("this message does not exist"), m) for m in known)


def test_the_equation_map_names_what_exists() -> None:
    pairs = []
    for line in (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and "`" in line:
            cell, folder = line.split("|")[-2], ""
            for file, names in re.findall(r"`([\w/]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?", cell):
                folder = file.rpartition("/")[0] or folder
                file = f"{folder}/{file.rpartition('/')[2]}"  # a bare name lies beside the one before it
                pairs += [(file, name) for name in re.findall(r"`([\w.]+)`", names) or [""]]
    assert len(pairs) >= 20
    for file, name in pairs:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in filter(None, name.split(".")):
            defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assert part in defined, f"{file} has no {name}"
            tree = defined[part]  # type: ignore[assignment]

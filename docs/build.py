"""Builds the manual: `make docs` (Sphinx with MyST; pages are Markdown). Into build/docs; every warning is an error.

The pages of this folder are copied beside generated ones, so that nothing is said twice:

    reference/settings   every key of the configuration, from the fields of `lbllm_core/config.py`
    reference/choices    the files of conf/, with the first comment of each
    reference/commands   the targets of the Makefile
    reference/modules    essays, signatures and docstrings of the library, read from the source without importing it

README, SECURITY and CHANGELOG are included as they are. Links that lead to files outside of the manual become their names.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lbllm_core.config import SECTIONS, RunConfig
from lbllm_core.overrides import field_types

ROOT = Path(__file__).resolve().parent.parent
SOURCE, OUT = ROOT / "build" / "docs-source", ROOT / "build" / "docs"
PACKAGES = (ROOT / "lbllm_core", ROOT / "kernels" / "lbllm_kernels", ROOT / "tasks", ROOT / "flows")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CONF = """project = "LBLLM"
extensions = ["myst_parser"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "230px"}
html_show_copyright = False
suppress_warnings = ["misc.highlighting_failure"]
"""


def settings() -> str:
    """Every configuration key: type, default, what is allowed, what it means."""
    types = field_types()
    lines = ["# Settings", "", "Written by `docs/build.py` from `lbllm_core/config.py`. `make run ARGS='section.field=value'` sets one; `make config` prints all.", ""]
    lines += _section(RunConfig, "", types)
    for name in SECTIONS:
        cls = type(getattr(RunConfig(), name))
        lines += [f"## {name}", "", (cls.__doc__ or "").strip(), "", *_section(cls, f"{name}.", types)]
    return "\n".join(lines) + "\n"


def _section(cls: type, prefix: str, types: dict[str, object]) -> list[str]:
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = types.get(f"{prefix}{field.name}")
        if kind is None:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        meta = field.metadata
        name = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) and not getattr(kind, "__args__", ()) else str(kind)
        allowed = ", ".join(f"`{word}`" for word in meta["allowed"]) if "allowed" in meta else f"{meta['low']:g} to {meta['high']:g}" if "low" in meta else f"`{name}`"
        shown = ", ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)
        rows.append(f"| `{prefix}{field.name}` | {f'`{shown}`' if shown and default != {} else ''} | {allowed} | {_cell(meta.get('help', ''))} |")
    return [*rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


def choices() -> str:
    """The vocabulary: files of conf/ by folder, each with its first comment."""
    lines = ["# Choices", "", "Written by `docs/build.py` from the files of `conf/`. `make run ARGS='folder=name'` chooses one.", ""]
    for folder in sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir() and not p.name.startswith(("_", "."))):
        lines += [f"## {folder.name}", "", "| name | what |", "|---|---|"]
        for file in sorted(folder.glob("*.yaml")):
            comments = [line.lstrip("# ").strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#") and "@package" not in line]
            lines.append(f"| `{file.stem}` | {_cell(comments[0]) if comments else ''} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The Makefile's targets."""
    lines = ["# Commands", "", "Written by `docs/build.py` from the Makefile. Variables stand behind the target: `make run ARGS='model=tiny'`.", "", "| command | what |", "|---|---|"]
    for target, words in re.findall(r"^([a-z-]+):.*?## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
        lines.append(f"| `make {target}` | {_cell(words)} |")
    return "\n".join(lines) + "\n"


def modules() -> str:
    """Each module's essay, and the signatures and docstrings of what it offers."""
    lines = ["# Modules", "", "Written by `docs/build.py` from the source: what each module is about, and what it offers.", ""]
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            essay = ast.get_docstring(tree)
            if essay:
                name = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
                lines += [f"## {name}", "", *_block("text", essay), *[line for node in tree.body for line in _definition(node)]]
    return "\n".join(lines) + "\n"


def _definition(node: ast.stmt) -> Iterator[str]:
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return
    yield from _block("python", "\n".join(_signature(node, "")))


def _signature(node: ast.FunctionDef | ast.ClassDef, indent: str) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        yield f"{indent}class {node.name}({', '.join(map(ast.unparse, node.bases))}):" if node.bases else f"{indent}class {node.name}:"
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{indent}def {node.name}({ast.unparse(node.args)}){returns}:"
    doc = ast.get_docstring(node)
    if doc:
        yield from (f"{indent}    {line}".rstrip() for line in f'"""{doc}"""'.splitlines())
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.AnnAssign):
                yield f"{indent}    {ast.unparse(inner)[:160]}"
            elif isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield from _signature(inner, indent + "    ")


def _block(kind: str, text: str) -> list[str]:
    return [f"~~~~{kind}", text, "~~~~", ""]


def linked(text: str, page: Path) -> str:
    """Links of a page that lead to another page of the manual stay (and lose a leading docs/); others to files become their names."""

    def change(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        file, _, anchor = target.partition("#")
        resolved = (page.parent / file).resolve()
        docs = ROOT / "docs"
        if resolved.is_relative_to(docs):
            return f"{mark}[{words}]({resolved.relative_to(docs).as_posix()}{'#' + anchor if anchor else ''})"
        return f"`{resolved.relative_to(ROOT).as_posix()}`" if words == target or not words else f"{words} (`{resolved.relative_to(ROOT).as_posix()}`)"

    return LINK.sub(change, text)


def prepare(source: Path = SOURCE) -> None:
    """Write everything that Sphinx reads."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "pictures", source / "pictures")
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        included = re.match(r"```\{include\} \.\./(\w+\.md)\n```\n$", text)
        origin = ROOT / included[1] if included else page
        (source / page.name).write_text(linked(origin.read_text(encoding="utf-8"), origin), encoding="utf-8")
    reference = source / "reference"
    reference.mkdir()
    for name, write in (("settings", settings), ("choices", choices), ("commands", commands), ("modules", modules)):
        (reference / f"{name}.md").write_text(write(), encoding="utf-8")
    (source / "conf.py").write_text(CONF, encoding="utf-8")


def main() -> int:
    """Build; returns the exit code."""
    prepare()
    code = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "html", str(SOURCE), str(OUT)], check=False).returncode
    if code == 0:
        print(f"the manual: {OUT / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Which source code decides a step's result, as a digest.

A cached result is stale as soon as the code behind it changes, and a list of modules kept by hand forgets the helper's
helper. So a step names its entry points only, and the rest is found by reading the import statements: the fingerprint
covers every module of ours that an entry point can reach. What cannot change a result (errors, progress, the cache itself,
reports) is left out by name, and so are comments, docstrings and layout: the digest is taken of the syntax tree.

An entry point is `package.module`, or `package.module:function` when the module is a collection of steps that should not
invalidate one another: then only that function counts, with the definitions and imports of the module that it uses.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

FIRST_PARTY = ("lbllm_core", "lbllm_kernels")
NEUTRAL = (
    "lbllm_core",
    "lbllm_core.config",
    "lbllm_core.errors",
    "lbllm_core.pipeline",
    "lbllm_core.run",
    "lbllm_core.engine",
    "lbllm_core.engine.artifacts",
    "lbllm_core.engine.files",
    "lbllm_core.engine.fingerprint",
    "lbllm_core.engine.progress",
    "lbllm_core.engine.step",
    "lbllm_core.engine.terminal",
    "lbllm_core.report",
)


def code_fingerprint(entry_points: Iterable[str]) -> dict[str, str]:
    """`{module or module:function: 16 hex digits}` for everything the entry points reach. Missing modules raise ImportError."""
    found: dict[str, str] = {}
    waiting = list(entry_points)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        module, _, function = name.partition(":")
        found[name], reached = _read(_source_file(module).read_bytes(), module, function)
        waiting += reached
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=1024)  # the steps of a run reach mostly the same modules
def _read(source: bytes, module: str, function: str) -> tuple[str, tuple[str, ...]]:
    """The digest of a module, or of one function of it, and the modules of ours that it imports and that count."""
    tree = _without_docstrings(ast.parse(source))
    if function:
        tree = _only(tree, function, f"{module}:{function}")
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return digest, tuple(m for m in _imports(tree, module) if not _neutral(m))


def _neutral(module: str) -> bool:
    return module in NEUTRAL or module.startswith("lbllm_core.report.")


def _source_file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{module} has no source file, so its code cannot be part of a cache key")
    return Path(spec.origin)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _only(tree: ast.Module, function: str, name: str) -> ast.Module:
    """The module reduced to `function` and the top-level statements whose names it uses, in their order."""
    binds = [(statement, _bound(statement)) for statement in tree.body]
    if not any(function in names for _, names in binds):
        raise ImportError(f"{name}: there is no such definition")
    wanted, kept = {function}, set[int]()
    grew = True
    while grew:
        grew = False
        for i, (statement, names) in enumerate(binds):
            if i not in kept and names & wanted:
                kept.add(i)
                wanted |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
                grew = True
    return ast.Module(body=[s for i, (s, _) in enumerate(binds) if i in kept], type_ignores=[])


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement brings into the module."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).partition(".")[0] for a in statement.names}
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Our own modules that the tree imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in FIRST_PARTY)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), _package(module)) if node.level else node.module or ""
            if base.partition(".")[0] in FIRST_PARTY:
                yield base
                yield from (f"{base}.{a.name}" for a in node.names if _is_module(f"{base}.{a.name}"))


def _package(module: str) -> str:
    return module if _source_file(module).name == "__init__.py" else module.rpartition(".")[0]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package: the name is a function or a class
        return False

"""The rules of the house, read from the source: who may import whom, what may live at module level, who reads `conf/`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"lbllm_kernels": ROOT / "kernels" / "lbllm_kernels", "lbllm_core": ROOT / "lbllm_core", "tasks": ROOT / "tasks", "flows": ROOT / "flows"}
LAYERS = list(PACKAGES)  # each may import itself and what stands before it
OPTIONAL = ("lm_eval", "bitsandbytes", "matplotlib")  # imported in one file each


def module_name(path: Path) -> str:
    package = next(name for name, folder in PACKAGES.items() if folder in path.parents)
    parts = [package, *path.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))}


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute names of everything a module imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base, node
            for alias in node.names:
                if f"{base}.{alias.name}" in FILES:
                    yield f"{base}.{alias.name}", node


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
IMPORTS = {name: list(imports(tree, name)) for name, tree in TREES.items()}


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_direction(module: str) -> None:
    below = LAYERS[: LAYERS.index(top(module)) + 1]
    above = {name for name, _ in IMPORTS[module] if top(name) in LAYERS and top(name) not in below}
    assert not above, f"{module} imports {above}; the direction is {' <- '.join(LAYERS)}"


@pytest.mark.parametrize("module", [m for m in FILES if top(m) in ("lbllm_core", "lbllm_kernels")])
def test_the_library_knows_no_orchestration(module: str) -> None:
    assert not {top(name) for name, _ in IMPORTS[module]} & {"prefect", "mlflow", "hydra", "omegaconf"}


@pytest.mark.parametrize("module", [m for m in FILES if top(m) == "lbllm_kernels"])
def test_kernels_need_little(module: str) -> None:
    foreign = {top(name) for name, _ in IMPORTS[module]} - set(sys.stdlib_module_names) - {"torch", "triton", "numpy", "lbllm_kernels"}
    assert not foreign


def test_conf_and_hydra_are_read_by_compose_alone() -> None:
    for forbidden in ("conf", "hydra", "omegaconf"):
        assert {m for m in FILES if forbidden in {top(name) for name, _ in IMPORTS[m]}} == {"flows.compose"}


def test_mlflow_is_written_by_tracking_and_read_by_the_lab_book() -> None:
    """`system_metrics` uses MLflow's instruments, and its store through `tracking`."""
    assert {m for m in FILES if "mlflow" in {top(name) for name, _ in IMPORTS[m]}} <= {"tasks.tracking", "tasks.system_metrics", "flows.lab_book"}


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_in_one_file_inside_functions(package: str) -> None:
    users = {m for m in FILES if package in {top(name) for name, _ in IMPORTS[m]}}
    assert len(users) <= 1, users
    for user in users:
        at_top = {top(a.name) for n in TREES[user].body if isinstance(n, ast.Import) for a in n.names}
        at_top |= {top(n.module or "") for n in TREES[user].body if isinstance(n, ast.ImportFrom)}
        assert package not in at_top, f"{user} imports {package} when it is imported itself"


def test_no_import_cycles() -> None:
    """Cycles of imports that run when a module is imported; an import inside a function breaks one on purpose."""
    graph = {m: {name for name, node in IMPORTS[m] if name in FILES and node in TREES[m].body and name != m} for m in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CHANGERS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "clear", "remove", "discard", "popitem"}


@pytest.mark.parametrize("module", FILES)
def test_no_module_level_state(module: str) -> None:
    """No `global`, and nothing that a function changes in a container of its module. Constant tables are no state."""
    tree = TREES[module]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], "global"
    containers: set[str] = set()
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target] if isinstance(statement, ast.AnnAssign) else []
        if getattr(statement, "value", None) is not None and isinstance(statement.value, (*MUTABLE, ast.Call)):  # type: ignore[attr-defined]
            containers |= {t.id for t in targets if isinstance(t, ast.Name)}
    changed: set[str] = set()
    for function in (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
        local = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for node in ast.walk(function):
            target = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGERS:
                target = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                target = node.value
            if isinstance(target, ast.Name) and target.id in containers and target.id not in local:
                changed.add(target.id)
    assert not changed, f"{module} changes {changed}"


@pytest.mark.parametrize("module", FILES)
def test_nothing_that_runs_foreign_code(module: str) -> None:
    called = {ast.unparse(n.func) for n in ast.walk(TREES[module]) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant)
            assert not node.value.value


def test_names_that_would_hide_a_dependency() -> None:
    hidden = {"evaluate", "datasets", "types", "kernels", "torch", "mlflow", "prefect", "hydra"}
    assert not [p for name, p in FILES.items() if top(name) in ("tasks", "flows") and p.stem in hidden]
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", FILES)
def test_every_module_opens_with_its_essay(module: str) -> None:
    if TREES[module].body:
        assert ast.get_docstring(TREES[module])

"""Imports run downward only: the layers of the package, without circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"byol_fast.__main__"},
    {"byol_fast.cli"},
    {"byol_fast"},  # the package's own names, imported on first use
    {"byol_fast.api"},
    {"byol_fast.bench", "byol_fast.profiling", "byol_fast.report", "byol_fast.doctor", "byol_fast.compat"},
    {"byol_fast.training"},
    {"byol_fast.evaluate"},
    {"byol_fast.export"},
    {"byol_fast.models", "byol_fast.data", "byol_fast.trackers"},
    {"byol_fast.optim"},
    {"byol_fast.utils"},
    {"byol_fast.config"},
    {"byol_kernels"},
)
"""From the top. A module imports modules of its own package and of lower layers."""
WITHIN_A_LAYER = {("byol_fast.profiling", "byol_fast.report")}
"""The page of a profile is made of the report's parts."""


def module_files() -> dict[str, Path]:
    """File of each module, by dotted name; a package's is its `__init__.py`."""
    files = {}
    for root, package in ((ROOT, "byol_fast"), (ROOT / "kernels", "byol_kernels")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, except those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the two packages that a file imports, inside functions too."""
    imported = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & modules.keys()
            imported |= submodules | ({node.module} if names - submodules else set())
    return imported & modules.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    modules = module_files()
    return {module: imports_of(path, modules) - {module} for module, path in modules.items()}


def layer_of(module: str) -> tuple[int, str]:
    """Number of a module's layer, from the top, and the package that stands for it in `LAYERS`."""
    parts = module.split(".")
    name = parts[0] if parts[0] == "byol_kernels" else ".".join(parts[:2])
    for number, layer in enumerate(LAYERS):
        if name in layer:
            return number, name
    raise AssertionError(f"{module} belongs to no layer; add it to LAYERS")


def test_imports_run_downward(graph: dict[str, set[str]]) -> None:
    wrong = []
    for module, imported in graph.items():
        layer, package = layer_of(module)
        for other in imported:
            other_layer, other_package = layer_of(other)
            is_allowed = package == other_package or layer < other_layer or (package, other_package) in WITHIN_A_LAYER
            if not is_allowed:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_imports_have_no_circles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_and_an_upward_import_are_found(tmp_path: Path) -> None:
    """The graph sees imports inside functions, of modules and of names, and not those for type checkers."""
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from byol_fast.report.page import Section\n"
        "from byol_fast.training import state\n"
        "def f():\n    import byol_fast.cli.main\n    from byol_fast.config import Config\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    expected = {"byol_fast.training.state", "byol_fast.cli.main", "byol_fast.config"}
    assert imports_of(path, module_files()) == expected

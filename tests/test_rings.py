"""Values ← core ← edges: what import-linter checks for the modules it lists, checked here for every module."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import prefect_slo

ROOT = Path(prefect_slo.__file__).parent
VALUES = {
    "errors", "units", "objective", "pricing", "placement", "resources", "constraint", "workflow", "workflow_document",
    "plan", "plan_document", "edges", "columns", "granularity", "observation",
}  # fmt: skip
CORE = {"models", "planner", "transform", "control", "serving", "simulate", "attainment", "evaluation"}
LIBRARIES = {"numpy", "scipy", "networkx", "cvxpy"}
IMPURE = {"logging", "time", "random", "threading", "multiprocessing", "subprocess", "socket", "asyncio", "os"}


def modules(rings: set[str]) -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).with_suffix("").parts[0] in rings]


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, inside functions too, less what only type checkers read."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def parts(path: Path, position: int) -> set[str]:
    return {name.split(".")[position] for name in imports(path) if name.startswith("prefect_slo.") or position == 0}


@pytest.mark.parametrize("path", modules(VALUES), ids=lambda path: str(path.relative_to(ROOT)))
def test_values_know_values_only(path: Path) -> None:
    assert parts(path, 1) <= VALUES
    assert not parts(path, 0) & IMPURE


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_values_core_and_mathematics_only(path: Path) -> None:
    assert parts(path, 1) <= VALUES | CORE
    assert not parts(path, 0) & IMPURE


@pytest.mark.parametrize("path", modules(VALUES | CORE), ids=lambda path: str(path.relative_to(ROOT)))
def test_values_and_core_use_no_other_library(path: Path) -> None:
    assert parts(path, 0) <= LIBRARIES | {"prefect_slo"} | set(sys.stdlib_module_names)

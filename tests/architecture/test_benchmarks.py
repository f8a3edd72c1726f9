"""The benchmarks are run by hand: what they import is looked up here, so that a change does not leave them behind."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.rglob("*.py"))
OURS = {"raftune", "tests", "tools"}


def imported(path: Path) -> set[tuple[str, str]]:
    """Module and name of each import of this project's, those within functions included; a plain import has no name."""
    pairs = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            pairs |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            pairs |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in pairs if module.partition(".")[0] in OURS}


def exists(module: str, name: str) -> bool:
    try:
        if not name or hasattr(importlib.import_module(module), name):
            return find_spec(module) is not None
        return find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_what_a_benchmark_imports_of_this_project_exists(path: Path) -> None:
    assert [pair for pair in sorted(imported(path)) if not exists(*pair)] == []


def test_the_benchmarks_are_looked_at() -> None:
    assert {"sampling.py", "rounds.py", "arms.py"} <= {path.name for path in FILES}
    assert ("raftune.policies.causal_lm.sampling.backend", "generate") in imported(BENCHMARKS / "sampling.py")

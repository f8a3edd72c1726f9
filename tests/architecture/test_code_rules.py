"""The rules of the house that no tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import raftune

ROOT = Path(raftune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions() -> Iterator[tuple[str, Function]]:
    for path, module in MODULES.items():
        for node in ast.walk(module):
            if isinstance(node, Function):
                yield f"{named(path)}:{node.lineno} {node.name}", node


def public(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The module's own functions and classes, and the methods of these classes, that bear no underscore."""
    for node in module.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node


DECLARED = ("config", "records", "protocols", "selection", "store")


def test_what_is_declared_and_a_run_of_the_tabular_family_import_no_tensors() -> None:
    """Config, records, protocols, selection and store are among what a run imports."""
    script = f"""
import sys
import raftune.runtime.run, raftune.runtime.worker, raftune.cli, raftune.policies.tabular.policy
assert {{f"raftune.{{name}}" for name in {DECLARED!r}}} <= set(sys.modules)
print(*sorted({HEAVY!r} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def named_types() -> Iterator[tuple[str, str]]:
    """Every class and every public alias of a type: its name, and the module that defines it."""
    for path, module in MODULES.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                yield node.name, named(path)
        for node in module.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    made_by_call = isinstance(node.value, ast.Call)  # such as a TypeVar
                    if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) and not made_by_call:
                        yield name, named(path)


def test_no_class_and_no_type_alias_is_defined_twice() -> None:
    places = defaultdict(list)
    for name, place in named_types():
        places[name].append(place)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
    assert "FloatArray" in places


@pytest.mark.parametrize("name", raftune.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(raftune, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'train_everything'"):
        _ = raftune.train_everything


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [named(path) for path in FILES if path.name in drawers] == []


@pytest.mark.parametrize("place", ["loop.py", "stages"])
def test_the_loop_and_its_stages_mention_no_family(place: str) -> None:
    words = ("tabular", "causal", "diffusion", "lora", "tokenizer")
    for path in FILES:
        if named(path).split("/")[0] == place:
            text = path.read_text(encoding="utf-8").lower()
            assert [word for word in words if word in text] == [], named(path)


def test_every_module_and_every_public_class_says_what_it_is() -> None:
    silent = [named(path) for path, module in MODULES.items() if not ast.get_docstring(module) and module.body]
    for path, module in MODULES.items():
        for name, node in public(module):
            if isinstance(node, ast.ClassDef) and not ast.get_docstring(node):
                silent.append(f"{named(path)} {name}")
    assert silent == []


def test_a_docstring_starts_with_whole_sentences() -> None:
    first = {name: (ast.get_docstring(node) or ".").split("\n\n")[0].rstrip() for name, node in functions()}
    assert [name for name, words in first.items() if words[-1] not in ".:;?…"] == []


def test_asserts_are_for_our_own_bugs_and_users_get_errors_of_ours() -> None:
    """ValueError is left to pure functions of arrays and to pydantic's validators, which turn it into a ConfigError."""
    pure = ("config/", "policies/tabular/raft_iteration.py", "evaluation/", "selection.py")
    found = []
    for path, module in MODULES.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                bare = node.exc.func.id in ("ValueError", "RuntimeError", "Exception", "KeyError")
                if bare and not named(path).startswith(pure):
                    found.append(f"{named(path)}:{node.lineno}")
    assert found == []


def test_nothing_is_left_for_later() -> None:
    later = ("TODO", "FIXME", "XXX", "HACK", "raise NotImplementedError")
    assert {named(path): word for path in FILES for word in later if word in path.read_text(encoding="utf-8")} == {}

"""Fingerprints of rewards, from code, options and weights.

Of a function given as an object they see its source, its defaults, what it closes over, and the plain values and
functions of its own module that it names; of a file, the whole file. Imports are not included.
"""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from raftune.config.secrets import redacted
from raftune.store.committed import check_folder
from raftune.store.files import sha256_hex, sha256_of

SIMPLE = (str, bytes, int, float, bool, type(None))


def digest(*parts: Any) -> str:
    """16 hex digits that depend on every part; parts are JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=describe)
    return sha256_hex([text])[:16]


def of_bytes(data: bytes) -> str:
    return sha256_hex([data])[:16]


def of_folder(folder: Path) -> str:
    """The hash of names, sizes and contents of all files below. Raises RunDamaged for a damaged model's folder."""
    paths = sorted(path for path in check_folder(folder).rglob("*") if path.is_file())
    return digest(*[[path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path)[:16]] for path in paths])


def of_callable(function: Any) -> str:
    """The hash of a callable object's code and of the plain values that it depends on."""
    return digest(describe(function))


def of_module_function(function: Any, module: ModuleType) -> str:
    """The hash of the source file that defines the function, else of its module's; of the object where neither is."""
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        source = getattr(module, "__file__", None)
    return sha256_of(Path(source))[:16] if source and Path(source).is_file() else of_callable(function)


def unkeyed(name: Any, value: Any) -> Any:
    """The value without the keys and passwords in it: another key asks the same judge."""
    return redacted(value, name if isinstance(name, str) else "", references=False) if isinstance(value, str) else value


def describe(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A JSON value that stands for `value` in a hash, without memory addresses and without file paths.

    Of an object inside another (a client, a lock) only the type is taken.
    """
    if isinstance(value, SIMPLE):
        return [type(value).__name__, repr(value)]
    if id(value) in seen:
        return "recursion"
    outermost = not seen
    seen = seen | {id(value)}
    if isinstance(value, list | tuple):
        return [type(value).__name__, [describe(item, seen) for item in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted(json.dumps(describe(item, seen)) for item in value)]
    if isinstance(value, dict):
        return ["dict", [[describe(key, seen), describe(unkeyed(key, item), seen)] for key, item in value.items()]]
    if isinstance(value, partial):
        return ["partial", describe(value.func, seen), describe(value.args, seen), describe(value.keywords, seen)]
    if inspect.ismethod(value):
        return ["method", describe(value.__func__, seen), _describe_object(value.__self__, seen)]
    if isinstance(value, FunctionType):
        cells = [describe(_contents(cell), seen) for cell in value.__closure__ or ()]
        defaults = [describe(value.__defaults__, seen), describe(value.__kwdefaults__, seen)]
        # Plain values and own functions of the module that the code names: a threshold above the function counts too.
        named = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        used = [
            [name, describe(unkeyed(name, item), seen)]
            for name, item in sorted(named.items())
            if isinstance(item, SIMPLE) or (inspect.isfunction(item) and item.__module__ == value.__module__)
        ]
        return ["function", _source(value), cells, defaults, used]
    if inspect.isclass(value):
        return ["class", value.__qualname__, _source(value)]
    if outermost:
        return _describe_object(value, seen)
    return ["other", type(value).__qualname__, getattr(value, "__qualname__", "")]


def _describe_object(value: Any, seen: frozenset[int]) -> Any:
    state = dict(sorted(getattr(value, "__dict__", {}).items()))
    return ["object", type(value).__qualname__, _source(type(value)), describe(state, seen)]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty cell"


def _source(value: Any) -> Any:
    """The source text; without one (a function made by exec, a bare prompt) the code, its constants and names."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return _code(value.__code__) if isinstance(value, FunctionType) else ""


def _code(code: CodeType) -> list[Any]:
    constants = [_code(const) if isinstance(const, CodeType) else describe(const) for const in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))

"""Loads, checks and configures code that the configuration names as `file.py:name` or `module:name`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from raftune.config.secrets import masked
from raftune.errors import ConfigError
from raftune.sanitize import did_you_mean

SPEC = r".+:.+"  # the pattern of a field that names such code
GUIDE = "docs/extending.md has an example of each."

_Built = TypeVar("_Built")


def load_extension(
    spec: str,
    field: str,
    options: Mapping[str, Any],
    options_field: str,
    *,
    methods: Mapping[str, Sequence[str]],
    attributes: Sequence[str] = (),
    made_by: Callable[[type[Any]], Any] | None = None,
) -> Any:
    """An instance of the class that the spec names, made with these options, or by `made_by`.

    `methods` are those that it must have, each with the names of its arguments. Raises ConfigError that names the
    field, the class, and what is missing, wrong or unknown.
    """
    cls = load_object(spec, field)
    signatures = {name: f"({', '.join(['self', *arguments])})" for name, arguments in methods.items()}
    if not inspect.isclass(cls):
        required = " and ".join(f"`{name}{signature}`" for name, signature in signatures.items())
        kind = "a function" if inspect.isroutine(cls) else f"a {type(cls).__name__}"
        raise ConfigError(f"{field} must name a class with {required}; got {spec!r}, {kind}. {GUIDE}")
    for name, signature in signatures.items():
        if not any(callable(vars(base).get(name)) for base in cls.__mro__):
            raise ConfigError(f"{field}: the class {spec} lacks the method `{name}{signature}`. {GUIDE}")
    try:
        instance = made_by(cls) if made_by is not None else with_options(cls, spec, options_field, options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{field}: {spec} cannot be made: {type(error).__name__}: {error}. Fix it.") from error
    for name in attributes:
        if not hasattr(instance, name):
            raise ConfigError(f"{field}: the class {spec} lacks the attribute `{name}`. {GUIDE}")
    for name, arguments in methods.items():
        signature_ = inspect.signature(getattr(instance, name))
        try:
            signature_.bind(*arguments)
        except TypeError:
            raise ConfigError(
                f"{field}: the method {name} of {spec} must take {signatures[name]}; it takes "
                f"({', '.join(['self', *signature_.parameters])}). {GUIDE}"
            ) from None
    return instance


def with_options(cls: type[Any], spec: str, field: str, options: Mapping[str, Any]) -> Any:
    """An instance of the class: a pydantic model or a dataclass validates its options; any other takes keywords."""
    parameters = inspect.signature(cls).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    for name in options:
        if not takes_any and name not in names:
            hint = did_you_mean(name, names, f"it has {', '.join(names)}." if names else "it takes none.")
            raise ConfigError(f"{field}: {spec} has no option {name!r}; {hint}")
    try:
        if issubclass(cls, BaseModel) or dataclasses.is_dataclass(cls):
            return TypeAdapter(cls).validate_python(dict(options))
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join([field, *(str(part) for part in first["loc"])])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{option} of {spec}: {message}; got {masked(repr(first['input']))}. Change it.") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{field}: {spec} cannot be made with {dict(options)}: {error}. Change the options."
        ) from error


def code_hash(spec: str) -> str:
    """16 hex digits that change with the file of the spec's code; empty if there is none.

    The code is not run, so that a run can be inspected without it.
    """
    source = spec.rpartition(":")[0]
    path = Path(source).expanduser()
    if not source.endswith(".py"):
        try:
            module = importlib.util.find_spec(source)
        except (ImportError, ValueError):
            module = None
        path = Path((module and module.origin) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def load_object(spec: str, field: str) -> Any:
    """The object that `module:name` or `file.py:name` names. Raises ConfigError."""
    source, _, name = spec.rpartition(":")
    try:
        module = (
            module_from_file(Path(source).expanduser()) if source.endswith(".py") else importlib.import_module(source)
        )
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{field} must name what can be imported; got {spec!r}: {error}. Check the module or the path."
        ) from error
    except Exception as error:
        position = f", line {line}" if (line := line_in(error, source)) else ""
        raise ConfigError(
            f"{field}: {source}{position} raised {type(error).__name__} when it was read: {error}. Fix it; "
            f"`python {source}` shows it all."
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{field}: {source} has no {name!r}. Check the name after the colon.")
    return getattr(module, name)


def line_in(error: Exception, file: str) -> int | None:
    """The last line of this file that the error went through; None if there is none."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename.endswith(Path(file).name)), None)


def module_from_file(path: Path, kind: str = "extension") -> ModuleType:
    """The file, run as a module; like a script's, modules beside it can be imported."""
    name = f"raftune_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OSError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module  # where dataclasses and pydantic look for the names in annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def register(table: dict[str, Any], name: str) -> Callable[[_Built], _Built]:
    """Enters the decorated class or function into the table of built-in ones under this name."""

    def enter(built: _Built) -> _Built:
        other, new = (getattr(item, "__qualname__", "") for item in (table.get(name, built), built))
        assert other == new, f"{name!r} is registered already, by {other}"
        table[name] = built
        return built

    return enter

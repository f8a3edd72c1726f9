"""Resolves paths in a configuration: relative to the file, otherwise to the working directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

REWARD = ("", ".spec", ".options.model", ".options.clip", ".options.processor")
FIELDS = (
    *("data.prompts", "evaluation.prompts", "evaluation.features", "policy.family", "policy.model", "policy.tokenizer"),
    *("sampling.teacher.model", "sampling.backend", "training.reference.path", "selection.rule", "training.objective"),
    *("sampling.backend.kind", "sampling.backend.python", "sampling.backend_options.python", "engine", "engine.kind"),
    *(f"{rewards}{field}" for rewards in ("rewards.reward_funcs", "evaluation.reward_funcs") for field in REWARD),
    *(f"evaluation.metrics{field}" for field in REWARD),
)
# In these a word without a dot or slash is a name, such as of a built-in reward; elsewhere it may be a folder.
NAMES = ("family", "spec", "rule", "objective", "kind", "backend", "engine", "reward_funcs", "metrics")


def beside(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a file in `folder`, with paths relative to the working directory."""
    return dict(data) if folder.resolve() == Path.cwd() else moved(data, folder, Path.cwd())


def moved(data: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """The mapping with paths relative to the folder `old` made relative to the folder `new`.

    Absolute paths, paths that do not exist, and what is no path stay as they are.
    """
    result: Any = dict(data)
    for field in FIELDS:
        *_, name = names = field.split(".")
        result = replaced(result, names, partial(relative, old=old.resolve(), new=new.resolve(), is_name=name in NAMES))
    return dict(result)


def has_paths(data: Mapping[str, Any], folder: Path) -> bool:
    """Whether the mapping has a path that is relative to the folder."""
    return moved(data, folder, folder) != moved(data, folder, folder / "elsewhere")


def replaced(data: Any, names: list[str], change: Callable[[str], str]) -> Any:
    """The data with the text in this field changed, in every item of a list."""
    if isinstance(data, list):
        return [replaced(item, names, change) for item in data]
    if not names:
        return change(data) if isinstance(data, str) else data
    if isinstance(data, Mapping) and names[0] in data:
        return {**data, names[0]: replaced(data[names[0]], names[1:], change)}
    return data


def relative(text: str, old: Path, new: Path, is_name: bool) -> str:
    """A path, or `file.py:name`, relative to `new` if it exists in `old`; anything else as it is."""
    source, colon, name = text.rpartition(":")
    path, rest = (source, colon + name) if source.endswith(".py") else (text, "")
    is_word = "." not in path and "/" not in path
    if (is_word and (is_name or path == "starter")) or path.startswith("~") or Path(path).is_absolute():
        return text
    if not Path(path).name or not (old / path).exists():
        return text
    try:
        return Path(os.path.relpath(old / path, new)).as_posix() + rest
    except ValueError:  # on another drive
        return str(old / path) + rest

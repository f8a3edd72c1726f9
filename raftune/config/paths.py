"""Resolves paths in a configuration: relative to the file, otherwise to the working directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = (
    *("data.prompts", "evaluation.prompts", "evaluation.features", "policy.family", "policy.model"),
    *(
        "policy.tokenizer",
        "sampling.teacher.model",
        "training.reference.path",
        "selection.rule",
        "training.objective",
        "engine.kind",
    ),
)
REWARDS = ("rewards.reward_funcs", "evaluation.reward_funcs", "evaluation.metrics")  # lists of specs
OF_A_REWARD = ("spec", "options.model", "options.clip", "options.processor")


def beside(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping of a file in `folder`, its paths such that they are found from where this process stands."""
    if folder.resolve() == Path.cwd():
        return dict(data)
    return moved(data, folder, Path.cwd())


def moved(data: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """The mapping with its paths, which are relative to the folder `old`, relative to the folder `new`.

    Absolute paths and what is no path stay as they are, and so does what is not there.
    """
    found, places = dict(data), (old.resolve(), new.resolve())
    for field in FIELDS:
        found = changed(found, field.split("."), *places)
    for field in REWARDS:
        section, name = field.split(".")
        if isinstance(found.get(section), Mapping) and name in found[section]:
            found[section] = {**found[section], name: rewards(found[section][name], *places)}
    return found


def has_paths(data: Mapping[str, Any], folder: Path) -> bool:
    """Whether the mapping names anything by a path that is relative to the folder."""
    return moved(data, folder, folder) != moved(data, folder, folder / "elsewhere")


def changed(data: Any, field: list[str], old: Path, new: Path) -> Any:
    """The data with the path in this field, if it has one, relative to another folder."""
    name, *inner = field
    if not isinstance(data, Mapping) or name not in data:
        return data
    if inner:
        return {**data, name: changed(data[name], inner, old, new)}
    return {**data, name: seen(data[name], old, new, words=name not in ("family", "spec", "rule", "objective", "kind"))}


def rewards(given: Any, old: Path, new: Path) -> Any:
    """One reward or several, each a spec or a mapping."""
    if isinstance(given, list):
        return [rewards(one, old, new) for one in given]
    if not isinstance(given, Mapping):
        return seen(given, old, new)
    for field in OF_A_REWARD:
        given = changed(given, field.split("."), old, new)
    return given


def seen(text: Any, old: Path, new: Path, *, words: bool = False) -> Any:
    """A path, or `file.py:name`, as seen from `new`, where it lies in `old`; anything else as it is.

    A plain word, without a dot or a slash, may be a path where `words` says so, and otherwise is a name: `length`, a
    built-in reward. `starter` always is one.
    """
    if not isinstance(text, str):
        return text
    left, colon, name = text.rpartition(":")
    path, rest = (left, colon + name) if left.endswith(".py") else (text, "")
    is_word = not any(mark in path for mark in "./")
    if (is_word and (not words or path == "starter")) or path.startswith("~") or Path(path).is_absolute():
        return text
    if not Path(path).name or not (old / path).exists():
        return text
    try:
        return Path(os.path.relpath(old / path, new)).as_posix() + rest
    except ValueError:  # on another drive
        return str(old / path) + rest

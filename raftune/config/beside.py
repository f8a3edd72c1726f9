"""Paths in a configuration file: what lies beside the file is meant; else what lies where the command is given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIELDS = (
    *("data.prompts", "evaluation.prompts", "evaluation.features", "policy.family", "policy.model"),
    *("policy.tokenizer", "sampling.teacher.model", "tuning.reference.path"),
)
REWARDS = ("rewards.reward_funcs", "evaluation.reward_funcs")
OF_A_REWARD = ("spec", "options.model", "options.clip", "options.processor")


def beside(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping of a file in `folder`, its paths such that they are found from where this process stands."""
    if folder.resolve() == Path.cwd():
        return dict(data)
    found = dict(data)
    for field in FIELDS:
        found = changed(found, field.split("."), folder)
    for field in REWARDS:
        section, name = field.split(".")
        if isinstance(found.get(section), Mapping) and name in found[section]:
            found[section] = {**found[section], name: rewards(found[section][name], folder)}
    return found


def changed(data: Any, field: list[str], folder: Path) -> Any:
    """The data with the path in this field, if it has one, as seen from here."""
    name, *inner = field
    if not isinstance(data, Mapping) or name not in data:
        return data
    return {**data, name: changed(data[name], inner, folder) if inner else seen(data[name], folder)}


def rewards(given: Any, folder: Path) -> Any:
    """One reward or several, each a spec or a mapping."""
    if isinstance(given, list):
        return [rewards(one, folder) for one in given]
    if not isinstance(given, Mapping):
        return seen(given, folder)
    for field in OF_A_REWARD:
        given = changed(given, field.split("."), folder)
    return given


def seen(text: Any, folder: Path) -> Any:
    """A path, or `file.py:name`, as seen from here, where it lies in `folder`; anything else as it is.

    A plain word, without a dot or a slash, is no path but a name: `starter`, `length`, a built-in reward.
    """
    if not isinstance(text, str):
        return text
    left, colon, name = text.rpartition(":")
    path, rest = (left, colon + name) if left.endswith(".py") else (text, "")
    if not any(mark in path for mark in "./") or path.startswith("~") or Path(path).is_absolute():
        return text
    place = folder / path
    if not Path(path).name or not place.exists():
        return text
    near = os.path.relpath(place)
    return (str(place.resolve()) if near.startswith("..") else Path(near).as_posix()) + rest

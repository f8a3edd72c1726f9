"""Loads a configuration from files and flags: defaults < files, left to right < flags."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raftune.config.paths import beside
from raftune.config.run import RunConfig
from raftune.config.secrets import redacted
from raftune.config.selection import SelectionConfig
from raftune.errors import ConfigError
from raftune.sanitize import first_line

_shortened = reprlib.Repr()  # YAML's anchors can make a few lines stand for gigabytes
_shortened.maxstring = _shortened.maxother = 60
Model = TypeVar("Model", bound=BaseModel)
DISCRIMINATORS = ("family", "rule", "objective")  # the fields that choose the class of their section


def load_config(files: Sequence[str | Path], flags: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of the files, later ones over earlier ones, and dotted flags over all. Raises ConfigError."""
    return load_as(RunConfig, files, flags)


def load_as(model: type[Model], files: Sequence[str | Path], flags: Mapping[str, Any] | None = None) -> Model:
    """As `load_config`, for any configuration. Raises ConfigError."""
    return validate_as(model, merge([*(read_yaml(file) for file in files), nested(flags or {})]))


def validate(data: Mapping[str, Any]) -> RunConfig:
    """The configuration, every field checked. Raises ConfigError that names field, rule, what was given and the fix."""
    return validate_as(RunConfig, data)


def validate_as(model: type[Model], data: Mapping[str, Any], within: tuple[str, ...] = ()) -> Model:
    """As `validate`, for any configuration, which lies within these sections of a larger one. Raises ConfigError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [{**fault, "loc": (*within, *fault["loc"])} for fault in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(explain(fault, model) for fault in faults))) from error


def options_of(config: RunConfig, model: type[Model]) -> Model:
    """`policy.options` as the class of a family of your own declares them. Raises ConfigError that names the option."""
    return validate_as(model, getattr(config.policy, "options", {}), ("policy", "options"))


def merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping, later layers over earlier ones; sections are merged, every other value is replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
            merged[name] = merge([merged[name], value]) if both else value
    return merged


def nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """{"training.learning_rate": 1} as {"training": {"learning_rate": 1}}."""
    result: dict[str, Any] = {}
    for name, value in flags.items():
        *sections, last = name.split(".")
        place = result
        for section in sections:
            if not isinstance(place.get(section), dict):  # a section that was left out before is one again
                place[section] = {}
            place = place[section]
        place[last] = value
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's mapping, by YAML's safe loader; paths in it are found beside the file. Raises ConfigError."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=OnceLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}. `raftune init` writes one.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} must be a YAML file; got a folder.") from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: such as the 45th of a month
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{line} is not valid YAML: {problem}. Fix the line.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must hold sections such as `data:` and `policy:`; got {type(data).__name__}. `raftune init` "
            "writes an example."
        )
    return beside(data, path.parent)


class OnceLoader(yaml.SafeLoader):
    """The safe loader, but a name that stands twice in one section is an error: YAML would drop the first, and with it
    perhaps a whole section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge" or not isinstance(name, yaml.ScalarNode):
                continue
            key = self.construct_object(name, deep=True)
            if key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands here and in line {first}", name.start_mark
                )
            seen[key] = name
        return super().construct_mapping(node, deep)


# Names of raftune 0.1, by the last part of the field.
RENAMED = {
    "tuning": "training",
    "unit_size": "chunk_size",
    "on_unit_failure": "on_chunk_failure",
    "unit_timeout": "chunk_timeout",
}


def explain(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One of pydantic's findings in one line: field, rule, what was given, the fix."""
    place = [str(part) for part in fault["loc"]]
    names, owner = field_path(place, model)
    field = ".".join(names).rstrip("0123456789").rstrip(".") or "the configuration"
    given = short(fault.get("input"))
    kind = fault["type"]
    if kind == "extra_forbidden":
        if names[-1] in RENAMED:
            return f"{field} is called {'.'.join([*names[:-1], RENAMED[names[-1]]])} since raftune 0.2. Rename it."
        return f"{field} is not a field; {nearest(names[-1], owner, model)}"
    if kind == "missing":
        return f"{field} must be given; it has no default. Add it to the configuration."
    if kind == "value_error":
        return qualify(names, str(fault["ctx"]["error"]))
    if kind in ("tuple_type", "list_type"):
        return f"{field} must be a list; got {given}. Write [{fault.get('input')}]."
    if kind == "string_pattern_mismatch":
        hint = owner.model_fields[names[-1]].description or "Change it."
        return f"{field} must match {fault['ctx']['pattern']}; got {given}. {hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{field} must be a section with fields of its own; got {given}. {as_section(names, fault, owner)}"
    if kind == "union_tag_invalid":
        return unknown_choice(field, fault, model)
    if kind == "literal_error":
        return f"{field} must be {fault['ctx']['expected']}; got {given}. {likely(fault)}"
    rule = fault["msg"][0].lower() + fault["msg"][1:]
    rule = rule.replace("input should be", "must be").replace("input should have", "must have")
    return f"{field} {rule if rule.startswith('must') else 'is wrong: ' + rule}; got {given}. Change it."


def as_section(names: Sequence[str], fault: Mapping[str, Any], owner: type[BaseModel]) -> str:
    """The section to write where a single value was given, if it is clear which of its fields was meant."""
    field = owner.model_fields.get(names[-1]) if names else None
    sections = models_in(field.annotation) if field is not None else []
    usual = ("model", "prompts", "path", "reward_funcs", "rule")
    known = [name for name in usual if sections and name in sections[0].model_fields]
    if known and isinstance(fault.get("input"), str):
        return f"Write `{names[-1]}: {{{known[0]}: {fault['input']}}}`."
    return "Write `name: value` lines below it."


def likely(fault: Mapping[str, Any]) -> str:
    """A hint at the choice that was probably meant."""
    choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
    close = difflib.get_close_matches(str(fault.get("input")), choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else "Choose one of these."


def unknown_choice(section: str, fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What to say of a section whose discriminator names none of its classes."""
    found = model
    for name in section.split("."):
        members = models_in(found.model_fields[name].annotation)
        found = members[0]
    choices = fault["ctx"]["expected_tags"].replace(", 'custom'", "")
    given = fault["ctx"]["tag"]
    hint = likely({"ctx": {"expected": choices}, "input": given})
    own = " or file.py:NAME" if "'custom'" in fault["ctx"]["expected_tags"] else ""
    return f"{section}.{discriminator(members)} must be {choices}{own}; got {given!r}. {hint}"


def discriminator(members: Sequence[type[BaseModel]]) -> str:
    """The field by which the classes that a section may have are told apart; empty where there is one class."""
    several = members if len(members) > 1 else ()
    return next((name for name in DISCRIMINATORS if several and all(name in m.model_fields for m in several)), "")


def qualify(names: Sequence[str], message: str) -> str:
    """A validator's own message, with the section in front where the message names the field alone."""
    first = message.split(" ")[0]
    section = [name for name in names if name != first]
    return message if "." in first or not section else f"{'.'.join(section)}.{message}"


def field_path(place: Sequence[str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The dotted names of a finding, without pydantic's own tags, and the section that the last of them is in."""
    names: list[str] = []
    owner = model
    sections: list[type[BaseModel]] = [model]
    for part in place:
        chosen_by = discriminator(sections)
        if chosen_by and part in {"custom", *(str(s.model_fields[chosen_by].default) for s in sections)}:
            sections = [s for s in sections if s.model_fields[chosen_by].default == part] or sections[-1:]
            continue
        names.append(part)
        owner = next((s for s in sections if part in s.model_fields), sections[0])
        inner = [
            s
            for section in sections
            if part in section.model_fields
            for s in models_in(section.model_fields[part].annotation)
        ]
        sections = inner or sections
    return names, owner


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple, list):
        return [model for inner in typing.get_args(annotation) for model in models_in(inner)]
    return []


def nearest(name: str, owner: type[BaseModel], whole: type[BaseModel]) -> str:
    """A hint at the field that was probably meant: in this section, or else anywhere in the whole."""
    here = list(owner.model_fields)
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.6):
        return f"did you mean {close[0]!r}?"
    elsewhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in all_fields(whole)}
    if close := difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.75):
        return f"did you mean {elsewhere[close[0]]!r}?"
    return f"there are {', '.join(here)}."


def all_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted field of the configuration."""
    found = []
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        found += [d for section in inner for d in all_fields(section, f"{prefix}{name}.")] if inner else [prefix + name]
    return found


def short(value: Any) -> str:
    text = _shortened.repr(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def declared(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults, and the family: read again, it gives the same run, wherever its directory is.

    The rule and the objective are named where they are not the usual ones: they say what the fields beside them mean.
    """
    found = config.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})
    if config.selection.rule != "best_of_k":
        given = found.get("selection", {})
        own = {name: value for name, value in given.items() if name not in SelectionConfig.model_fields}
        found["selection"] = {"rule": config.selection.rule, **own, **given}
    if config.training.objective != "sft":
        found["training"] = {"objective": config.training.objective, **found.get("training", {})}
    return {**found, "policy": {"family": config.policy.family, **found.get("policy", {})}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted fields whose values differ, each with its old and its new value."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = (redacted(before, name), redacted(after, name))
    return found

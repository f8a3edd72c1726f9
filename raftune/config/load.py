"""Loads a configuration from files and flags: defaults < files, left to right < flags."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raftune.config.paths import beside
from raftune.config.run import RunConfig
from raftune.config.secrets import redacted
from raftune.config.selection import SelectionConfig
from raftune.errors import ConfigError
from raftune.sanitize import did_you_mean, first_line

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
        target = result
        for section in sections:
            if not isinstance(target.get(section), dict):  # a section that was left out before is one again
                target[section] = {}
            target = target[section]
        target[last] = value
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
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
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
    """The safe loader, but a name that occurs twice in a section is an error; YAML would drop the first."""

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
    """One of pydantic's errors in one line: field, rule, what was given, the fix."""
    names, owner, members = locate([str(part) for part in fault["loc"]], model)
    last, context = names[-1] if names else "", fault.get("ctx", {})
    value: Any = fault.get("input")
    field = ".".join(names).rstrip("0123456789").rstrip(".") or "the configuration"
    declaration, kind = owner.model_fields.get(last), fault["type"]
    text = _shortened.repr(value) if isinstance(value, dict | list) else repr(value)
    shown = text if len(text) <= 60 else text[:57] + "…"
    if kind == "extra_forbidden":
        if last in RENAMED:
            return f"{field} is called {'.'.join([*names[:-1], RENAMED[last]])} since raftune 0.2. Rename it."
        return f"{field} is not a field; {nearest(last, owner, model)}"
    if kind == "missing":
        return f"{field} must be given; it has no default. Add it to the configuration."
    if kind == "value_error":  # a validator's own message, which may name the field without its section
        message = str(context["error"])
        first = message.split(" ")[0]
        section = [] if "." in first else [name for name in names if name != first]
        return ".".join([*section, message])
    if kind in ("tuple_type", "list_type"):
        return f"{field} must be a list; got {shown}. Write [{value}]."
    if kind == "string_pattern_mismatch":
        hint = (declaration and declaration.description) or "Change it."
        return f"{field} must match {context['pattern']}; got {shown}. {hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        fix = "Write `name: value` lines below it."
        usual = ("model", "prompts", "path", "reward_funcs", "rule", "kind")
        present = [name for name in usual if members and name in members[0].model_fields]
        if present and declaration is not None and isinstance(value, str):
            fix = f"Write `{last}: {{{present[0]}: {value}}}`."
        return f"{field} must be a section with fields of its own; got {shown}. {fix}"
    if kind in ("union_tag_invalid", "literal_error"):
        expected = context["expected"] if kind == "literal_error" else context["expected_tags"]
        if kind == "union_tag_invalid":
            field, value = f"{field}.{discriminator(members)}", context["tag"]
        choices = expected.replace(", 'custom'", "")
        hint = did_you_mean(str(value), re.findall(r"'([^']*)'", choices), "Choose one of these.", 0.5)
        hint = hint[0].upper() + hint[1:]
        custom = " or file.py:NAME" if choices != expected else ""
        return f"{field} must be {choices}{custom}; got {shown if kind == 'literal_error' else repr(value)}. {hint}"
    fix = "Change it."
    if kind in ("less_than", "less_than_equal") and max(context.values()) <= 1 < float(value) <= 100:
        fix = f"It is a fraction, not a percentage: write {float(value) / 100:g}."
    rule = fault["msg"][0].lower() + fault["msg"][1:]
    rule = rule.replace("input should be", "must be").replace("input should have", "must have")
    return f"{field} {rule if rule.startswith('must') else 'is wrong: ' + rule}; got {shown}. {fix}"


def discriminator(members: Sequence[type[BaseModel]]) -> str:
    """The field by which the classes of a section are told apart."""
    return next(name for name in DISCRIMINATORS if all(name in member.model_fields for member in members))


def locate(loc: Sequence[str], model: type[BaseModel]) -> tuple[list[str], type[BaseModel], Sequence[type[BaseModel]]]:
    """The dotted names of an error without pydantic's tags, the section of the last, and the classes it may hold."""
    names: list[str] = []
    owner, members = model, [model]
    for part in loc:
        if len(members) > 1:  # the part is the tag of a union
            chosen_by = discriminator(members)
            members = [m for m in members if m.model_fields[chosen_by].default == part] or members[-1:]
            continue
        names.append(part)
        owner = members[0]
        if part in owner.model_fields:
            members = models_in(owner.model_fields[part].annotation) or members
    return names, owner, members


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, however deep."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return alternatives(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in arguments for kind in alternatives(argument)]
    return [annotation]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold, also in a list."""
    models = []
    for kind in alternatives(annotation):
        if typing.get_origin(kind) in (tuple, list):
            models += [model for inner in typing.get_args(kind) for model in models_in(inner)]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            models.append(kind)
    return models


def fields_of(
    section: type[BaseModel], prefix: str = "", *, in_lists: bool = False, sections: bool = False
) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted field with its declaration: those of sections in lists too if `in_lists`, and `sections` too."""
    for name, field in section.model_fields.items():
        is_list = any(typing.get_origin(kind) in (tuple, list) for kind in alternatives(field.annotation))
        models = models_in(field.annotation) if in_lists or not is_list else []
        for model in models:
            yield from fields_of(model, f"{prefix}{name}.", in_lists=in_lists, sections=sections)
        if sections or not models:
            yield prefix + name, field


def nearest(name: str, owner: type[BaseModel], config: type[BaseModel]) -> str:
    """A hint at the field that was probably meant: in this section, or else anywhere in the configuration."""
    elsewhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted, _ in fields_of(config, in_lists=True)}
    close = difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.75)
    there = f"did you mean {elsewhere[close[0]]!r}?" if close else f"there are {', '.join(owner.model_fields)}."
    return did_you_mean(name, owner.model_fields, there)


def declared(config: RunConfig) -> dict[str, Any]:
    """The policy family and every field that differs from its default; reading it again gives the same run.

    The rule and the objective are included unless they are the default, because other fields depend on them.
    """
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})
    if config.selection.rule != "best_of_k":
        selection = fields.get("selection", {})
        options = {name: value for name, value in selection.items() if name not in SelectionConfig.model_fields}
        fields["selection"] = {"rule": config.selection.rule, **options, **selection}
    if config.training.objective != "sft":
        fields["training"] = {"objective": config.training.objective, **fields.get("training", {})}
    return {**fields, "policy": {"family": config.policy.family, **fields.get("policy", {})}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted fields whose values differ, each with its old and its new value."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed[prefix + name] = (redacted(without_empty(before), name), redacted(without_empty(after), name))
    return changed


def without_empty(value: Any) -> Any:
    """The value without those fields of the sections in a list that are empty."""
    if isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        return [{k: v for k, v in item.items() if v not in (None, {}, [], ())} for item in value]
    return value

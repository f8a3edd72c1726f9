"""Parses configuration files and dotted flags: `a.yaml b.yaml --training.learning_rate 1e-4`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from cyclopts import Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raftune.config.load import RENAMED, models_in
from raftune.config.run import RunConfig
from raftune.errors import ConfigError

Tokens = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]  # what a command reads itself
FromStage = Annotated[str | None, Parameter(name="--from", help="Redo from this stage on: STAGE, or ROUND/STAGE.")]
OnlyStatuses = Annotated[
    str | None,
    Parameter(help="With --from score: score only samples with these statuses again: error,timeout."),
]
EMPTY = ("null", "none")


@dataclass(frozen=True)
class ParsedFlags:
    """Arguments without dashes, and flags by their dotted field."""

    words: tuple[str, ...]
    flags: dict[str, Any]


def read_tokens(
    tokens: Sequence[str], command: str, options: Sequence[str] = (), whole: type[BaseModel] = RunConfig
) -> ParsedFlags:
    """The tokens, sorted into words and flags. Raises ConfigError for a flag that neither the whole configuration nor
    the command has; `options` are the command's own, which are hinted at."""
    words: list[str] = []
    flags: dict[str, Any] = {}
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if not token.startswith("-") or token == "-":
            words.append(token)
            continue
        flag, equals, value = token.partition("=")
        name, value = read_flag(flag, value if equals else None, queue, command, options, whole)
        kinds = kinds_of(name, whole)
        given = convert(value, kinds)
        repeated = name in flags and is_list(kinds)
        flags[name] = [*as_list(flags[name]), *as_list(given)] if repeated else given
    return ParsedFlags(tuple(words), flags)


def data_and_files(given: ParsedFlags, command: str) -> tuple[str | None, list[str]]:
    """The data set and the YAML files among the words. Raises ConfigError for two data sets, or for no word at all."""
    files = [word for word in given.words if word.endswith((".yaml", ".yml"))]
    data = [word for word in given.words if word not in files]
    if not data and not files and not given.flags:
        raise ConfigError(
            f"{command} needs data, a model and a directory; got none. `raftune {command} --help` explains it."
        )
    if len(data) > 1:
        raise ConfigError(f"{command} takes one data set; got {', '.join(data)}. Put them into one file.")
    return (data[0] if data else None), files


def read_flag(
    flag: str, value: str | None, queue: list[str], command: str, options: Sequence[str], whole: type[BaseModel]
) -> tuple[str, str]:
    """The dotted field that the flag names, and its value, taken off the queue where it follows."""
    name = flag.removeprefix("--").replace("-", "_")
    kinds = kinds_of(name, whole)
    if kinds is None and name.startswith("no_") and bool in (kinds_of(name[3:], whole) or ()):
        return name[3:], "false"
    new = ".".join(RENAMED.get(part, part) for part in name.split("."))
    if kinds is None and new != name and kinds_of(new, whole) is not None:
        raise ConfigError(f"{flag} is called --{new} since raftune 0.2. Rename it.")
    if kinds is None or not flag.startswith("--"):
        raise ConfigError(f"{flag} is not a flag of `raftune {command}`; {hint(name, options, whole)}")
    if kinds == [type(None)] and (value or " ".join(queue[:1])).lower() not in EMPTY:
        raise ConfigError(f"{flag} takes no value but null; {hint(name, options, whole)}")
    if value is not None:
        return name, value
    if bool in kinds and not (queue and queue[0].lower() in ("true", "false", "yes", "no", "on", "off", "1", "0")):
        return name, "true"
    if not queue or queue[0].startswith("--"):
        raise ConfigError(f"{flag} needs a value; got none. Write {flag} VALUE.")
    return name, queue.pop(0)


def kinds_of(name: str, whole: type[BaseModel] = RunConfig) -> list[Any] | None:
    """The types that the dotted field may have; None where it is none, a whole section, or inside a list.

    A section that may be left out is a field whose one value is null.
    """
    sections: list[Any] = [whole]
    *path, last = name.split(".")
    for part in path:
        fields = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        if any(is_mapping(kind) for field in fields for kind in alternatives(field)):
            return [Any]
        if any(is_list([*alternatives(field)]) for field in fields):
            return None
        sections = [model for field in fields for model in models_in(field)]
    found = [kind for s in sections if last in s.model_fields for kind in alternatives(s.model_fields[last].annotation)]
    section = all(kind is type(None) or models_in(kind) for kind in found) and not is_list(found)
    if section:
        return [type(None)] if type(None) in found else None
    return found


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted field that can be a flag, with what is declared of it; a list is one field."""
    for name, field in section.model_fields.items():
        inner = models_in(field.annotation)
        if inner and not is_list([*alternatives(field.annotation)]):
            for model in inner:
                yield from fields_of(model, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, one after another."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from alternatives(inner)
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from alternatives(typing.get_args(annotation)[0])
    else:
        yield annotation


def convert(text: str, kinds: Sequence[Any] | None) -> Any:
    """The value that the text stands for: lists, mappings and fields without a type of their own as YAML, the rest as
    text, which the configuration's own types read."""
    kinds = kinds or ()
    if type(None) in kinds and text.lower() in EMPTY:
        return None
    structured = is_list(kinds) or any(is_mapping(kind) for kind in kinds)
    if Any in kinds or (structured and text.lstrip()[:1] in ("[", "{")):
        value = from_yaml(text)
        return [value] if is_list(kinds) and not isinstance(value, list) else value
    return [text] if is_list(kinds) and str not in kinds else text


def from_yaml(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"a flag's value must be valid YAML; got {text!r}. Put it in quotes.") from error
    try:
        return float(value) if isinstance(value, str) else value  # YAML 1.1 takes 1e-4 for a text
    except ValueError:
        return value


def is_list(kinds: Sequence[Any] | None) -> bool:
    return any(typing.get_origin(kind) in (tuple, list) for kind in kinds or ())


def is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def hint(name: str, options: Sequence[str], whole: type[BaseModel] = RunConfig) -> str:
    """The flag that was probably meant."""
    fields = [*dict(fields_of(whole))]
    if listed := [field for field in fields if name.startswith(f"{field}.") and is_list(kinds_of(field, whole))]:
        return f"{listed[0]} is a list: write --{listed[0]} '[{{{name.rsplit('.', 1)[-1]}: …}}]', for example."
    if inside := [field for field in fields if field.startswith(f"{name}.")]:
        return f"it is a section: write --{inside[0]}, for example."
    candidates = {option.removeprefix("--").replace("-", "_"): option for option in options}
    candidates |= {field: f"--{field}" for field in fields}
    last = {field.rsplit(".", 1)[-1]: f"--{field}" for field in reversed(fields)}
    for known, cutoff in ((candidates, 0.7), (last, 0.7)):
        if close := difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff):
            return f"did you mean {known[close[0]]}?"
    if close := difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.7):
        return f"did you mean {last[close[0]]}?"
    return "`raftune schema` lists all fields of the configuration." if whole is RunConfig else "--help lists all."

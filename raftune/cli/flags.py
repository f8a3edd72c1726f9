"""Parameters that commands share, and the configuration's fields as flags: `a.yaml --training.learning_rate 1e-4`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import typing
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, NamedTuple

import yaml
from cyclopts import Parameter
from pydantic import BaseModel

from raftune.config.load import RENAMED, alternatives, fields_of, models_in
from raftune.config.run import RunConfig
from raftune.errors import ConfigError


def switch(help: str, name: str | None = None) -> Parameter:
    """A flag without a value."""
    return Parameter(name=name, negative="", show_default=False, help=help)


RunDirectory = Annotated[str, Parameter(help="The run's directory.")]
Json = Annotated[bool, switch("Print the result as JSON.", "--json")]
Tokens = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]  # read by `read_tokens`
FromStage = Annotated[str | None, Parameter(name="--from", help="Redo from this stage on: STAGE, or ROUND/STAGE.")]
OnlyStatuses = Annotated[
    str | None,
    Parameter(help="With --from score: score only samples with these statuses again: error,timeout."),
]
Options = Annotated[str | None, Parameter(help="The reward's options, as JSON.")]
Timeout = Annotated[float, Parameter(help="Time limit of one call, in seconds.")]
Device = Annotated[str, Parameter(help="Device of a reward model: auto, cpu, cuda, mps.")]


def read_object(flag: str, text: str | None) -> dict[str, Any]:
    """The JSON object; an empty one for no text. Raises ConfigError that names the flag."""
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(
            f"{flag} must be JSON; got {text!r}: {error}. Write it in single quotes, keys and "
            """texts in double ones: {flag} '{{"name": 1}}'."""
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f'{flag} must be a JSON object; got {text!r}. Write {{"name": value}}.')
    return value


# -- fields of a configuration -----------------------------------------------------------------------------------------

EMPTY = ("null", "none")
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


class ParsedFlags(NamedTuple):
    """Arguments without dashes, and flags by their dotted field."""

    words: tuple[str, ...]
    flags: dict[str, Any]


def read_tokens(
    tokens: Sequence[str], command: str, options: Sequence[str] = (), config: type[BaseModel] = RunConfig
) -> ParsedFlags:
    """Sorts tokens into words and flags of this configuration.

    `options` are flags of the command itself, for hints. Raises ConfigError for a flag that the configuration lacks.
    """
    words: list[str] = []
    flags: dict[str, Any] = {}
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if not token.startswith("-") or token == "-":
            words.append(token)
            continue
        flag, equals, value = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        kinds = kinds_of(name, config)
        if not kinds and name.startswith("no_") and bool in kinds_of(name[3:], config):
            flags[name[3:]] = "false"
            continue
        new = ".".join(RENAMED.get(part, part) for part in name.split("."))
        if not kinds and kinds_of(new, config):
            raise ConfigError(f"{flag} is called --{new} since raftune 0.2. Rename it.")
        if not kinds or not flag.startswith("--"):
            raise ConfigError(f"{flag} is not a flag of `raftune {command}`; {hint(name, options, config)}")
        if all(kind is NoneType for kind in kinds) and (value if equals else " ".join(queue[:1])).lower() not in EMPTY:
            raise ConfigError(f"{flag} takes no value but null; {hint(name, options, config)}")
        if not equals:
            if bool in kinds and not (queue and queue[0].lower() in BOOLEANS):
                value = "true"
            elif not queue or queue[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value; got none. Write {flag} VALUE.")
            else:
                value = queue.pop(0)
        flags[name] = convert(value, kinds, flags.get(name))
    return ParsedFlags(tuple(words), flags)


def read_run_flags(tokens: Sequence[str], command: str, options: Sequence[str], fix: str) -> dict[str, Any]:
    """The flags of a command that takes one run. Raises ConfigError for a further word; `fix` says what to do."""
    words, flags = read_tokens(tokens, command, options)
    if words:
        raise ConfigError(f"{command} takes one run; got {words[0]!r} as well. {fix}")
    return flags


def read_data_flags(
    tokens: Sequence[str], command: str, options: Sequence[str], config: type[BaseModel], field: str
) -> tuple[list[str], dict[str, Any]]:
    """The YAML files, and the flags with the data set in `field`. Raises ConfigError for two data sets, or nothing."""
    words, flags = read_tokens(tokens, command, options, config)
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    data = [word for word in words if word not in files]
    if not words and not flags:
        raise ConfigError(
            f"{command} needs data, a model and a directory; got none. `raftune {command} --help` explains it."
        )
    if len(data) > 1:
        raise ConfigError(f"{command} takes one data set; got {', '.join(data)}. Put them into one file.")
    return files, flags | ({field: data[0]} if data else {})


@functools.cache
def kinds_of(name: str, config: type[BaseModel]) -> Sequence[Any]:
    """The types that the dotted field may have; none if it is no field, a required section, or inside a list."""
    fields = list(fields_of(config, sections=True))
    kinds = [kind for dotted, field in fields if dotted == name for kind in alternatives(field.annotation)]
    outer = [
        kind for dotted, field in fields if name.startswith(f"{dotted}.") for kind in alternatives(field.annotation)
    ]
    if not kinds and any(typing.get_origin(kind) is dict for kind in outer):
        return [Any]
    return [kind for kind in kinds if not models_in(kind) or is_list([kind])]


def is_list(kinds: Sequence[Any]) -> bool:
    return any(typing.get_origin(kind) in (tuple, list) for kind in kinds)


def convert(text: str, kinds: Sequence[Any], earlier: Any) -> Any:
    """The value of a flag: YAML for lists, mappings and untyped fields, otherwise text, which pydantic reads.

    A list is appended to the `earlier` value of the same flag.
    """
    if NoneType in kinds and text.lower() in EMPTY:
        return None
    structured = is_list(kinds) or any(typing.get_origin(kind) is dict for kind in kinds)
    value: Any = text
    if Any in kinds or (structured and text.lstrip()[:1] in ("[", "{")):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"a flag's value must be valid YAML; got {text!r}. Put it in quotes.") from error
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-4 as text
    if not is_list(kinds):
        return value
    added = value if isinstance(value, list) else [value]
    if earlier is None:
        return value if isinstance(value, str) and str in kinds else added
    return [*(earlier if isinstance(earlier, list) else [earlier]), *added]


def hint(name: str, options: Sequence[str], config: type[BaseModel]) -> str:
    fields = list(dict(fields_of(config)))
    if lists := [field for field in fields if name.startswith(f"{field}.") and is_list(kinds_of(field, config))]:
        return f"{lists[0]} is a list: write --{lists[0]} '[{{{name.rsplit('.', 1)[-1]}: …}}]', for example."
    if inside := [field for field in fields if field.startswith(f"{name}.")]:
        return f"it is a section: write --{inside[0]}, for example."
    flags = {option.removeprefix("--").replace("-", "_"): option for option in options}
    flags |= {field: f"--{field}" for field in fields}
    by_last_part = {field.rsplit(".", 1)[-1]: f"--{field}" for field in reversed(fields)}
    for word, by_name in ((name, flags), (name, by_last_part), (name.rsplit(".", 1)[-1], by_last_part)):
        if close := difflib.get_close_matches(word, list(by_name), n=1, cutoff=0.7):
            return f"did you mean {by_name[close[0]]}?"
    return "`raftune schema` lists all fields of the configuration." if config is RunConfig else "--help lists all."

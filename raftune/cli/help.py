"""Builds the `--help` text of commands: their docstring, and the configuration's fields as flags."""

from __future__ import annotations

import inspect
import pkgutil
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from cyclopts import App

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

# What each command that takes the fields of a configuration as flags is given, and which configuration.
RUN = "raftune.config.run:RunConfig"
TAKES_FLAGS = {
    "train": ("FILE... [--FIELD VALUE]... [OPTIONS]", RUN),
    "plan": ("FILE... [--FIELD VALUE]... [OPTIONS]", RUN),
    "resume": ("RUN [--FIELD VALUE]... [OPTIONS]", RUN),
    "evaluate": ("MODEL|RUN[@ROUND] [FILE.yaml]... [--FIELD VALUE]... [OPTIONS]", RUN),
    "rescore": ("RUN --rewards.FIELD VALUE... [OPTIONS]", RUN),
    "select": ("RUN [--FIELD VALUE]... [OPTIONS]", RUN),
    "sft": ("[DATA] [FILE.yaml]... [--FIELD VALUE]...", "raftune.config.sft:SftConfig"),
    "reward train": ("[DATA] [FILE.yaml]... [--FIELD VALUE]...", "raftune.config.reward_model:RewardModelConfig"),
}
# Of these fields, those that a command takes which does not take all.
ONLY: dict[str, tuple[str, ...]] = {
    "evaluate": ("name", "output_dir", "report", "data.", "policy.", "sampling.", "rewards.", "evaluation.", "engine."),
    "rescore": ("rewards.",),
    "select": ("selection.", "sampling.num_generations"),
}
MARGIN = 34


def explain(app: App, tokens: list[str]) -> None:
    """Gives the command whose help is asked for its whole text; the list of commands has a line for each only."""
    words = [token for token in tokens if not token.startswith("-")]
    if not words or not {"--help", "-h"} & set(tokens):
        return
    command, path = app, []
    for word in words:
        if word not in command or command.default_command not in (None, app.default_command):
            break
        command = command[word]
        path.append(word)
    if command is app or command.default_command is None:
        return
    command.help = reflowed(inspect.getdoc(command.default_command) or "")
    if (name := " ".join(path)) in TAKES_FLAGS:
        takes, whole = TAKES_FLAGS[name]
        command.usage = f"Usage: raftune {name} {takes}"
        listed = fields(pkgutil.resolve_name(whole), ONLY.get(name, ("",)))
        command.help_epilogue = f"Fields of the configuration, each a flag:\n\n{listed}\n\n{app.help_epilogue}"


def reflowed(text: str) -> str:
    """The text with each paragraph on one line, so that it fits any terminal; examples and lists stay as they are."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        as_it_is = any(line.startswith("raftune ") or "   " in line.strip() for line in lines)
        paragraphs.append("\n".join(lines) if as_it_is else " ".join(lines))
    return "\n\n".join(paragraphs)


def fields(whole: type[BaseModel], only: tuple[str, ...] = ("",)) -> str:
    """Every field of the configuration as a flag, with what it does and its default, as wide as the terminal.

    `only`: how the names of those begin that are taken.
    """
    from raftune.cli.flags import fields_of

    width = max(shutil.get_terminal_size().columns, MARGIN + 30)
    described: dict[str, str] = {}
    for name, field in fields_of(whole):
        if name.startswith(only):
            described.setdefault(f"--{name}", described_by(field))  # of families that share a name, the first one's
    return "\n".join(entry(flag, words, width) for flag, words in described.items())


def entry(flag: str, words: str, width: int) -> str:
    """A flag and its words, which hang beside it; beneath it where it is too long."""
    head, margin = f"  {flag}", " " * MARGIN
    said = textwrap.wrap(words, width - MARGIN) or [""]
    if len(head) >= MARGIN:
        return "\n".join([head, *(margin + line for line in said)])
    return "\n".join([f"{head:<{MARGIN}}{said[0]}".rstrip(), *(margin + line for line in said[1:])])


def described_by(field: FieldInfo) -> str:
    """What is said of the field, and its default in brackets."""
    said = field.description or ""
    if field.is_required():
        return said
    value: Any = field.get_default(call_default_factory=True)
    empty = value is None or value == () or value == {}
    return said if empty else f"{said} [{str(value).lower() if isinstance(value, bool) else value}]".strip()

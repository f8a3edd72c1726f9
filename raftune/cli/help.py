"""Builds the `--help` text of commands: their docstring, and the configuration's fields as flags."""

from __future__ import annotations

import inspect
import pkgutil
import shutil
import textwrap

from cyclopts import App

# Each command that takes fields of a configuration as flags: its arguments, the configuration, the fields' prefixes.
RUN = "raftune.config.run:RunConfig"
FIELDS = "[--FIELD VALUE]... [OPTIONS]"
EVALUATED = ("name", "output_dir", "report", "data.", "policy.", "sampling.", "rewards.", "evaluation.", "engine.")
DATA = "[DATA] [FILE.yaml]... [--FIELD VALUE]..."
TAKES_FLAGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "train": (f"FILE... {FIELDS}", RUN, ("",)),
    "plan": (f"FILE... {FIELDS}", RUN, ("",)),
    "resume": (f"RUN {FIELDS}", RUN, ("",)),
    "evaluate": (f"MODEL|RUN[@ROUND] [FILE.yaml]... {FIELDS}", RUN, EVALUATED),
    "rescore": ("RUN --rewards.FIELD VALUE... [OPTIONS]", RUN, ("rewards.",)),
    "select": (f"RUN {FIELDS}", RUN, ("selection.", "sampling.num_generations")),
    "sft": (DATA, "raftune.config.sft:SftConfig", ("",)),
    "reward train": (DATA, "raftune.config.reward_model:RewardModelConfig", ("",)),
}
MARGIN = 34


def explain(app: App, tokens: list[str]) -> None:
    """Sets the full help of the command that --help is asked for; the list of commands shows one line each."""
    if not {"--help", "-h"} & set(tokens):
        return
    command, path = app, []
    for word in [token for token in tokens if not token.startswith("-")]:
        if word not in command or command.default_command not in (None, app.default_command):
            break
        command = command[word]
        path.append(word)
    if command is app or command.default_command is None:
        return
    paragraphs = []
    for paragraph in (inspect.getdoc(command.default_command) or "").split("\n\n"):
        lines = paragraph.splitlines()
        verbatim = any(line.startswith("raftune ") or "   " in line.strip() for line in lines)  # an example or a list
        paragraphs.append(("\n" if verbatim else " ").join(lines))
    command.help = "\n\n".join(paragraphs)
    if (name := " ".join(path)) in TAKES_FLAGS:
        arguments, config, prefixes = TAKES_FLAGS[name]
        command.usage = f"Usage: raftune {name} {arguments}"
        command.help_epilogue = (
            f"Fields of the configuration, each a flag:\n\n{list_fields(config, prefixes)}\n\n{app.help_epilogue}"
        )


def list_fields(config: str, prefixes: tuple[str, ...]) -> str:
    """The fields with one of these prefixes as flags, each with its description and default, as wide as the terminal.

    Of fields of the same name in several classes the first is listed.
    """
    from raftune.config.load import fields_of

    width = max(shutil.get_terminal_size().columns, MARGIN + 30)
    entries: dict[str, str] = {}
    for name, field in fields_of(pkgutil.resolve_name(config)):
        if name in entries or not name.startswith(prefixes):
            continue
        words = field.description or ""
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            if value is not None and value not in ((), {}):
                words = f"{words} [{str(value).lower() if isinstance(value, bool) else value}]".strip()
        first, *others = textwrap.wrap(words, width - MARGIN) or [""]
        head = f"  --{name}"
        lines = [head, " " * MARGIN + first] if len(head) >= MARGIN else [f"{head:<{MARGIN}}{first}".rstrip()]
        entries[name] = "\n".join([*lines, *(" " * MARGIN + line for line in others)])
    return "\n".join(entries.values())

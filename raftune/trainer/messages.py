"""Rewrites command-line advice in error messages for Python users."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from raftune.errors import RaftuneError
from raftune.trainer.config import TABLE, flat_names

# A command that continues a run: in backticks, or from "with: " to the end of the line.
_COMMAND = re.compile(r"`raftune (?:resume|train)\b([^`]*)`(?: again)?|(?<=with: )raftune (?:resume|train)\b([^\n]*)")
_OPTION = re.compile(r"--([a-z][\w.-]*)[ =]([^\s`]+)")
_FLAT = {dotted: flat for flat, dotted in TABLE.items()}
_REPLACEMENTS = (
    (r"--from must ", "redo must "),
    (r"--only must ", "only must "),
    (r"with `--from`", "with train(redo=STAGE)"),
    (r"Write --from ([\w/,.-]*\w)", r"Write redo='\1'"),
    (r"(?:add )?`--from ([^`]+)`", r"call train(redo='\1')"),
    (r"--from ((?:STAGE|[\w./,-]*\w))", r"train(redo='\1')"),
    (r"`raftune verify[^`]*`", "raftune.runtime.run.verify(output_dir)"),
    (r"`raftune runs[^`]*`", "trainer.state"),
)


@contextlib.contextmanager
def python_advice() -> Iterator[None]:
    """Rewrites errors of a run: fields under their names here, and calls in place of commands."""
    try:
        yield
    except RaftuneError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise


def in_python(message: str) -> str:
    """The message with the names and calls of a trainer."""

    def call(command: re.Match[str]) -> str:
        options = command[1] or command[2] or ""
        redo = re.search(r"--from[ =]([\w./,-]*\w)", options)
        arguments, changes = "", ""
        for name, value in _OPTION.findall(options):
            if name == "only":
                arguments += f", only={value!r}"
            elif name != "from":
                name = name.replace("-", "_")
                changes += f" with {_FLAT.get(name, name)}={value!r}"
        return (f"`train(redo='{redo[1]}'{arguments})`" if redo else "`train()`") + changes

    text = _COMMAND.sub(call, message)
    for pattern, replacement in _REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    return flat_names(text)

"""Rewrites command-line advice in error messages for Python users."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from raftune.errors import RaftuneError
from raftune.trainer.config import TABLE, flat_names

# A command that goes on with a run: in backticks, or from "with: " to the end of the line.
_COMMAND = re.compile(r"`raftune (?:resume|train)\b([^`]*)`(?: again)?|(?<=with: )raftune (?:resume|train)\b([^\n]*)")
_FROM = re.compile(r"--from[ =]([\w./,-]*\w)")
_OPTION = re.compile(r"--([a-z][\w.-]*)[ =]([^\s`]+)")
_FLAT = {dotted: flat for flat, dotted in TABLE.items()}


@contextlib.contextmanager
def python_advice() -> Iterator[None]:
    """Errors of a run with fields under their names here, and calls in place of commands; class and cause stay."""
    try:
        yield
    except RaftuneError as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise


def in_python(message: str) -> str:
    """The message with the names and calls of a trainer."""
    text = _COMMAND.sub(lambda found: _call(found[1] or found[2] or ""), message)
    text = (
        text.replace("--from must ", "redo must ")
        .replace("--only must ", "only must ")
        .replace("with `--from`", "with train(redo=STAGE)")
    )
    text = re.sub(r"Write --from ([\w/,.-]*\w)", r"Write redo='\1'", text)
    text = re.sub(r"(?:add )?`--from ([^`]+)`", r"call train(redo='\1')", text)
    text = re.sub(r"--from ((?:STAGE|[\w./,-]*\w))", r"train(redo='\1')", text)
    text = re.sub(r"`raftune verify[^`]*`", "raftune.runtime.run.verify(output_dir)", text)
    text = re.sub(r"`raftune runs[^`]*`", "trainer.state", text)
    return flat_names(text)


def _call(options: str) -> str:
    """The call that a command with these options stands for."""
    redo = _FROM.search(options)
    changed = [(name.replace("-", "_"), value) for name, value in _OPTION.findall(options) if name != "from"]
    only = "".join(f", only={value!r}" for name, value in changed if name == "only")
    call = f"`train(redo='{redo[1]}'{only})`" if redo else "`train()`"
    return call + "".join(f" with {_FLAT.get(name, name)}={value!r}" for name, value in changed if name != "only")

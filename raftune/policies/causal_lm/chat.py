"""Chat templates: rendered text, end of an assistant's turn, and date."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raftune.data.classifier_inputs import apply_template, on_date
from raftune.errors import DataError
from raftune.records import TOOLS, Prompt

Messages = list[dict[str, Any]]
DATE = "chat_date.json"  # in the start folder, beside the tokenizer, where the template writes the date
_PROBE = "Qx7"  # an answer that no template writes of its own accord


def keep_date(folder: Path, *sources: str | None) -> None:
    """Writes down the date of this run: that of a source (another run's start), or today's (or SOURCE_DATE_EPOCH's)."""
    for source in filter(None, sources):
        if (known := read_date(Path(source))) is not None:
            date = known
            break
    else:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now()
        date = moment.date().isoformat()
    (folder / DATE).write_text(json.dumps({"date": date}) + "\n")


def read_date(folder: Path) -> str | None:
    """The date that was written down there, YYYY-MM-DD."""
    path = folder / DATE
    return str(json.loads(path.read_text())["date"]) if path.is_file() else None


def render(tokenizer: Any, messages: Messages, date: str | None, **options: Any) -> str:
    """The text that the template makes of the messages, dated `date`; `options` are the template's.

    Raises whatever Jinja and the template's author chose.
    """
    dated = on_date(tokenizer, date, options.get(TOOLS)) if date is not None else {}
    return apply_template(tokenizer, messages, **{**dated, **options})


def tools_of(prompt: Prompt) -> list[Any] | None:
    """The tools that the prompt's column `tools` holds, a list or JSON text of one. Raises DataError for others."""
    value = prompt.columns.get(TOOLS)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            value = 0
    if not value and value != 0:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(
            f"The column {TOOLS!r} must hold a list of JSON schemas, or its JSON text; got "
            f"{prompt.columns[TOOLS]!r:.100} (prompt {prompt.id}). Fix it, or rename the column."
        )
    return value


@dataclass(frozen=True)
class TurnEnd:
    """What the template writes after an assistant's content: `before` and the token `token_id`; then `tail` follows.

    The whole is `tail`; `before` is its beginning, up to the token.
    """

    token_id: int
    before: str
    tail: str


def turn_end(tokenizer: Any, date: str | None, options: dict[str, Any]) -> TurnEnd | None:
    """How the template ends an assistant's turn; None where it has no token for that, or cannot be asked."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render(tokenizer, messages, date, **options)
    except Exception:  # a template of another shape, which says so when it is used
        return None
    _, found, tail = text.rpartition(_PROBE)
    if not found:
        return None
    ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    special = {*tokenizer.all_special_ids} | {
        number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    end = next((number for number in ids if number in special), None)
    if end is None:
        return None
    return TurnEnd(end, tail.partition(tokenizer.convert_ids_to_tokens(end))[0], tail)

"""Token inputs of sequence classifiers, shared by training and scoring.

`raftune_reward.json` beside a model says which inputs it was trained on, and the distribution of its scores.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from raftune.errors import RewardError
from raftune.store.files import dump_json

NOTES = "raftune_reward.json"
READING = frozenset({"include_prompt", "append_eos", "add_special_tokens", "max_length"})
TEMPLATE_SECONDS = 20.0  # that a chat template may take for one prompt
DATED: Final = "2024-07-26"  # the date of a reward's chat template, so that a score is the same tomorrow
UNBOUNDED = 1_000_000  # tokenizers without a limit report a number beyond this
# Position embeddings of these begin after the padding token's own, so that the first rows are never used.
SHIFTED_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "longformer"}
)
# `strftime_now` for a template, made of data: transformers lets no function of ours into its sandbox. `parts` of a
# format begin with a directive (`d`, `-d`), but for the first, and for one after `%%`.
_CLOCK: Final = (
    "{% macro strftime_now(format) %}{% set ns = namespace(plain=true) %}{% for part in format.split('%') %}"
    "{% if ns.plain %}{{ part }}{% set ns.plain = false %}{% elif not part %}{{ '%' }}{% set ns.plain = true %}"
    "{% elif part[0] == '-' %}{{ raftune_date[part[:2]] ~ part[2:] }}"
    "{% else %}{{ raftune_date[part[0]] ~ part[1:] }}{% endif %}{% endfor %}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True, slots=True)
class ClassifierInputs:
    """Which parts of prompt and completion a classifier reads.

    include_prompt: whether the prompt is part of the text; without it a message's bare content is read.
    append_eos: end plain texts with the EOS token.
    special_tokens, special_in_messages: whether the tokenizer adds its own ([CLS], BOS) to plain texts, and to messages
    that a chat template has formatted.
    limit: tokens; longer texts lose their beginning.
    """

    include_prompt: bool = True
    append_eos: bool = False
    special_tokens: bool = False
    special_in_messages: bool = False
    limit: int | None = None


def tokens(tokenizer: Any, prompt: Any, completion: Any, reading: ClassifierInputs) -> list[int]:
    """The token ids of the text, the padding token alone where it is empty.

    Prompt and completion are texts, or message lists; the tokenizer must truncate on the left. Raises RewardError where
    messages meet a tokenizer without a chat template.
    """
    if isinstance(completion, str) or not reading.include_prompt:
        text = (prompt if reading.include_prompt else "") + text_of(completion)
        if reading.append_eos and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
        special = reading.special_tokens
    else:
        text, special = templated(tokenizer, [*prompt, *completion]), reading.special_in_messages
    cut = {"truncation": reading.limit is not None, "max_length": reading.limit}
    ids: list[int] = tokenizer(text, add_special_tokens=special, **cut)["input_ids"]
    return ids or [tokenizer.pad_token_id]


def is_hollow(tokenizer: Any) -> bool:
    """Whether the tokenizer has special tokens alone, so that every text is empty.

    transformers makes one of a folder that has a model's configuration and no tokenizer's files.
    """
    return set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template reads today's date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def on_date(tokenizer: Any, date: str, tools: Any = None) -> dict[str, Any]:
    """Arguments of apply_chat_template that make it this date (YYYY-MM-DD) for the template."""
    if not writes_date(tokenizer):
        return {}
    moment = datetime.fromisoformat(date)
    letters = [*"aAwdbBmyYHIpMSfjUWcxXGuVDFTR", *(f"-{letter}" for letter in "dmHIMSj")]
    formatted = {letter: moment.strftime(f"%{letter}") for letter in letters}
    return {"chat_template": _CLOCK + tokenizer.get_chat_template(tools=tools), "raftune_date": formatted}


def templated(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The messages as the chat template formats them on a fixed date. Raises RewardError without one."""
    if not tokenizer.chat_template:
        raise RewardError(
            f"reward model {getattr(tokenizer, 'name_or_path', '')!r}: its tokenizer has no chat template, and the "
            "prompts are messages. Set options.include_prompt: false to score the completion's text alone, or give a "
            "template."
        )
    return apply_template(tokenizer, messages, **on_date(tokenizer, DATED))


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The messages as the chat template formats them. Raises TemplateTimeoutError for one that does not end.

    A template is a program that came with the model: nested loops over large ranges run for hours.
    """
    with time_limit(TEMPLATE_SECONDS):
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


class TemplateTimeoutError(Exception):
    """A chat template exceeded its time limit."""

    def __str__(self) -> str:
        return f"it was not done after {TEMPLATE_SECONDS:g} seconds: its loops are too long"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, Python code of this thread is stopped by TemplateTimeoutError after so many seconds."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TemplateTimeoutError)
                )

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True


def text_of(completion: Any) -> str:
    """The text itself; of a message list, the contents of its messages, joined by line breaks."""
    if isinstance(completion, str):
        return completion
    contents = [message["content"] for message in completion if message.get("content")]
    return "\n".join(
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    )


def longest(tokenizer: Any, config: Any, limit: int | None) -> int | None:
    """Tokens that the model may read: the least of `limit`, the tokenizer's limit and the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and getattr(config, "model_type", None) in SHIFTED_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    limits = [n for n in (limit, tokenizer.model_max_length, positions) if n is not None and 0 < n < UNBOUNDED]
    return min(limits) if limits else None


def read_notes(path: Path | None) -> dict[str, Any]:
    """The content of `raftune_reward.json`; empty where there is no file. Raises RewardError where it is damaged."""
    if path is None or not path.is_file():
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        notes = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(notes["reading"], dict) and notes["reading"].keys() <= READING:
            return dict(notes)
    raise RewardError(f"{path} is damaged: it says how the reward model reads its text. Fetch the model again.")


def write_notes(folder: Path, notes: Mapping[str, Any]) -> None:
    """Writes what `read_notes` reads."""
    dump_json(folder / NOTES, notes)

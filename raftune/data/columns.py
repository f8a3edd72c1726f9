"""Column names of known data sets, and readers of the prompts, completions, dialogues and preferences in a row.

All readers raise UnusableRow with the reason and the column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from raftune.data.rows import SkipReason, UnusableRow
from raftune.records import PromptContent, Row

Message = dict[str, Any]

# The name that raftune uses, then others under which the same is found.
PROMPT = ("prompt", "question")
COMPLETION = ("completion", "response", "answer")
COMPLETIONS = ("completions", "responses", "answers")
SCORE = ("score", "rating", "reward")
SCORES = ("scores", "ratings", "rewards")
SYSTEM_PROMPT = ("system", "system_prompt")
RANKS = ("ranks", "ranking", "rank")
IMAGE = ("image", "completion")
CAPTION = ("prompt", "caption", "text", "label")
MESSAGES = ("messages", "conversation", "conversations")
Form = Literal["text", "messages"]
HH = "HH-RLHF dialogues"

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_COMMA = re.compile(r"([+-]?\d+),(\d+)")


def excerpt(value: Any, width: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def wrong_type(column: str, rule: str, value: Any) -> UnusableRow:
    return UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be {rule}; got {excerpt(value)}")


# -- columns ---------------------------------------------------------------------------------------------------------


def find(row: Row, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the names that the row has a value for, and the value."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise UnusableRow(SkipReason.MISSING, f"there is no {names[0]} among {', '.join(row) or 'no columns'}")


def has(row: Row, names: tuple[str, ...]) -> bool:
    return any(row.get(name) is not None for name in names)


def renamed_as(column: str, name: str) -> str:
    """How the format names a column that is read as `name`."""
    return name if column == name else f"{column} as {name}"


# -- prompts and completions -----------------------------------------------------------------------------------------


def prompt_of(row: Row) -> tuple[str, PromptContent]:
    """The name of the row's prompt column, and the prompt, behind the row's `system` text if it has one.

    Messages get it as a system message, unless they begin with one; a text, as text and a blank line before it, as
    `sampling.system_prompt` does.
    """
    column, value = find(row, PROMPT)
    prompt = read_prompt(value, column)
    if not has(row, SYSTEM_PROMPT):
        return column, prompt
    name, system = find(row, SYSTEM_PROMPT)
    if not isinstance(system, str):
        raise wrong_type(name, "a text", system)
    if not system.strip():
        return column, prompt
    if isinstance(prompt, list):
        has_system = prompt[0]["role"] in SYSTEM_ROLES
        return column, prompt if has_system else [{"role": "system", "content": system}, *prompt]
    return f"{name}, {column}", f"{system}\n\n{prompt}"


def read_prompt(value: Any, column: str) -> PromptContent:
    """A text, or messages that end with the user's."""
    if isinstance(value, str):
        if not value.strip():
            raise UnusableRow(SkipReason.EMPTY_PROMPT, f"{column} is blank")
        return value
    if not isinstance(value, list):
        raise wrong_type(column, "a text or a list of messages", value)
    messages = read_messages(value, column)
    check_user_begins(messages, column)
    check_prompt(messages, column)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UnusableRow(SkipReason.DISORDER, f"{column} ends with the {messages[-1]['role']}'s turn")
    return messages


def read_answer(value: Any, prompt: PromptContent, column: str) -> Any:
    """The completion in the form of its prompt: text for text; for messages, messages that end with the assistant's."""
    if isinstance(prompt, str):
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role"):
            value = read_messages(value, column)[0]["content"]
        if not isinstance(value, str):
            raise wrong_type(column, "a text, like its prompt", value)
        if not value.strip():
            raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{column} is blank")
        return value
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise wrong_type(column, "a text or a list of messages", value)
    assert isinstance(prompt, list)
    messages = read_messages(value, column)
    messages = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    check_answer(messages, column)
    return messages


def same(left: Any, right: Any) -> bool:
    """Whether two completions are equal up to whitespace around them."""

    def stripped(completion: Any) -> Any:
        if isinstance(completion, str):
            return completion.strip()
        return [m | {"content": stripped(m["content"])} if isinstance(m["content"], str) else m for m in completion]

    return bool(stripped(left) == stripped(right))


def read_number(value: Any, column: str) -> float:
    """A finite number, also one that is written as text, as in CSV; not true or false."""
    if isinstance(value, str):
        plain = value.strip()
        if comma := _COMMA.fullmatch(plain):
            digits, part = comma.groups()
            if len(part) == 3 and digits.lstrip("+-0") and len(digits.lstrip("+-")) <= 3:
                raise UnusableRow(
                    SkipReason.WRONG_TYPE,
                    f"{column} is {plain!r}: its comma may set off decimals or thousands; write a point",
                )
            plain = f"{digits}.{part}"
        value = float(plain) if _NUMBER.fullmatch(plain) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(column, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UnusableRow(SkipReason.NOT_FINITE, f"{column} is {number}")
    return number


def read_list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong_type(column, "a list", value)
    return value


# -- dialogues -------------------------------------------------------------------------------------------------------


def parse_dialogue(text: str, column: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …" (HH-RLHF) as messages, without whitespace around them."""
    if not text.strip():
        raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{column} is blank")
    first, *rest = _TURN.split(text)
    if not rest:
        raise UnusableRow(SkipReason.NO_SHARED_PREFIX, f"{column} has no turns (Human:, Assistant:), and no prompt")
    if first.strip():
        raise UnusableRow(SkipReason.DISORDER, f"{column}: there is text before the first turn: {excerpt(first)}")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    messages = [{"role": _SPEAKERS[name], "content": content.strip()} for name, content in pairs]
    check_order(messages, column)
    return messages


def as_dialogue(messages: list[Message]) -> str:
    """The messages as HH-RLHF writes them, each after a blank line and the speaker's name."""
    names = {role: name for name, role in _SPEAKERS.items()}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


def prompt_text(messages: list[Message]) -> str:
    """The dialogue up to the assistant's next turn."""
    return f"{as_dialogue(messages)}\n\nAssistant:"


def completion_text(messages: list[Message]) -> str:
    """What follows `prompt_text`: the reply, and further turns if there are any."""
    return f" {messages[0]['content']}{as_dialogue(messages[1:])}"


def read_messages(value: list[Any], column: str) -> list[Message]:
    """The messages, of known roles in a possible order. Keys that are None (Arrow adds them) are left out."""
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong_type(f"{column}: a message", "an object with role and content", message)
        if message["role"] not in ROLES:
            raise UnusableRow(
                SkipReason.DISORDER, f"{column}: {message['role']!r} is none of the roles {', '.join(ROLES)}"
            )
        present = {name: part for name, part in message.items() if part is not None}
        if not isinstance(present.setdefault("content", ""), str | list):
            raise wrong_type(f"{column}: content", "a text", present["content"])
        messages.append(present)
    check_order(messages, column)
    return messages


def check_order(messages: list[Message], column: str) -> None:
    """Speakers take turns: only a tool speaks twice in a row, and a system message comes first."""
    for before, after in pairwise(messages):
        role = after["role"]
        if (before["role"] == role != "tool") or role in SYSTEM_ROLES:
            raise UnusableRow(SkipReason.DISORDER, f"{column}: {role} follows {before['role']}")


def check_user_begins(messages: list[Message], column: str) -> None:
    first = next((message["role"] for message in messages if message["role"] not in SYSTEM_ROLES), "user")
    if first != "user":
        raise UnusableRow(SkipReason.DISORDER, f"{column}: the first turn is the {first}'s")


def check_assistant_ends(messages: list[Message], column: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        last = f"the last turn is the {messages[-1]['role']}'s" if messages else "there is no turn"
        raise UnusableRow(SkipReason.NOT_ASSISTANT, f"{column}: {last}")


def check_prompt(messages: list[Message], column: str) -> None:
    if not any(_has_content(message) for message in messages if message["role"] == "user"):
        raise UnusableRow(SkipReason.EMPTY_PROMPT, f"{column}: the user says nothing")


def check_answer(messages: list[Message], column: str) -> None:
    """The messages must begin and end with the assistant's, the last of which must not be empty."""
    check_assistant_ends(messages, column)
    if messages[0]["role"] != "assistant":
        raise UnusableRow(SkipReason.DISORDER, f"{column} begins with the {messages[0]['role']}'s turn")
    if not _has_content(messages[-1]):
        raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{column} is blank")


def _has_content(message: Message) -> bool:
    """Whether the message has a text that is not blank, an image, or a call of a tool."""
    content = message["content"]
    if isinstance(content, str):
        return bool(content.strip()) or bool(message.get("tool_calls"))
    return any(
        not isinstance(part, dict) or part.get("type") != "text" or str(part.get("text") or "").strip()
        for part in content
    )


# -- preferences, images and demonstrations ---------------------------------------------------------------------------


def preferred(row: Row) -> tuple[str, list[tuple[Any, Any, Any]]]:
    """The row's format, and prompt, chosen and rejected of each pair, at least one. Raises UnusableRow."""
    if has(row, COMPLETIONS) and (has(row, RANKS) or has(row, SCORES)):
        prompt, completions, worth = ranking(row)
        order = sorted(range(len(completions)), key=lambda i: -worth[i])  # stable: the given order among equals
        ranked = [(completions[i], completions[j]) for i, j in combinations(order, 2) if worth[i] > worth[j]]
        if not ranked:
            raise UnusableRow(SkipReason.ALL_TIED, f"{len(completions)} answers, all of the same rank")
        pairs = [(prompt, better, worse) for better, worse in ranked if not same(better, worse)]
        if not pairs:
            raise UnusableRow(SkipReason.SAME, f"all are {excerpt(completions[0])}")
        return "ranked answers", pairs
    _, chosen = find(row, ("chosen",))
    _, rejected = find(row, ("rejected",))
    # Two lists of several messages repeat the prompt that is beside them as a text.
    dialogues = all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected))
    if has(row, PROMPT) and not (dialogues and isinstance(find(row, PROMPT)[1], str)):
        form, prompt = "explicit preferences", prompt_of(row)[1]
        chosen, rejected = read_answer(chosen, prompt, "chosen"), read_answer(rejected, prompt, "rejected")
    else:
        form, prompt, chosen, rejected = split_dialogues(chosen, rejected)
    if same(chosen, rejected):
        raise UnusableRow(SkipReason.SAME, f"both are {excerpt(chosen)}")
    return form, [(prompt, chosen, rejected)]


def split_dialogues(chosen: Any, rejected: Any) -> tuple[str, list[Message], list[Message], list[Message]]:
    """The format, the turns that two dialogues share up to a turn of the user's, and what follows in each."""
    parse: Callable[[Any, str], list[Message]]
    if isinstance(chosen, str) and isinstance(rejected, str):
        form, parse = HH, parse_dialogue
    elif isinstance(chosen, list) and isinstance(rejected, list):
        form, parse = "implicit preferences", read_messages
    else:
        rule = f"must be two texts or two lists of messages; got {excerpt(chosen)}, {excerpt(rejected)}"
        raise UnusableRow(SkipReason.WRONG_TYPE, f"chosen and rejected {rule}")
    left, right = parse(chosen, "chosen"), parse(rejected, "rejected")
    for name, messages in (("chosen", left), ("rejected", right)):
        check_user_begins(messages, name)
        check_assistant_ends(messages, name)
    # The prompt ends with a user's or a tool's turn, and leaves a completion to each.
    most = min(len(left), len(right)) - 1
    shared = next((i for i in range(most) if left[i] != right[i]), most)
    while shared and left[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise UnusableRow(
            SkipReason.NO_SHARED_PREFIX,
            f"chosen begins with {excerpt(left[0]['content'])}, rejected with {excerpt(right[0]['content'])}",
        )
    check_prompt(left[:shared], "prompt")
    check_answer(left[shared:], "chosen")
    check_answer(right[shared:], "rejected")
    return form, left[:shared], left[shared:], right[shared:]


def ranking(row: Row) -> tuple[PromptContent, list[Any], list[float]]:
    """The prompt, its completions, and the worth of each: its score, or its negative rank (1 is best)."""
    _, prompt = prompt_of(row)
    column, values = find(row, COMPLETIONS)
    completions = [read_answer(value, prompt, f"{column}[{i}]") for i, value in enumerate(read_list(values, column))]
    worth_column, values = find(row, (*SCORES, *RANKS))
    sign = 1.0 if worth_column in SCORES else -1.0
    numbers = enumerate(read_list(values, worth_column))
    worth = [sign * read_number(value, f"{worth_column}[{i}]") for i, value in numbers]
    if len(worth) != len(completions):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{len(completions)} {column}, but {len(worth)} {worth_column}")
    return prompt, completions, worth


def captioned_image(row: Row, column: str, base: Path) -> tuple[str, Any, Any]:
    """The format, the prompt (a text or a class label), and the image: bytes or a full path."""
    prompt_column, prompt = find(row, CAPTION)
    if isinstance(prompt, bool) or not isinstance(prompt, str | int):
        raise wrong_type(prompt_column, "a text or a class label", prompt)
    value = row[column]
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if isinstance(value, str):
        path = base / Path(value).expanduser()
        if not path.is_file():
            raise UnusableRow(SkipReason.MISSING, f"{column}: there is no file {path}")
        value = str(path)
    return f"prompts and images ({renamed_as(prompt_column, 'prompt')}, {renamed_as(column, 'image')})", prompt, value


def prompt_and_completion(row: Row, dialogues: Form) -> tuple[str, Any, Any]:
    """The format, the prompt, and the completion to learn: of messages the last turn."""
    form_of_pair = ""
    if has(row, ("chosen", "rejected")) or has(row, COMPLETIONS):
        form_of_pair, pairs = preferred(row)
        form = f"preferred answers of {form_of_pair}"
        prompt, completion, _ = pairs[0]
    elif has(row, MESSAGES) and not has(row, COMPLETION):
        column, value = find(row, MESSAGES)
        messages = read_messages(read_list(value, column), column)
        check_user_begins(messages, column)
        check_assistant_ends(messages, column)
        check_prompt(messages[:-1], column)
        check_answer(messages[-1:], column)
        form, prompt, completion = renamed_as(column, "messages"), messages[:-1], messages[-1:]
    else:
        prompt_column, prompt = prompt_of(row)
        column, value = find(row, COMPLETION)
        form = f"prompts and completions ({renamed_as(prompt_column, 'prompt')}, {renamed_as(column, 'completion')})"
        completion = read_answer(value, prompt, column)
    if isinstance(prompt, list):
        messages = prompt + completion
        prompt, completion = messages[:-1], messages[-1:]
        if form_of_pair == HH and dialogues == "text":
            prompt, completion = prompt_text(prompt), completion_text(completion)
    return form, prompt, completion

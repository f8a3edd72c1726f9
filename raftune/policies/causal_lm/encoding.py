"""Encodes prompts and completions as token ids, and decodes them; renders chat templates on the run's date.

For generation a prompt may follow a system prompt or a few-shot prefix; for training it stands alone (context
distillation).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raftune.config.sampling import SamplingConfig
from raftune.data.classifier_inputs import apply_template, on_date
from raftune.errors import DataError, TooLong
from raftune.records import TOOLS, Prompt
from raftune.sanitize import first_line, one_line

Messages = list[dict[str, Any]]
DATE = "chat_date.json"  # in the start folder, beside the tokenizer, where the template writes the date
_PROBE = "Qx7"  # a completion that no template writes of its own accord


def keep_date(folder: Path, *sources: str | None) -> None:
    """Writes the date of this run: that of a source (another run's start), or today's (or SOURCE_DATE_EPOCH's)."""
    dates = [date for source in sources if source and (date := read_date(Path(source))) is not None]
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now()
    (folder / DATE).write_text(json.dumps({"date": dates[0] if dates else now.date().isoformat()}) + "\n")


def read_date(folder: Path) -> str | None:
    """The date that was written there, YYYY-MM-DD."""
    path = folder / DATE
    return str(json.loads(path.read_text())["date"]) if path.is_file() else None


def render(tokenizer: Any, messages: Messages, date: str | None, **options: Any) -> str:
    """The messages through the chat template, dated `date`; `options` are the template's. Raises what it raises."""
    dated = on_date(tokenizer, date, options.get(TOOLS)) if date is not None else {}
    return apply_template(tokenizer, messages, **{**dated, **options})


@dataclass(frozen=True)
class TurnEnd:
    """What the template writes after an assistant's content: `tail`, which is `before`, the token, and the rest."""

    token_id: int
    before: str
    tail: str


def turn_end(tokenizer: Any, date: str | None, options: dict[str, Any]) -> TurnEnd | None:
    """How the template ends an assistant's turn; None where it has no token for that, or fails on a probe."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render(tokenizer, messages, date, **options)
    except Exception:  # a template of another shape, which is reported when it is used
        return None
    _, probe, tail = text.rpartition(_PROBE)
    if not probe:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {*tokenizer.all_special_ids} | {number for number, token in added if token.special}
    for number in tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]:
        if number in special:
            return TurnEnd(number, tail.partition(tokenizer.convert_ids_to_tokens(number))[0], tail)
    return None


class TextEncoder:
    """Encodes prompts and completions with one tokenizer; `context` is the model's limit in tokens, None for none.

    `date` is the date for the chat template, None for a template that writes none. A completion to messages ends with
    the template's `turn_end`, one to a text with EOS.
    """

    def __init__(
        self, tokenizer: Any, sampling: SamplingConfig, context: int | None, eos_id: int, date: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.context = context
        self.eos_id = eos_id
        self.date = date
        self.turn_end = turn_end(tokenizer, date, sampling.chat_template_kwargs)

    def encode(self, prompts: Sequence[Prompt], *, for_drawing: bool) -> list[list[int]]:
        """The token ids of each prompt. DataError where one is empty, too long, or needs a template that is missing."""
        rendered = [self._render(prompt, for_drawing) for prompt in prompts]
        chats = [isinstance(prompt.content, list) for prompt in prompts]
        encoded: list[list[int]] = [[]] * len(prompts)
        for chat in {*chats}:  # one call for all texts: a template has written its special tokens itself
            indices = [i for i, c in enumerate(chats) if c == chat]
            texts = [rendered[i] for i in indices]
            ids = self.tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
            for index, row in zip(indices, ids, strict=True):
                encoded[index] = row if chat else self._without_added_tokens(row, rendered[index])
        maximum, context = self.sampling.max_prompt_length, self.context
        for prompt, ids in zip(prompts, encoded, strict=True):
            shown = f"prompt {prompt.id} ({str(prompt.content)[:40]!r})"
            if not ids:
                raise DataError(
                    f"A prompt must have at least one token; {shown} has none. Remove it, or give it a text."
                )
            if maximum is not None and len(ids) > maximum:
                raise TooLong(
                    f"A prompt must not be longer than sampling.max_prompt_length; {shown} has {len(ids)} tokens, the "
                    f"limit is {maximum}. Shorten or remove it, or raise the limit."
                )
            if context is not None and len(ids) >= context:
                raise TooLong(
                    f"A prompt must leave room for a completion; {shown} has {len(ids)} tokens, the limit is "
                    f"{context - 1} (the model's context is {context}). Shorten or remove it."
                )
        return encoded

    def _render(self, prompt: Prompt, for_drawing: bool) -> str:
        """The text that is tokenised: the prompt with its prefix, or the messages through the chat template."""
        content, sampling = prompt.content, self.sampling
        system, few_shot = sampling.system_prompt, sampling.few_shot_prefix
        if isinstance(content, str):
            return (f"{system}\n\n" if system else "") + (few_shot or "") + content if for_drawing else content
        if not isinstance(content, list):
            raise DataError(
                f"A prompt must be a text or a list of messages here; got {content!r} (prompt {prompt.id})."
            )
        if not self.tokenizer.chat_template:
            raise DataError(
                f"A prompt given as messages needs a tokenizer with a chat template; this one has none (prompt "
                f"{prompt.id}). Set tokenizer.chat_template and save it, or give the prompts as text."
            )
        messages: Messages = content
        if not messages or any("role" not in m or not m.keys() & {"content", "tool_calls"} for m in messages):
            raise DataError(f"A message must have a role and a content; got {messages!r:.200} (prompt {prompt.id}).")
        if for_drawing and few_shot:
            raise DataError(
                f"sampling.few_shot_prefix goes before prompts given as text; prompt {prompt.id} is a list of "
                "messages. Write the examples as messages, or use sampling.system_prompt."
            )
        continues = messages[-1]["role"] == "assistant"
        if for_drawing and system:
            if messages[0]["role"] == "system":  # templates refuse a second system message
                text = messages[0]["content"]
                parts = [{"type": "text", "text": f"{system}\n\n"}]
                text = [*parts, *text] if isinstance(text, list) else f"{system}\n\n{text}"
                messages = [{**messages[0], "content": text}, *messages[1:]]
            else:
                messages = [{"role": "system", "content": system}, *messages]
        return self._apply_template(
            prompt, messages, add_generation_prompt=not continues, continue_final_message=continues
        )

    def _apply_template(self, prompt: Prompt, messages: Messages, **options: bool) -> str:
        """The messages through the chat template, with the prompt's tools. Raises DataError where it refuses them."""
        column = tools = prompt.columns.get(TOOLS)
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except ValueError:
                tools = 0
        listed = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        if (tools or tools == 0) and not listed:
            raise DataError(
                f"The column {TOOLS!r} must hold a list of JSON schemas, or its JSON text; got "
                f"{column!r:.100} (prompt {prompt.id}). Fix it, or rename the column."
            )
        kwargs = {**({TOOLS: tools} if tools else {}), **self.sampling.chat_template_kwargs}
        in_parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
        for part in (part for parts in in_parts for part in parts):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise DataError(
                    f"A message must hold text alone, for a language model reads no more; prompt {prompt.id} holds "
                    f"{part!r:.80}. Leave it out."
                )
        try:
            text = render(self.tokenizer, messages, self.date, **options, **kwargs)
        except Exception as error:  # templates raise whatever Jinja and their authors chose
            raise DataError(
                f"The chat template refused prompt {prompt.id} ({one_line(str(messages[-1].get('content')), 40)!r}): "
                f"{first_line(error)}."
            ) from error
        if any(str(parts) in text for parts in in_parts):
            raise DataError(
                f"This chat template takes a message's content as one text, and wrote a list of parts as Python shows "
                f"it (prompt {prompt.id}). Give the content as a text."
            )
        return text

    def _without_added_tokens(self, ids: list[int], text: str) -> list[int]:
        """The ids without an EOS that the tokenizer puts at the end, and with BOS at most once."""
        tokenizer = self.tokenizer
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
        return ids or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])

    def encode_answer(self, prompt: Prompt, answer: Any) -> tuple[str, list[int]]:
        """A given completion as this policy would have generated it: its text, and its ids with the end of its turn."""
        text, ids = self._encode_completion(prompt, answer)
        if self.context is not None and len(ids) >= self.context:
            raise TooLong(
                f"A completion must fit the model's context of {self.context} tokens; one to prompt {prompt.id} has "
                f"{len(ids)}. Shorten or remove it."
            )
        return text, ids

    def encode_within(self, prompt: Prompt, answer: Any, limit: int | None) -> tuple[str, list[int], bool]:
        """As `encode_answer`, cut where prompt and answer together exceed `limit` or the context; whether it was.

        A cut completion has no end, and its text is that of the remaining ids. Raises TooLong where the prompt leaves
        no room.
        """
        [prompt_ids] = self.encode([prompt], for_drawing=False)
        text, ids = self._encode_completion(prompt, answer)
        limits = [n for n in (limit, self.context) if n is not None]
        room = min(limits) - len(prompt_ids) if limits else len(ids)
        if room < 1:
            raise TooLong(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for a completion within {min(limits)}"
            )
        if len(ids) <= room:
            return text, ids, False
        return self.decode([ids[:room]])[0], ids[:room], True

    def _encode_completion(self, prompt: Prompt, answer: Any) -> tuple[str, list[int]]:
        """The completion's text and ids. To messages it is what the template makes of it, with the end of the turn."""
        chat = isinstance(prompt.content, list)
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else None
        if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
            calls = chat and answer[0].get("tool_calls") and not answer[0].get("content")
            if answer[0].get("role") == "assistant" and (isinstance(answer[0].get("content"), str) or calls):
                message = answer[0]
        if message is None:
            raise DataError(
                f"A completion must be a text or a list of one assistant message; got {answer!r:.200} "
                f"(prompt {prompt.id})."
            )
        text = self._render_turn(prompt, message) if chat else message["content"]
        end = self.turn_end.token_id if chat and self.turn_end is not None else self.eos_id
        return text, [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end]

    def _render_turn(self, prompt: Prompt, message: dict[str, Any]) -> str:
        """What the template writes after the prompt for this message, up to the end of the turn.

        The content as it stands where the template rewrites what came before, or makes something else of the content.
        """
        content, messages = str(message.get("content") or ""), prompt.content
        assert isinstance(messages, list)
        if self.turn_end is not None and messages[-1]["role"] != "assistant":
            before, dialogue = self._render(prompt, False), self._apply_template(prompt, [*messages, message])
            turn = dialogue[len(before) :].removesuffix(self.turn_end.tail)
            if dialogue.startswith(before) and dialogue.endswith(self.turn_end.tail) and content.strip() in turn:
                return turn + self.turn_end.before
        if message.get("tool_calls"):
            raise DataError(f"The chat template does not say how a call of a tool is written (prompt {prompt.id}).")
        return content

    def decode(self, rows: Sequence[list[int]]) -> list[str]:
        """The texts of the rows of ids, special tokens left out."""
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))

"""Encodes prompts and completions as token ids, and decodes them.

For generation a prompt may follow a system prompt or a few-shot prefix; for training it stands alone (context
distillation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raftune.config.sampling import SamplingConfig
from raftune.errors import DataError, TooLong
from raftune.policies.causal_lm.chat import Messages, render, tools_of, turn_end
from raftune.records import TOOLS, Prompt
from raftune.sanitize import first_line, one_line


class TextEncoder:
    """Encodes prompts and answers with one tokenizer; `context` is the model's limit in tokens, None for none.

    `date` is what a chat template takes for today, None for a template that does not ask. `turn_end` is how the
    template ends an assistant's turn: with that a given answer to messages ends, where one to a text ends with EOS.
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
            places = [i for i, c in enumerate(chats) if c == chat]
            ids = self.tokenizer([rendered[i] for i in places], add_special_tokens=not chat, verbose=False)["input_ids"]
            for place, row in zip(places, ids, strict=True):
                encoded[place] = row if chat else self._bare(row, rendered[place])
        for prompt, ids in zip(prompts, encoded, strict=True):
            self._check(prompt, ids)
        return encoded

    def _render(self, prompt: Prompt, for_drawing: bool) -> str:
        """The text that is tokenised: the prompt with its prefix, or the messages through the chat template."""
        content = prompt.content
        if isinstance(content, str):
            return self._prefix() + content if for_drawing else content
        if isinstance(content, list):
            return self._chat(prompt, content, for_drawing)
        raise DataError(f"A prompt must be a text or a list of messages here; got {content!r} (prompt {prompt.id}).")

    def _prefix(self) -> str:
        system = f"{self.sampling.system_prompt}\n\n" if self.sampling.system_prompt else ""
        return system + (self.sampling.few_shot_prefix or "")

    def _chat(self, prompt: Prompt, messages: Messages, for_drawing: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"A prompt given as messages needs a tokenizer with a chat template; this one has none (prompt "
                f"{prompt.id}). Set tokenizer.chat_template and save it, or give the prompts as text."
            )
        if not messages or any("role" not in m or not m.keys() & {"content", "tool_calls"} for m in messages):
            raise DataError(f"A message must have a role and a content; got {messages!r:.200} (prompt {prompt.id}).")
        goes_on = messages[-1]["role"] == "assistant"
        asked = self._with_system(prompt, messages) if for_drawing else messages
        return self._templated(prompt, asked, add_generation_prompt=not goes_on, continue_final_message=goes_on)

    def _templated(self, prompt: Prompt, messages: Messages, **options: bool) -> str:
        """The messages through the chat template, with the prompt's tools. Raises DataError where it refuses them."""
        tools = tools_of(prompt)
        beside = {TOOLS: tools} if tools else {}
        parted = [m["content"] for m in messages if isinstance(m.get("content"), list)]
        if others := [part for parts in parted for part in parts if not _is_text_part(part)]:
            raise DataError(
                f"A message must hold text alone, for a language model reads no more; prompt {prompt.id} holds "
                f"{others[0]!r:.80}. Leave it out."
            )
        try:
            text = render(
                self.tokenizer, messages, self.date, **options, **{**beside, **self.sampling.chat_template_kwargs}
            )
        except Exception as error:  # templates raise whatever Jinja and their authors chose
            raise DataError(
                f"The chat template refused prompt {prompt.id} ({one_line(str(messages[-1].get('content')), 40)!r}): "
                f"{first_line(error)}."
            ) from error
        if any(str(parts) in text for parts in parted):
            raise DataError(
                f"This chat template takes a message's content as one text, and wrote a list of parts as Python shows "
                f"it (prompt {prompt.id}). Give the content as a text."
            )
        return text

    def _with_system(self, prompt: Prompt, messages: Messages) -> Messages:
        if self.sampling.few_shot_prefix:
            raise DataError(
                f"sampling.few_shot_prefix goes before prompts given as text; prompt {prompt.id} is a list of "
                "messages. Write the examples as messages, or use sampling.system_prompt."
            )
        system = self.sampling.system_prompt
        if not system:
            return messages
        if messages[0]["role"] == "system":  # templates refuse a second system message
            content = messages[0]["content"]
            if isinstance(content, list):
                content = [{"type": "text", "text": f"{system}\n\n"}, *content]
            else:
                content = f"{system}\n\n{content}"
            first = {**messages[0], "content": content}
            return [first, *messages[1:]]
        return [{"role": "system", "content": system}, *messages]

    def _bare(self, ids: list[int], text: str) -> list[int]:
        """The ids without an EOS that the tokenizer puts at the end, and with BOS at most once."""
        tokenizer = self.tokenizer
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]
        return ids or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])

    def _check(self, prompt: Prompt, ids: list[int]) -> None:
        shown = f"prompt {prompt.id} ({str(prompt.content)[:40]!r})"
        if not ids:
            raise DataError(f"A prompt must have at least one token; {shown} has none. Remove it, or give it a text.")
        limit = self.sampling.max_prompt_length
        if limit is not None and len(ids) > limit:
            raise TooLong(
                f"A prompt must not be longer than sampling.max_prompt_length; {shown} has {len(ids)} tokens, the "
                f"limit is {limit}. Shorten or remove it, or raise the limit."
            )
        if self.context is not None and len(ids) >= self.context:
            raise TooLong(
                f"A prompt must leave room for an answer; {shown} has {len(ids)} tokens, the limit is "
                f"{self.context - 1} (the model's context is {self.context}). Shorten or remove it."
            )

    def encode_answer(self, prompt: Prompt, answer: Any) -> tuple[str, list[int]]:
        """Somebody else's answer as this policy would have generated it: its text, and its ids with the end of its
        turn.
        """
        text, ids = self._answer(prompt, answer)
        if self.context is not None and len(ids) >= self.context:
            raise TooLong(
                f"An answer must fit the model's context of {self.context} tokens; one to prompt {prompt.id} has "
                f"{len(ids)}. Shorten or remove it."
            )
        return text, ids

    def encode_within(self, prompt: Prompt, answer: Any, limit: int | None) -> tuple[str, list[int], bool]:
        """As `encode_answer`, cut where prompt and answer together exceed `limit` or the context; whether it was.

        What is cut has no end, and its text is that of the ids that are left. Raises TooLong where the prompt leaves no
        room.
        """
        [asked] = self.encode([prompt], for_drawing=False)
        text, ids = self._answer(prompt, answer)
        limits = [n for n in (limit, self.context) if n is not None]
        room = min(limits) - len(asked) if limits else len(ids)
        if room < 1:
            raise TooLong(f"the prompt has {len(asked)} tokens and leaves no room for an answer within {min(limits)}")
        if len(ids) <= room:
            return text, ids, False
        return self.decode([ids[:room]])[0], ids[:room], True

    def _answer(self, prompt: Prompt, answer: Any) -> tuple[str, list[int]]:
        """The answer's text and ids. To messages it is what the template makes of it, and ends as its turns end."""
        if isinstance(prompt.content, str):
            text = _answer_text(prompt, answer)
            return text, [*self._ids(text), self.eos_id]
        message = (
            {"role": "assistant", "content": answer} if isinstance(answer, str) else _answer_message(prompt, answer)
        )
        text = self._turn(prompt, message)
        return text, [*self._ids(text), self.eos_id if self.turn_end is None else self.turn_end.token_id]

    def _turn(self, prompt: Prompt, message: dict[str, Any]) -> str:
        """What the template writes after the prompt for this message, up to the end of the turn.

        The content as it stands where the template rewrites what came before, or makes something else of the content.
        """
        content = str(message.get("content") or "")
        assert isinstance(prompt.content, list)
        plain = content if not message.get("tool_calls") else None
        if self.turn_end is None or not self.tokenizer.chat_template or prompt.content[-1]["role"] == "assistant":
            if plain is None:
                raise DataError(f"The chat template does not say how a call of a tool is written (prompt {prompt.id}).")
            return plain
        before = self._chat(prompt, prompt.content, for_drawing=False)
        whole = self._templated(prompt, [*prompt.content, message])
        turn = whole[len(before) :].removesuffix(self.turn_end.tail)
        if whole.startswith(before) and whole.endswith(self.turn_end.tail) and content.strip() in turn:
            return turn + self.turn_end.before
        if plain is None:
            raise DataError(f"The chat template does not say how a call of a tool is written (prompt {prompt.id}).")
        return plain

    def _ids(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def decode(self, rows: Sequence[list[int]]) -> list[str]:
        """The texts of the rows of ids, special tokens left out."""
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True))


def _answer_text(prompt: Prompt, answer: Any) -> str:
    return answer if isinstance(answer, str) else str(_answer_message(prompt, answer)["content"])


def _answer_message(prompt: Prompt, answer: Any) -> dict[str, Any]:
    """The one message of an answer, which has a text, or calls tools where the prompt is messages."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        message = answer[0]
        calls = isinstance(prompt.content, list) and message.get("tool_calls") and not message.get("content")
        if message.get("role") == "assistant" and (isinstance(message.get("content"), str) or calls):
            return message
    raise DataError(
        f"An answer must be a text or a list of one assistant message; got {answer!r:.200} (prompt {prompt.id})."
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)

"""Encodes prompts as conditions of the denoiser, each distinct prompt once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch

from raftune.errors import DataError
from raftune.policies.diffusion.loading import FrozenComponents
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter
from raftune.records import Prompt
from raftune.training.quiet import quiet

LIMIT = 2**30  # bytes of cached conditions, on the CPU


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders, one at a time, so that no prompt depends on its neighbours.

    The conditions are cached with the frozen parts; beyond `limit` bytes the least recently used are dropped.
    """

    def __init__(
        self, frozen: FrozenComponents, adapter: PipelineAdapter, device: torch.device, limit: int = LIMIT
    ) -> None:
        self.frozen, self.adapter, self.device, self.limit = frozen, adapter, device, limit
        self._options = tuple(sorted((name, repr(value)) for name, value in adapter.reading().items()))

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """The conditions of the prompts, a row each, on the CPU. Raises DataError for a prompt that cannot be used."""
        cache = self.frozen.encoded
        keys = [(type(prompt.content).__name__, repr(prompt.content), *self._options) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in cache}
        if missing:
            with self._text_encoders():
                for key, prompt in missing.items():
                    try:
                        cache[key] = self.adapter.encode([prompt.content]).to("cpu")
                    except DataError as error:
                        reason = str(error).replace(" at place 0", "")  # the prompt's id says which it is
                        raise DataError(f"prompt {prompt.id}: {reason}") from error
        conditions = Conditions.joined([cache[key] for key in keys])
        for key in keys:  # the latest stand last
            cache[key] = cache.pop(key)
        held = sum(entry.nbytes for entry in cache.values())
        for key in list(cache):
            if held <= self.limit:
                break
            held -= cache.pop(key).nbytes
        return conditions

    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt, or the negative one."""
        key = ("empty", repr(negative), *self._options)
        if key not in self.frozen.encoded:
            with self._text_encoders():
                self.frozen.encoded[key] = self.adapter.empty(negative).to("cpu")
        return self.frozen.encoded[key]

    @contextmanager
    def _text_encoders(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.no_grad(), quiet(), self.frozen.on(self.device, "text_encoder"):
            yield

    @cached_property
    def _limits(self) -> dict[str, int]:
        return self.adapter.text_limits()

    def unseen(self, text: str) -> str | None:
        """The end of a prompt that no text encoder reads; None where one reads it to the end."""
        if not self._limits:
            return None
        name, limit = max(self._limits.items(), key=lambda entry: entry[1])
        tokenizer = getattr(self.adapter.pipe, name)
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return None
        kept = limit - tokenizer.num_special_tokens_to_add()  # the text is cut: its end token stays
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(tokenizer.decode(bare[kept:]))

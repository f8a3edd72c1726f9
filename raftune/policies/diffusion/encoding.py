"""Encodes prompts as conditions of the denoiser, each distinct prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from raftune.errors import DataError
from raftune.policies.diffusion.loading import FrozenComponents
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter
from raftune.records import Prompt
from raftune.training.quiet import quiet

LIMIT = 2**30  # bytes of conditions that are remembered, on the CPU


class PromptEncoder:
    """Reads prompts with a pipeline's text encoders, one at a time, so that no prompt depends on its neighbours.

    What was read is remembered with the frozen parts; beyond `limit` bytes, what was asked for longest ago is dropped.
    """

    def __init__(
        self, frozen: FrozenComponents, binding: PipelineAdapter, device: torch.device, limit: int = LIMIT
    ) -> None:
        self.frozen, self.binding, self.device, self.limit = frozen, binding, device, limit
        self._reading = tuple(sorted((name, repr(value)) for name, value in binding.reading().items()))

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """The conditions of the prompts, a row each, on the CPU. Raises DataError for a prompt that is not fit."""
        return Conditions.joined(self._recalled([self._key(prompt.content) for prompt in prompts], prompts))

    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt, or the negative one."""
        key = ("empty", repr(negative), *self._reading)
        if key not in self.frozen.encoded:
            with torch.inference_mode(False), torch.no_grad(), quiet(), self._text_encoders():
                self.frozen.encoded[key] = self.binding.empty(negative).to("cpu")
        return self.frozen.encoded[key]

    def _key(self, content: Any) -> tuple[Any, ...]:
        return (type(content).__name__, repr(content), *self._reading)

    def _recalled(self, keys: Sequence[tuple[Any, ...]], prompts: Sequence[Prompt]) -> list[Conditions]:
        memory = self.frozen.encoded
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in memory}
        if missing:
            with torch.inference_mode(False), torch.no_grad(), quiet(), self._text_encoders():
                for key, prompt in missing.items():
                    memory[key] = self._read(prompt)
        found = [memory[key] for key in keys]
        for key in keys:  # the latest stand last
            memory[key] = memory.pop(key)
        self._forget()
        return found

    def _read(self, prompt: Prompt) -> Conditions:
        try:
            return self.binding.encode([prompt.content]).to("cpu")
        except DataError as error:
            why = str(error).replace(" at place 0", "")  # it is alone; its id says which it is
            raise DataError(f"prompt {prompt.id}: {why}") from error

    def _forget(self) -> None:
        memory = self.frozen.encoded
        held = sum(one.nbytes for one in memory.values())
        for key in list(memory):
            if held <= self.limit:
                return
            held -= memory.pop(key).nbytes

    def _text_encoders(self) -> Any:
        return self.frozen.on(self.device, "text_encoder")

    # -- prompts that are longer than what is read ---------------------------------------------------------------------

    @cached_property
    def _limits(self) -> dict[str, int]:
        return self.binding.text_limits()

    def unseen(self, text: str) -> str | None:
        """The end of a prompt that no text encoder reads; None where one reads it to the end."""
        limits = self._limits
        if not limits:
            return None
        name = max(limits, key=lambda name: limits[name])
        tokenizer, limit = getattr(self.binding.pipe, name), limits[name]
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return None
        kept = limit - tokenizer.num_special_tokens_to_add()  # what is cut is the text: its end token stays
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(tokenizer.decode(bare[kept:]))

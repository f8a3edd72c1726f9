"""Parameters and results of generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["eos", "length", "stop"]
BackendName = Literal["forked", "generate", "single"]  # the shared prefix; `generate`; `generate` with a row at a time


class GeneratedCompletion(NamedTuple):
    """One completion: its token ids, EOS included where it was generated, and why it ended.

    `logprobs` holds one number per id, in nats: the log-softmax of the raw logits, before temperature and every other
    warp. `finish` is `eos`, `stop` (a stop string was completed by the last id) or `length` (the limit, or the model's
    context, was reached).
    """

    ids: list[int]
    logprobs: list[float]
    finish: FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a completion ends.

    `eos_ids` are all ids that end a completion; `pad_id` fills rows and may be any id of the vocabulary. `batch_size`
    is the number of rows alive at once. With `generation_kwargs`, `generate` samples.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_completion_length: int = 128
    stop_strings: tuple[str, ...] = ()
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    batch_size: int = 256

    @property
    def warps(self) -> bool:
        """True where a sampled token's distribution is not the softmax of logits over temperature alone."""
        cuts = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.repetition_penalty != 1 or (cuts and self.temperature > 0)

    @property
    def needs_generate(self) -> str:
        """Which options only `generate` has, as a reason; empty where there are none."""
        options = [name for name, value in self.generation_kwargs.items() if (name, value) != ("use_cache", True)]
        return f"generation_kwargs {', '.join(sorted(options))} are generate's own" if options else ""

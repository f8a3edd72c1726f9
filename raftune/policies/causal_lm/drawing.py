"""Completions for token prompts: one function, behind which stand the shared-prefix cache and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from raftune.policies.causal_lm.answers import Answers
from raftune.policies.causal_lm.models import context_of
from raftune.policies.causal_lm.parity import rows_of_prompts
from raftune.policies.causal_lm.paths import choose_backend, generate_along
from raftune.policies.causal_lm.settings import Drawn, DrawPath, DrawSettings
from raftune.policies.memory import names_out_of_memory

__all__ = ["DrawPath", "DrawSettings", "Drawn", "draw"]


def draw(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    settings: DrawSettings,
    path: DrawPath | None = None,
) -> list[list[Drawn]]:
    """One completion for each seed: result[i][k] continues prompts[i] with the noise of seeds[i][k].

    A completion depends on the model, its prompt, its seed and the settings, and (up to the rounding of floating-point
    batches) on nothing else; only with `generation_kwargs` of generate's own does it depend on its batch. `path` is
    what the run's `Backend` says; without it, it is tried on these prompts. `tokenizer` is used for stop strings alone.
    The model is left as it was.

    Raises DataError for an empty prompt or one that fills the context, OutOfMemory (with the batch size) where the
    device's memory did not suffice, ModelError where logits are not numbers, ConfigError for `generation_kwargs` that
    `generate` refuses.
    """
    answers = Answers(tokenizer, prompts, seeds, settings, context_of(model))
    with names_out_of_memory(settings.batch_size, "max_completion_length"):
        if answers.rows:
            if path is None:
                backend = choose_backend(model, rows_of_prompts(prompts), settings)
                path, _ = backend.path(model, settings, max(map(len, prompts)))
            generate_along(path, model, answers)
    return answers.drawn()

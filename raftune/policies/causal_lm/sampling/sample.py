"""Generates completions for token prompts, with the shared-prefix cache or `generate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

from torch import nn

from raftune.errors import ExtensionError
from raftune.policies.causal_lm.model_utils import context_of
from raftune.policies.causal_lm.sampling.backend import HfGenerate, SharedPrefix, choose_backend
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.params import BackendName, FinishReason, GeneratedCompletion, SamplingParams
from raftune.policies.causal_lm.sampling.parity import rows_of_prompts
from raftune.protocols import GenerationRequest, SamplingBackend
from raftune.training.devices import is_out_of_memory, names_out_of_memory

__all__ = ["BackendName", "GeneratedCompletion", "SamplingParams", "generate", "generate_by"]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    settings: SamplingParams,
    path: BackendName | None = None,
) -> list[list[GeneratedCompletion]]:
    """One completion for each seed: result[i][k] continues prompts[i] with the noise of seeds[i][k].

    A completion depends on the model, its prompt, its seed and the settings, and (up to the rounding of floating-point
    batches) on nothing else; only with `generation_kwargs` of generate's own does it depend on its batch. `path` is
    what the run's `Backend` says; without it, it is tried on these prompts. `tokenizer` is used for stop strings alone.
    The model is left as it was.

    Raises DataError for an empty prompt or one that fills the context, OutOfMemory (with the batch size) where the
    device's memory did not suffice, ModelError where logits are not numbers, ConfigError for `generation_kwargs` that
    `generate` refuses.
    """
    with names_out_of_memory(settings.batch_size, "max_completion_length"):
        if path is None and any(seeds):
            CompletionBatch(
                tokenizer, prompts, seeds, settings, context_of(model)
            )  # refuses prompts that cannot be continued
            chosen = choose_backend(model, rows_of_prompts(prompts), settings)
            path, _ = chosen.path(model, settings, max(map(len, prompts)))
        backend = SharedPrefix() if path == "forked" else HfGenerate(alone=path == "single")
        return backend.generate(model, GenerationRequest(prompts, seeds, settings, tokenizer))


def generate_by(
    backend: SamplingBackend, name: str, model: nn.Module, request: GenerationRequest
) -> list[list[GeneratedCompletion]]:
    """As `generate`, by a custom backend. Raises ExtensionError where it fails or breaks its contract."""
    with names_out_of_memory(request.parameters.batch_size, "max_completion_length"):
        try:
            groups = [
                [
                    GeneratedCompletion([*map(int, ids)], [*map(float, nats)], cast(FinishReason, finish))
                    for ids, nats, finish in group
                ]
                for group in backend.generate(model, request)
            ]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ExtensionError(
                f"sampling.backend: `generate` of {name} raised {type(error).__name__}: {error}. Fix it and resume."
            ) from error
    wanted, given = [len(seeds) for seeds in request.seeds], [len(group) for group in groups]
    if wanted != given:
        raise ExtensionError(
            f"sampling.backend: `generate` of {name} must return a completion for each seed of each prompt; got "
            f"{given} for {wanted}. Fix it and resume."
        )
    longest = request.parameters.max_completion_length
    for ids, logprobs, finish in (completion for group in groups for completion in group):
        whole = 0 < len(ids) <= longest and len(ids) == len(logprobs) and all(map(math.isfinite, logprobs))
        if not whole or finish not in get_args(FinishReason):
            raise ExtensionError(
                f"sampling.backend: a completion of {name} must be 1 to {longest} ids, a finite log-probability for "
                f"each, and eos, stop or length; got {len(ids)} ids, {len(logprobs)} log-probabilities, {finish!r}. "
                "Fix it and resume."
            )
    return groups

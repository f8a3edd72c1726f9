"""Generates completions for token prompts, and chooses how: the shared-prefix cache if the model supports it, otherwise
`generate`.

The choice is made once a run, on the run's own prompts: their tokens are replayed through each backend, and the
log-probabilities are compared with those of a plain forward pass (parity.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raftune.errors import ConfigError, ExtensionError, ModelError
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion
from raftune.policies.causal_lm.loading import base_of, context, evaluating
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.fused_forward import why_not_fused
from raftune.policies.causal_lm.sampling.hf_generate import hf_generate, is_recurrent
from raftune.policies.causal_lm.sampling.parity import COPIES, TokenReplay
from raftune.policies.causal_lm.sampling.shared_prefix import (
    UnsupportedAttentionError,
    generate_shared_prefix,
    prefix_scores,
)
from raftune.policies.causal_lm.sampling.token_choice import (
    BackendName,
    FinishReason,
    GeneratedCompletion,
    SamplingParams,
)
from raftune.policies.causal_lm.weight_probe import WeightProbe, measure, rows_of_prompts
from raftune.protocols import GenerationRequest, SamplingBackend
from raftune.sanitize import first_line
from raftune.store import partial as unfinished
from raftune.training.devices import is_out_of_memory, names_out_of_memory


@dataclass(frozen=True)
class BackendChoice:
    """Result of the trial on a run's prompts. `forked` is why the shared-prefix cache is not used, empty where it is.

    `fused` is the same for its faster form, in which the forward is ours (fused_forward.py), and `scoring` for
    log-probabilities of given completions. `rows` is how many `generate` takes at once: 0 for
    any number, 1 where rows of a batch change each other's logits. Distances are nats a token from a plain forward;
    `allowed` is the limit. `way` and `why` are what `path` returned for the prompts of the trial.
    """

    forked: str
    rows: int
    distances: dict[str, float]
    noise: float
    allowed: float
    scoring: str = "not tried"  # in a run of an older version, which has no `way` either
    fused: str = "not tried"
    way: BackendName | None = None
    why: str = ""

    def scores_by_prefix(self, model: nn.Module, longest: int) -> bool:
        """Whether completions of one prompt, of `longest` tokens at most, are scored from one pass over it."""
        return not self.scoring and not any(_objections(model, longest))

    def path(
        self, model: nn.Module, settings: SamplingParams, longest_prompt: int | None = None
    ) -> tuple[BackendName, str]:
        """The backend, and the reason in words. `longest_prompt` (tokens) tells how much context is needed.

        Raises ConfigError for `generation_kwargs` with a model whose batches `generate` gets wrong.
        """
        kwargs = settings.needs_generate
        if kwargs and self.rows:
            raise ConfigError(
                f"sampling.generation_kwargs must be left out with this model; {kwargs}, and `generate` gives equal "
                "rows of a batch different logits, so that only one row at a time can be generated."
            )
        reason = kwargs or _structure(model, settings, longest_prompt) or self.forked
        if not reason:
            fused = not (self.fused or why_not_fused(model))
            return "fused" if fused else "forked", "every layer caches keys and values of all tokens"
        if self.rows:
            return "single", f"{reason}; `generate` gives equal rows of a batch different logits: one row at a time"
        return "generate", reason


BACKENDS: dict[BackendName, Callable[[nn.Module, CompletionBatch], None]] = {
    "fused": partial(generate_shared_prefix, fused=True),
    "forked": generate_shared_prefix,
    "generate": hf_generate,
    "single": partial(hf_generate, one_by_one=True),
}


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
    batches) on nothing else; only with `generation_kwargs` of generate's own does it depend on its batch. Without
    `path`, the backends are tried on these prompts. `tokenizer` is used for stop strings alone. The model is left as it
    was. Raises DataError for an empty prompt or one that fills the context, OutOfMemory (with the batch size),
    ModelError where logits are not numbers, ConfigError for `generation_kwargs` that `generate` refuses.
    """
    with names_out_of_memory(settings.batch_size, "max_completion_length"):
        batch = CompletionBatch(tokenizer, prompts, seeds, settings, _context_of(model))
        if batch.rows:
            if path is None:
                choice = choose_backend(model, rows_of_prompts(prompts), settings)
                path, _ = choice.path(model, settings, max(map(len, prompts)))
            BACKENDS[path](model, batch)
        return batch.completions()


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
    expected, counts = [len(seeds) for seeds in request.seeds], [len(group) for group in groups]
    if expected != counts:
        raise ExtensionError(
            f"sampling.backend: `generate` of {name} must return a completion for each seed of each prompt; got "
            f"{counts} for {expected}. Fix it and resume."
        )
    longest = request.parameters.max_completion_length
    for ids, logprobs, finish in (completion for group in groups for completion in group):
        valid = 0 < len(ids) <= longest and len(ids) == len(logprobs) and all(map(math.isfinite, logprobs))
        if not valid or finish not in get_args(FinishReason):
            raise ExtensionError(
                f"sampling.backend: a completion of {name} must be 1 to {longest} ids, a finite log-probability for "
                f"each, and eos, stop or length; got {len(ids)} ids, {len(logprobs)} log-probabilities, {finish!r}. "
                "Fix it and resume."
            )
    return groups


def choose_backend(
    model: nn.Module, rows: Sequence[TokenizedCompletion], settings: SamplingParams, name: str = "auto"
) -> BackendChoice:
    """Tries each backend that the architecture admits on these rows, the fastest first; `name` is sampling.backend.

    Raises ModelError where none gives the log-probabilities of a plain forward.
    """
    probe, longest = measure(model, rows, settings.pad_id), max(row.start for row in rows)
    distances: dict[str, float] = {}
    kwargs, rows_at_once = settings.needs_generate, 0
    forked = "sampling.backend is hf_generate" if name == "hf_generate" else _structure(model, settings, longest)
    fused = forked or why_not_fused(model) or _fault("fused", model, probe, settings, distances)
    forked = forked or (fused and _fault("forked", model, probe, settings, distances))
    if name == "shared_prefix" and (why := kwargs or forked):
        raise ConfigError(f"sampling.backend: shared_prefix cannot be used here: {why}. Write auto, or hf_generate.")
    scoring = forked or _fault("scoring", model, probe, settings, distances)
    if forked or kwargs or _structure(model, settings, None):
        batched = _fault("generate", model, probe, settings, distances)
        rows_at_once = 1 if batched else 0
        if batched and (alone := _fault("single", model, probe, settings, distances)):
            raise ModelError(
                "policy.model must generate with the log-probabilities of its own forward, and no way of generating "
                f"does: shared prefix: {forked or 'not possible for the valid context'}; generate: {batched}; one row "
                f"at a time: {alone}. Use another dtype, or another model, and report the architecture."
            )
    choice = BackendChoice(forked, rows_at_once, distances, probe.noise, probe.allowed, scoring, fused=fused)
    way, why = choice.path(model, settings, longest)
    return replace(choice, way=way, why=why)


def replay(path: BackendName, model: nn.Module, probe: WeightProbe, settings: SamplingParams) -> list[list[float]]:
    """The log-probs of the probe's completions, as this backend records them."""
    batch = TokenReplay(probe, settings.pad_id, min(settings.batch_size, COPIES * len(probe.prompts)))
    with unfinished.outside():
        BACKENDS[path](model, batch)
    return [completion.logprobs for group in batch.completions() for completion in group]


def _fault(
    path: BackendName | Literal["scoring"],
    model: nn.Module,
    probe: WeightProbe,
    settings: SamplingParams,
    distances: dict[str, float],
) -> str:
    """Why this backend is not to be used, empty where it is right; its distance from a plain forward is recorded."""
    try:
        if path == "scoring":  # each prompt is computed once for several completions
            rows = [row for row in probe.examples for _ in range(COPIES)]
            with evaluating(model):
                scores = prefix_scores(CompletionLogits(model), rows, settings.batch_size)
            log_probs = [part.tolist() for part in np.split(scores, np.cumsum([row.tokens for row in rows])[:-1])]
        else:
            log_probs = replay(path, model, probe, settings)
        distance = probe.distance(log_probs)
    except UnsupportedAttentionError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return f"a trial of it failed: {type(error).__name__}: {first_line(error)}"
    distances[path] = distance
    if distance <= probe.allowed:
        return ""
    return f"a trial gave other log-probabilities (by {distance:.1e} nats a token, allowed {probe.allowed:.0e})"


def _context_of(model: nn.Module) -> int | None:
    return context(base_of(model).config)


def _structure(model: nn.Module, settings: SamplingParams, longest_prompt: int | None) -> str:
    """Why the architecture cannot share a prefix with these settings; empty where it can."""
    limits = [_context_of(model), longest_prompt and longest_prompt + settings.max_completion_length]
    return next(_objections(model, min(filter(None, limits), default=None)), "")


def _objections(model: Any, context: int | None) -> Iterator[str]:
    """The same for rows of `context` tokens; None where there is no limit."""
    base = base_of(model)
    config = base.config.get_text_config(decoder=True)
    if base.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        yield "it attends to an encoder"
    if is_recurrent(model):
        yield "it carries a recurrent state"
    if not getattr(base, "_supports_attention_backend", False):
        yield f"{type(base).__name__} does not take its attention from AttentionInterface"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        yield "its adapter puts learned tokens before the prompt"
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):  # a window that the context never leaves keeps all tokens
            if context is None or context > layer.sliding_window:
                needed = "an unbounded context" if context is None else f"a context of {context}"
                yield f"a layer sees the last {layer.sliding_window} tokens only, within {needed}"
        elif type(layer) is not DynamicLayer:
            yield f"a layer keeps its past in a {type(layer).__name__}"
    # Rotary frequencies that change with the longest row of a batch, beyond the length they were trained at.
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        trained: int = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if context is None or context > trained:
            yield f"its rotary frequencies ({rope['rope_type']}) change beyond {trained} tokens"

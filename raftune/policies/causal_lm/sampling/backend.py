"""Chooses the generation backend: the shared-prefix cache if the model supports it, otherwise `generate`.

`Backend` is chosen once a run, on the run's own prompts: their tokens are replayed through each backend, and the
log-probabilities are compared with those of a plain forward pass (parity.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raftune.config.extensions import register
from raftune.errors import ConfigError, ModelError
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion
from raftune.policies.causal_lm.model_utils import as_it_was, base_of, context_of, is_recurrent
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.hf_generate import draw_by_generate_alone, draw_generated
from raftune.policies.causal_lm.sampling.params import BackendName, GeneratedCompletion, SamplingParams
from raftune.policies.causal_lm.sampling.parity import COPIES, ParityProbe, measure, replayed_log_probs
from raftune.policies.causal_lm.sampling.prefix_scoring import token_log_probs
from raftune.policies.causal_lm.sampling.shared_prefix import UnsupportedAttentionError, draw_forked
from raftune.protocols import GenerationRequest, SamplingBackend
from raftune.sanitize import first_line
from raftune.store import partial
from raftune.training.devices import is_out_of_memory

_HARMLESS = {"use_cache": True}


@dataclass(frozen=True)
class BackendChoice:
    """What the trial on a run's prompts found. `forked` is why the shared-prefix cache is not used, empty where it is.

    `scoring` is the same for log-probabilities of given completions. `rows` is what `generate` takes at once: 0 for any
    number, 1 where it gives rows of a batch other logits. Distances are nats a token from a plain forward, of what was
    tried; `allowed` is the limit. `way` and `why` are what `path` says of the prompts that it was tried on.
    """

    forked: str
    rows: int
    distances: dict[str, float]
    noise: float
    allowed: float
    scoring: str = "not tried"  # in a run of an older version, which has no `way` either
    way: BackendName | None = None
    why: str = ""

    def scores_by_prefix(self, model: nn.Module, longest: int) -> bool:
        """Whether completions of one prompt are scored from one pass over it; `longest` tokens has the longest row."""
        return not self.scoring and not _objection(model, longest)

    def path(
        self, model: nn.Module, settings: SamplingParams, longest_prompt: int | None = None
    ) -> tuple[BackendName, str]:
        """The way, and the reason in words. `longest_prompt` (tokens) tells how much context is needed.

        Raises ConfigError for `generation_kwargs` with a model whose batches `generate` gets wrong.
        """
        asked = asked_of_generate(settings)
        if asked and self.rows:
            raise ConfigError(
                f"sampling.generation_kwargs must be left out with this model; {asked}, and `generate` gives equal "
                "rows of a batch different logits, so that only one row at a time can be generated."
            )
        reason = asked or _structure(model, settings, longest_prompt) or self.forked
        if not reason:
            return "forked", "every layer caches keys and values of all tokens"
        if self.rows:
            return "single", f"{reason}; `generate` gives equal rows of a batch different logits: one row at a time"
        return "generate", reason


BACKENDS: dict[str, type[SamplingBackend]] = {}  # the built-in backends, by sampling.backend


@register(BACKENDS, "shared_prefix")
class SharedPrefix:
    """Prefills each prompt once, and keeps its keys for all its completions."""

    reproducible = True

    def generate(self, model: Any, request: GenerationRequest) -> list[list[GeneratedCompletion]]:
        return _filled("forked", model, request)


@register(BACKENDS, "hf_generate")
class HfGenerate:
    """transformers' `generate`. `alone`: one row at a time, for models whose rows depend on their batch."""

    reproducible = True

    def __init__(self, alone: bool = False) -> None:
        self.path: BackendName = "single" if alone else "generate"

    def generate(self, model: Any, request: GenerationRequest) -> list[list[GeneratedCompletion]]:
        return _filled(self.path, model, request)


def _filled(path: BackendName, model: Any, request: GenerationRequest) -> list[list[GeneratedCompletion]]:
    answers = CompletionBatch(request.tokenizer, request.prompts, request.seeds, request.parameters, context_of(model))
    if answers.rows:
        generate_along(path, model, answers)
    return answers.drawn()


def choose_backend(
    model: nn.Module, rows: Sequence[TokenizedCompletion], settings: SamplingParams, name: str = "auto"
) -> BackendChoice:
    """Tries each way that the architecture admits on these rows, the fastest first; `name` is sampling.backend.

    Raises ModelError where none gives the log-probabilities of a plain forward.
    """
    longest = max(row.start for row in rows)
    backend = _backend(measure(model, rows, settings.pad_id), model, longest, settings, name)
    way, why = backend.path(model, settings, longest)
    return replace(backend, way=way, why=why)


def _backend(probe: ParityProbe, model: nn.Module, longest: int, settings: SamplingParams, name: str) -> BackendChoice:
    distances: dict[str, float] = {}
    forked = "sampling.backend is hf_generate" if name == "hf_generate" else _structure(model, settings, longest)
    forked = forked or _tried("forked", model, probe, settings, distances)
    if name == "shared_prefix" and (why := asked_of_generate(settings) or forked):
        raise ConfigError(f"sampling.backend: shared_prefix cannot be used here: {why}. Write auto, or hf_generate.")
    scoring = forked or _tried("scoring", model, probe, settings, distances)
    if not forked and not (asked_of_generate(settings) or _structure(model, settings, None)):
        return BackendChoice(forked, 0, distances, probe.noise, probe.allowed, scoring)
    batched = _tried("generate", model, probe, settings, distances)
    if batched and (alone := _tried("single", model, probe, settings, distances)):
        raise ModelError(
            "policy.model must generate with the log-probabilities of its own forward, and no way of generating does: "
            f"shared prefix: {forked or 'not possible for the whole context'}; generate: {batched}; one row at a time: "
            f"{alone}. Use another dtype, or another model, and report the architecture."
        )
    return BackendChoice(forked, 1 if batched else 0, distances, probe.noise, probe.allowed, scoring)


def generate_along(path: BackendName, model: nn.Module, answers: CompletionBatch) -> None:
    """Fills the answers, this way."""
    if path == "forked":
        draw_forked(model, answers)
    elif asked_of_generate(answers.settings):
        draw_by_generate_alone(model, answers, is_recurrent(model))
    else:
        draw_generated(model, answers, is_recurrent(model), 1 if path == "single" else answers.settings.batch_size)


def replay(path: BackendName, model: nn.Module, probe: ParityProbe, settings: SamplingParams) -> list[list[float]]:
    """The log-probs of the probe's completions, as this way of generating records them."""
    rows = min(settings.batch_size, COPIES * len(probe.prompts))
    with partial.outside():
        return replayed_log_probs(lambda answers: generate_along(path, model, answers), probe, settings.pad_id, rows)


def _scored(model: nn.Module, probe: ParityProbe, batch_size: int) -> list[list[float]]:
    """The log-probs of the probe's completions, twice each, where its prompts are computed once."""
    rows = [row for row in probe.examples for _ in range(COPIES)]
    with as_it_was(model):
        scores = token_log_probs(CompletionLogits(model), rows, batch_size)
    ends = np.cumsum([row.tokens for row in rows])[:-1]
    return [part.tolist() for part in np.split(scores, ends)]


def _tried(
    path: BackendName | Literal["scoring"],
    model: nn.Module,
    probe: ParityProbe,
    settings: SamplingParams,
    distances: dict[str, float],
) -> str:
    """Why this way is not to be used, empty where it is right; `distances` takes how far it is from a plain forward."""
    try:
        apart = probe.distance(
            _scored(model, probe, settings.batch_size) if path == "scoring" else replay(path, model, probe, settings)
        )
    except UnsupportedAttentionError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return f"a trial of it failed: {type(error).__name__}: {first_line(error)}"
    distances[path] = apart
    if apart <= probe.allowed:
        return ""
    return f"a trial gave other log-probabilities (by {apart:.1e} nats a token, allowed {probe.allowed:.0e})"


def asked_of_generate(settings: SamplingParams) -> str:
    """Which options only `generate` has, as a reason; empty where there are none."""
    ours = [name for name, value in settings.generation_kwargs.items() if _HARMLESS.get(name) != value]
    return f"generation_kwargs {', '.join(sorted(ours))} are generate's own" if ours else ""


def _structure(model: nn.Module, settings: SamplingParams, longest_prompt: int | None) -> str:
    """What in the model's architecture stands against forking; empty where nothing does."""
    known = context_of(model)
    context = known if longest_prompt is None else longest_prompt + settings.max_completion_length
    return _objection(model, min(context, known) if known and context else context)


def _objection(model: nn.Module, context: int | None) -> str:
    """The same for rows of so many tokens; None where there is no limit."""
    base: Any = base_of(model)
    config = base.config.get_text_config(decoder=True)
    return next(filter(None, _objections(model, base, config, context)), "")


def _objections(model: Any, base: Any, config: Any, context: int | None) -> Iterator[str]:
    if base.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        yield "it attends to an encoder"
    if is_recurrent(model):
        yield "it carries a recurrent state"
    if not getattr(base, "_supports_attention_backend", False):
        yield f"{type(base).__name__} does not take its attention from AttentionInterface"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        yield "its adapter puts learned tokens before the prompt"
    yield from _window(config, context)
    yield from _moving_rope(config, context)


def _window(config: Any, context: int | None) -> Iterator[str]:
    """Layers that do not keep every token; a window that the context never leaves keeps all."""
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            if context is None or context > layer.sliding_window:
                needed = "an unbounded context" if context is None else f"a context of {context}"
                yield f"a layer sees the last {layer.sliding_window} tokens only, within {needed}"
        elif type(layer) is not DynamicLayer:
            yield f"a layer keeps its past in a {type(layer).__name__}"


def _moving_rope(config: Any, context: int | None) -> Iterator[str]:
    """Rotary frequencies that change with the longest row of a batch, beyond the length they were trained at."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return
    trained: int = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if context is None or context > trained:
        yield f"its rotary frequencies ({rope['rope_type']}) change beyond {trained} tokens"

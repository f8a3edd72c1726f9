"""Which way a model's draws go, and why: the forked cache where it is right, else `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raftune.policies.causal_lm.forked import Forks, NotForkableError
from raftune.policies.causal_lm.models import as_it_was, base_of, context_of, device_of, is_recurrent
from raftune.policies.causal_lm.settings import DrawPath, DrawSettings
from raftune.policies.memory import is_out_of_memory

_HARMLESS = {"use_cache": True}
_TRIAL = ((3, 1, 4, 1, 5), (9, 2, 6))  # two prompts, of unequal length, for the trial
_TRIAL_STEPS = ((5, 3, 5, 8), (9, 7, 9, 3))  # what its four rows are fed
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
_CLOSE_IN_HALF = 0.1


def draw_path(model: nn.Module, settings: DrawSettings, longest_prompt: int | None = None) -> tuple[DrawPath, str]:
    """`forked` or `generate`, and the reason in words.

    `longest_prompt` (tokens) tells how much context is needed; without it, all that the model has. The last check is a
    trial: a few tokens through the forked cache must give the logits of the model's own forward.
    """
    reason = asked_of_generate(settings) or _structure(model, settings, longest_prompt) or _trial(model)
    return ("generate", reason) if reason else ("forked", "every layer caches keys and values of all tokens")


def asked_of_generate(settings: DrawSettings) -> str:
    """Which options only `generate` has, as a reason; empty where there are none."""
    ours = [name for name, value in settings.generation_kwargs.items() if _HARMLESS.get(name) != value]
    return f"generation_kwargs {', '.join(sorted(ours))} are generate's own" if ours else ""


def _structure(model: nn.Module, settings: DrawSettings, longest_prompt: int | None) -> str:
    """What in the model's architecture stands against forking; empty where nothing does."""
    base: Any = base_of(model)
    config = base.config.get_text_config(decoder=True)
    known = context_of(model)
    context = known if longest_prompt is None else longest_prompt + settings.max_completion_length
    context = min(context, known) if known and context else context
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


def _trial(model: nn.Module) -> str:
    """Compares the forked cache's logits with the model's own on a few tokens; empty where they agree."""
    try:
        ours, own = _trial_logits(model)
    except NotForkableError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        return f"a trial of the forked cache failed: {type(error).__name__}: {first_line}"
    apart, close = _apart(ours, own), _CLOSE.get(own.dtype, _CLOSE_IN_HALF)
    if apart <= close:
        return ""
    return f"a trial of the forked cache gave other logits (relative distance {apart:.1e}, allowed {close:.0e})"


def _trial_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Logits (2 rows a prompt, 3 positions, V) of the forked cache, and of whole sequences without a cache."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [[token % vocabulary for token in prompt] for prompt in _TRIAL]
    steps = [[token % vocabulary for token in step] for step in _TRIAL_STEPS]
    with torch.inference_mode(), as_it_was(model):
        forks = Forks(model)
        ours = [forks.admit(prompts, [2, 2], len(steps))]
        ours += [forks.step(torch.tensor(step)) for step in steps]
        own = []
        for row, prompt in enumerate(np.repeat(np.arange(2), 2)):
            ids = torch.tensor([prompts[prompt] + [step[row] for step in steps]], device=device_of(model))
            own.append(model(input_ids=ids, use_cache=False, return_dict=True).logits[0, -3:])
    return torch.stack(ours, dim=1), torch.stack(own)


def _apart(ours: Tensor, own: Tensor) -> float:
    """Distance of the logits relative to their spread over the vocabulary; a shift of all of them means nothing."""
    ours, own = (logits.double().cpu() - logits.double().cpu().mean(-1, keepdim=True) for logits in (ours, own))
    return float((ours - own).norm() / own.norm().clamp(min=1e-12))

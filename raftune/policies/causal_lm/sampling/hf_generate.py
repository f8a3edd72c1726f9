"""Generation with transformers' `generate`, for what the shared-prefix cache does not support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from raftune.arrays import IntArray
from raftune.errors import ConfigError
from raftune.policies.causal_lm.loading import base_of, device_of, evaluating
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.store import partial
from raftune.training.checkpoints import holds_no_code


class _SeededChoice(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row one token, chosen by its own noise, which greedy search must take; stops when all have ended."""

    def __init__(self, batch: CompletionBatch, rows: IntArray) -> None:
        self._batch = batch
        self._rows = rows
        self._ended = np.zeros(len(rows), dtype=bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        alive = np.flatnonzero(~self._ended)
        at = torch.from_numpy(alive).to(scores.device)
        tokens, self._ended[alive] = self._batch.extend(self._rows[alive], scores[at])
        only = torch.full_like(scores, -torch.inf)
        only[:, self._batch.settings.pad_id] = 0
        only[at] = torch.full_like(scores[at], -torch.inf).scatter_(1, tokens[:, None].to(scores.device), 0)
        return only

    def all_ended(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.from_numpy(self._ended.copy()).to(input_ids.device)


def is_recurrent(model: nn.Module) -> bool:
    """True where a layer carries a state from token to token, or may: padding on the left would enter it."""
    base = base_of(model)
    if getattr(base, "_is_stateful", False):
        return True
    try:
        return any(DynamicCache(config=base.config).is_linear)
    except (AttributeError, KeyError, TypeError, ValueError):
        return True


def hf_generate(model: nn.Module, batch: CompletionBatch, one_by_one: bool = False) -> None:
    """Fills `batch` through `generate`, with each sample's own noise, or as `generation_kwargs` want it."""
    if batch.settings.needs_generate:
        generate_with_kwargs(model, batch)
        return
    size = 1 if one_by_one else batch.settings.batch_size
    lengths = np.array([len(prompt) for prompt in batch.prompts])[batch.prompt_of]
    with _own_defaults(model) as generate:
        for rows in _unfinished(batch, _alike(model, batch.limits, lengths, size)):
            choice = _SeededChoice(batch, rows)
            ids, mask = _left_padded([batch.prompts[i] for i in batch.prompt_of[rows]], batch.settings.pad_id)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=int(batch.limits[rows[0]]),
                pad_token_id=batch.settings.pad_id,
                use_cache=True,
            )
            generate(
                input_ids=ids.to(device_of(model)),
                attention_mask=mask.to(device_of(model)),
                generation_config=config,
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList([choice.all_ended]),
            )


def generate_with_kwargs(model: Any, batch: CompletionBatch) -> None:
    """Fills `batch` as `generate` samples with the user's own `generation_kwargs` (beam search, for one).

    Each batch is seeded from its first sample, so a sample can be repeated, but noise is not the sample's own. The K
    completions of a prompt are the K sequences that `generate` returns: under beam search they are not independent.
    Raises ConfigError where `generate` does not take the options.
    """
    groups, settings, device = batch.groups(), batch.settings, device_of(model)
    cuda = sorted({weight.device.index for weight in model.parameters() if weight.device.type == "cuda"})
    with _own_defaults(model) as generate, torch.random.fork_rng(cuda):
        for prompts in _unfinished(batch, _prompt_batches(model, batch, groups)):
            rows = np.concatenate([groups[prompt] for prompt in prompts])
            torch.manual_seed(batch.seed(int(rows[0])))
            limit, count = int(batch.limits[rows[0]]), len(rows) // len(prompts)
            ids, mask = _left_padded([batch.prompts[i] for i in prompts], settings.pad_id)
            try:
                sequences: Tensor = generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), **_options(batch, count, limit)
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    "sampling.generation_kwargs must be options that `generate` takes together with the rest of "
                    f"sampling; got {dict(settings.generation_kwargs)} and num_generations {count}: {error}"
                ) from error
            for row, sequence in zip(rows.tolist(), sequences[:, ids.shape[1] :].tolist(), strict=True):
                ends = (at + 1 for at, token in enumerate(sequence) if token in settings.eos_ids)
                cut = sequence[: min(next(ends, len(sequence)), int(batch.limits[row]))]  # without padding after EOS
                batch.record(row, cut, _log_probs(model, batch.prompts[batch.prompt_of[row]], cut))


def _unfinished(batch: CompletionBatch, parts: Iterator[IntArray]) -> Iterator[IntArray]:
    """The parts that an earlier attempt at this chunk has not finished; each is saved where that is due."""
    with partial.current("generate").work() as part:
        ready = 0
        if (path := part.find()) is not None and holds_no_code(path):
            state = torch.load(path, weights_only=True)
            batch.restore(state["answers"])
            ready = state["batches"]
        for number, rows in enumerate(parts, start=1):
            if number > ready:
                yield rows
                state = {"answers": batch.state(), "batches": number}
                done = (batch.ended, batch.rows, "answers")
                part.step(lambda path, state=state: torch.save(state, path), done=done)  # type: ignore[misc]


def _options(batch: CompletionBatch, count: int, limit: int) -> dict[str, Any]:
    """The options of `generate`: our settings, every one explicit, and over them the user's `generation_kwargs`.

    Beam search does not sample unless `do_sample` says so.
    """
    settings, kwargs = batch.settings, dict(batch.settings.generation_kwargs)
    samples = kwargs.pop("do_sample", settings.temperature > 0 and kwargs.get("num_beams", 1) == 1)
    warps = {"temperature": settings.temperature or 1.0, "top_k": settings.top_k, "top_p": settings.top_p}
    if settings.min_p > 0:
        warps["min_p"] = settings.min_p
    return {
        "do_sample": samples,
        "num_return_sequences": count,
        "max_new_tokens": limit,
        "repetition_penalty": settings.repetition_penalty,
        "eos_token_id": list(settings.eos_ids) or None,
        "pad_token_id": settings.pad_id,
        **(warps if samples else {}),
        **kwargs,
    }


def _log_probs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Log-softmax of the raw logits at each id, from one forward over the whole sequence."""
    if not ids:
        return []
    sequence = torch.tensor([[*prompt, *ids]], device=device_of(model))
    logits = model(input_ids=sequence, use_cache=False, return_dict=True).logits[0, -len(ids) - 1 : -1].float()
    chosen = sequence[0, -len(ids) :, None].to(logits.device)
    log_probs: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return log_probs


def _prompt_batches(model: nn.Module, batch: CompletionBatch, groups: list[IntArray]) -> Iterator[IntArray]:
    """Prompts in batches, all of one K and one limit (and length); together they have about `batch_size` rows."""
    lengths = np.array([len(prompt) for prompt in batch.prompts])
    for count in np.unique(batch.counts[batch.counts > 0]):
        prompts = np.flatnonzero(batch.counts == count)
        limits = np.array([batch.limits[groups[prompt][0]] for prompt in prompts])
        size = max(1, batch.settings.batch_size // int(count))
        yield from (prompts[part] for part in _alike(model, limits, lengths[prompts], size))


def _alike(model: nn.Module, limits: IntArray, lengths: IntArray, size: int) -> Iterator[IntArray]:
    """Indices by falling length, in batches of at most `size` that share the limit, and the length where padding on
    the left would disturb the model."""
    keys = np.stack([limits, lengths if is_recurrent(model) else np.zeros_like(lengths)], axis=1)
    for key in np.unique(keys, axis=0):
        alike = np.flatnonzero((keys == key).all(axis=1))
        alike = alike[np.argsort(-lengths[alike], kind="stable")]
        yield from (alike[at : at + size] for at in range(0, len(alike), size))


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of one width: `generate` continues at the right end."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _own_defaults(model: Any) -> Iterator[Any]:
    """The model's `generate`, without the model's own defaults: what we do not set must be off."""
    base = base_of(model)
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        with torch.inference_mode(), evaluating(model):
            yield model.generate
    finally:
        base.generation_config = before

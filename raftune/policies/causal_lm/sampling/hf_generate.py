"""Generation with transformers' `generate`, for what the shared-prefix cache does not support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from raftune.arrays import IntArray
from raftune.errors import ConfigError
from raftune.policies.causal_lm.model_utils import as_it_was, base_of, device_of
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.store import partial
from raftune.training.checkpoints import holds_no_code


class _Choosing(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row one token: the one that its own noise chooses. Greedy search must then take it."""

    def __init__(self, answers: CompletionBatch, rows: IntArray) -> None:
        self._answers = answers
        self._rows = rows
        self.ended = np.zeros(len(rows), dtype=bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        alive = np.flatnonzero(~self.ended)
        at = torch.from_numpy(alive).to(scores.device)
        tokens, self.ended[alive] = self._answers.extend(self._rows[alive], scores[at])
        only = torch.full_like(scores, -torch.inf)
        only[:, self._answers.settings.pad_id] = 0
        only[at] = torch.full_like(scores[at], -torch.inf).scatter_(1, tokens[:, None].to(scores.device), 0)
        return only


class _AllEnded(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, choosing: _Choosing) -> None:
        self._choosing = choosing

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.from_numpy(self._choosing.ended.copy()).to(input_ids.device)


def draw_generated(model: nn.Module, answers: CompletionBatch, same_length: bool, size: int) -> None:
    """Fills `answers` through `generate`, at most `size` rows at once, noise per sample included.

    `same_length` keeps prompts of different lengths apart, for models that padding on the left would disturb.
    """
    settings, device = answers.settings, device_of(model)
    with _ready(model) as generate:
        for rows in _unfinished(answers, _batches(answers, same_length, size)):
            choosing = _Choosing(answers, rows)
            ids, mask = _left_padded([answers.prompts[i] for i in answers.prompt_of[rows]], settings.pad_id)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=int(answers.limits[rows[0]]),
                pad_token_id=settings.pad_id,
                use_cache=True,
            )
            generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([choosing]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(choosing)]),
            )


def draw_by_generate_alone(model: nn.Module, answers: CompletionBatch, same_length: bool) -> None:
    """Fills `answers` as `generate` draws them with the user's own `generation_kwargs` (beam search, for one).

    Each batch is seeded from its first sample, so a sample can be repeated, but noise is not the sample's own. The K
    answers of a prompt are the K sequences that `generate` returns: under beam search they are not independent draws.
    Raises ConfigError where `generate` does not take the options.
    """
    groups = answers.groups()
    with _ready(model) as generate, torch.random.fork_rng(_cuda_devices(model)):
        for prompts in _unfinished(answers, _prompt_batches(answers, groups, same_length)):
            rows = np.concatenate([groups[prompt] for prompt in prompts])
            torch.manual_seed(answers.seed(int(rows[0])))
            found = _found(generate, model, answers, prompts, rows)
            for row, ids in zip(rows, found.tolist(), strict=True):
                cut = _cut(ids, answers, int(row))
                answers.record(int(row), cut, _logprobs(model, answers.prompts[answers.prompt_of[row]], cut))


def _unfinished(answers: CompletionBatch, batches: Iterator[IntArray]) -> Iterator[IntArray]:
    """The batches that an earlier attempt at this chunk has not finished; each is saved where that is due."""
    with partial.current("generate").work() as part:
        ready = 0
        if (path := part.find()) is not None and holds_no_code(path):
            state = torch.load(path, weights_only=True)
            answers.restore(state["answers"])
            ready = state["batches"]
        for number, batch in enumerate(batches, start=1):
            if number > ready:
                yield batch
                state = {"answers": answers.state(), "batches": number}
                done = (answers.ended, answers.rows, "answers")
                part.step(lambda path, state=state: torch.save(state, path), done=done)  # type: ignore[misc]


def _found(generate: Any, model: nn.Module, answers: CompletionBatch, prompts: IntArray, rows: IntArray) -> Tensor:
    """The sequences that `generate` returns, without the prompts: one for each row."""
    options = _options(answers, len(rows) // len(prompts), int(answers.limits[rows[0]]))
    ids, mask = _left_padded([answers.prompts[i] for i in prompts], answers.settings.pad_id)
    device = device_of(model)
    try:
        found: Tensor = generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "sampling.generation_kwargs must be options that `generate` takes together with the rest of sampling; got "
            f"{dict(answers.settings.generation_kwargs)} and num_generations {options['num_return_sequences']}: {error}"
        ) from error
    return found[:, ids.shape[1] :]


def _options(answers: CompletionBatch, count: int, limit: int) -> dict[str, Any]:
    """What `generate` is told: our settings, every one explicit, and over them the user's `generation_kwargs`.

    Beam search does not sample unless `do_sample` says so.
    """
    settings = answers.settings
    asked = dict(settings.generation_kwargs)
    samples = asked.pop("do_sample", settings.temperature > 0 and asked.get("num_beams", 1) == 1)
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
        **asked,
    }


def _cut(ids: list[int], answers: CompletionBatch, row: int) -> list[int]:
    """What `generate` generated, without what it filled up with after an EOS."""
    ends = (at + 1 for at, token in enumerate(ids) if token in answers.settings.eos_ids)
    return ids[: min(next(ends, len(ids)), int(answers.limits[row]))]


def _logprobs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Log-softmax of the raw logits at each id, from one forward over the whole sequence."""
    if not ids:
        return []
    sequence = torch.tensor([[*prompt, *ids]], device=device_of(model))
    logits = model(input_ids=sequence, use_cache=False, return_dict=True).logits[0, -len(ids) - 1 : -1].float()
    chosen = sequence[0, -len(ids) :, None].to(logits.device)
    logprobs: list[float] = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return logprobs


def _batches(answers: CompletionBatch, same_length: bool, size: int) -> Iterator[IntArray]:
    """Rows in batches, all of one limit (and of one prompt length, where that is asked)."""
    lengths = np.array([len(prompt) for prompt in answers.prompts])[answers.prompt_of]
    yield from _alike(answers.limits, lengths, same_length, size)


def _prompt_batches(answers: CompletionBatch, groups: list[IntArray], same_length: bool) -> Iterator[IntArray]:
    """Prompts in batches, all of one K and one limit (and length); together they have about `batch_size` rows."""
    lengths = np.array([len(prompt) for prompt in answers.prompts])
    for count in np.unique(answers.counts[answers.counts > 0]):
        prompts = np.flatnonzero(answers.counts == count)
        limits = np.array([answers.limits[groups[prompt][0]] for prompt in prompts])
        size = max(1, answers.settings.batch_size // int(count))
        yield from (prompts[batch] for batch in _alike(limits, lengths[prompts], same_length, size))


def _alike(limits: IntArray, lengths: IntArray, same_length: bool, size: int) -> Iterator[IntArray]:
    """Indices by falling length, in batches of at most `size` that share the limit (and the length)."""
    keys = np.stack([limits, lengths if same_length else np.zeros_like(lengths)], axis=1)
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
def _ready(model: Any) -> Iterator[Any]:
    """The model's `generate`, without the model's own defaults: what we do not set must be off."""
    base = base_of(model)
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        with torch.inference_mode(), as_it_was(model):
            yield model.generate
    finally:
        base.generation_config = before


def _cuda_devices(model: nn.Module) -> list[int]:
    """The devices whose random state `generate` moves, beside the CPU's."""
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})

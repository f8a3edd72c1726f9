"""Estimates memory and disk: weights, gradients, optimizer, cache. Activations are not counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.config.policy import CausalLMPolicy
from raftune.config.run import RunConfig
from raftune.planning.amounts import RoundAmounts
from raftune.store.partial import SAVE_EVERY

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
ADAM = 2  # moments for each trained weight
PER_TOKEN = 12  # on disk: an id, a log-probability, and the text, before compression
LOGITS = 16  # bytes of a logit while a token is chosen: the logit, its share in float32, and sums in float64
PER_SAMPLE = 200  # identity, scores and verdict


@dataclass(frozen=True)
class ModelFootprint:
    """The model in numbers: parameters, those that are trained, bytes of one weight, and of one token in the cache."""

    architecture: str
    parameters: int
    trained: int
    dtype: str
    weight: int
    cached_token: int
    trained_weight: int  # bytes; those of an adapter are float32 over a model of any dtype
    vocabulary: int
    context: int | None
    device: str


def footprint(config: CausalLMPolicy, start: Path, facts: dict[str, Any]) -> ModelFootprint:
    """The footprint of an initial model that was checked before; `facts` is what the check found."""
    from raftune.policies.causal_lm import loading
    from raftune.training.devices import choose_device

    found = loading.model_config(config, start)
    dtype = str(facts["dtype"])
    return ModelFootprint(
        architecture=facts["architecture"],
        parameters=facts["parameters"],
        trained=trained_parameters(config, found, facts["parameters"]),
        dtype=dtype,
        weight=BYTES.get(dtype, 4),
        cached_token=cached_token(found.get_text_config(decoder=True), BYTES.get(dtype, 4)),
        trained_weight=BYTES.get(dtype, 4) if config.adapter is None else 4,
        vocabulary=facts["vocabulary"],
        context=facts["context"],
        device=str(choose_device(config.device)),
    )


def unread_facts(config: CausalLMPolicy, start: Path) -> dict[str, Any] | None:
    """Facts about an initial model whose weights were not read; None where its folder does not name one yet."""
    import torch
    from transformers import AutoModelForCausalLM

    from raftune.policies.causal_lm import loading

    if loading.read_reference(start) is None:
        return None
    found = loading.model_config(config, start)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
    dtype = config.dtype if config.dtype != "auto" else found.dtype or "float32"
    return {
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "context": loading.context(found),
        "dtype": str(dtype).removeprefix("torch."),
    }


def cached_token(found: Any, size: int) -> int:
    """Bytes that keys and values of one token take in all layers; 0 where the architecture does not say."""
    layers, heads = getattr(found, "num_hidden_layers", 0), getattr(found, "num_attention_heads", 0)
    if not layers or not heads:
        return 0
    width = getattr(found, "head_dim", None) or found.hidden_size // heads
    return int(2 * layers * (getattr(found, "num_key_value_heads", None) or heads) * width * size)


def trained_parameters(config: CausalLMPolicy, found: Any, total: int) -> int:
    """How many weights are trained: all, or those of the adapter, counted on a model without memory."""
    if config.adapter is None:
        return total
    import torch
    from transformers import AutoModelForCausalLM

    from raftune.policies.causal_lm.loading import fresh_adapter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
        adapted = fresh_adapter(model, config.adapter, 0)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


@dataclass(frozen=True)
class TextMemory:
    """Bytes at the two peaks, one model in memory at a time: generating (weights and cache) and training."""

    weights: int
    cache: int
    trained_state: int  # gradients and the optimizer's moments

    @property
    def drawing(self) -> int:
        return self.weights + self.cache

    @property
    def training(self) -> int:
        return self.weights + self.trained_state


def memory(model: ModelFootprint, config: RunConfig, longest_prompt: int, rows: int) -> TextMemory:
    """The memory with at most `rows` samples to generate at once."""
    length = longest_prompt + config.sampling.max_completion_length
    length = min(length, model.context) if model.context else length
    alive = min(config.sampling.batch_size, rows)
    four_bits = getattr(config.policy, "load_in_4bit", False)
    return TextMemory(
        weights=model.parameters // 2 if four_bits else model.parameters * model.weight,
        cache=alive * length * model.cached_token,
        trained_state=model.trained * model.trained_weight * (1 + ADAM),
    )


@dataclass(frozen=True)
class MeasuredPeak:
    """Bytes that the process (on a GPU: its tensors) took at most, and before; the rows, and tokens of each answer."""

    most: int
    before: int
    rows: int
    tokens: float


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes that generating and training took in the probe, and what they will take in the run at most; None: not
    known.
    """

    drawing: int | None
    training: int | None
    run_drawing: int | None
    run_tuning: int | None


def peaks(
    drawing: MeasuredPeak | None,
    training: MeasuredPeak | None,
    model: ModelFootprint | None,
    config: RunConfig,
    prompt: int,
    rows: int,
) -> MemoryPeaks:
    """What was measured, and, of a language model, what it comes to with `rows` samples to generate, prompts of
    `prompt` tokens, and answers of the full length: the cache, the logits and the activations grow, the rest is
    there."""
    tried_drawing, tried_tuning = drawing.most if drawing else None, training.most if training else None
    run_drawing, run_tuning = tried_drawing, tried_tuning
    if model is not None:
        longest = prompt + config.sampling.max_completion_length
        longest = min(longest, model.context) if model.context else longest
        if drawing is not None:
            alive = min(config.sampling.batch_size, rows)
            cached = alive * longest - drawing.rows * (prompt + drawing.tokens)
            logits = (alive - drawing.rows) * model.vocabulary * LOGITS
            run_drawing = drawing.most + int(max(0, cached) * model.cached_token + max(0, logits))
        if training is not None:
            batch = config.training.per_device_train_batch_size
            held = model.parameters * model.weight + model.trained * model.trained_weight * (1 + ADAM)
            activations = max(0, training.most - training.before - held)
            times = batch * longest / max(1.0, training.rows * (prompt + training.tokens))
            run_tuning = training.most + int(activations * max(0.0, times - 1))
    return MemoryPeaks(tried_drawing, tried_tuning, run_drawing, run_tuning)


@dataclass(frozen=True)
class DiskForecast:
    """Bytes: the models that are kept, the checkpoints while a round is trained, the samples (of text at most, of
    images about), the latents that images are learned by."""

    models: int
    checkpoints: int
    samples: int
    latents: int = 0

    @property
    def total(self) -> int:
        return self.models + self.checkpoints + self.samples + self.latents


def takes_checkpoints(config: RunConfig, planned: RoundAmounts, fit: float | None) -> bool:
    """Whether a fit that takes `fit` seconds (None: not known) leaves checkpoints before it is done."""
    by_steps = config.training.save_steps is not None and planned.steps > config.training.save_steps
    return by_steps or (planned.steps > 1 and (fit is None or fit > SAVE_EVERY))


def disk(
    model: ModelFootprint | None,
    config: RunConfig,
    planned: RoundAmounts,
    picture: float | None = None,
    fit: float | None = None,
) -> DiskForecast:
    """What the run writes; a family without tokens writes next to nothing for its models.

    `image`: bytes of a sample of a family of images, where some were generated. `fit`: seconds of a round's fit.
    """
    stored = {"all": planned.rounds, "best": min(3, planned.rounds), "last": min(2, planned.rounds)}[config.keep_models]
    one = model.trained * model.trained_weight if model else 0
    tokens = config.sampling.max_completion_length if model else 1
    every = planned.samples + planned.rounds * (planned.competing - planned.drawn)
    checkpoint = one * (1 + ADAM) if takes_checkpoints(config, planned, fit) else 0
    content = tokens * PER_TOKEN if picture is None else picture
    return DiskForecast(stored * one, 2 * checkpoint, int(every * (content + PER_SAMPLE)))

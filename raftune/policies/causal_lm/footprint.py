"""What a language model takes: weights, gradients, optimizer, cache. Activations are not counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from raftune.config.policy import CausalLMPolicy
from raftune.config.run import RunConfig
from raftune.policies.footprint import (
    ADAM,
    BYTES,
    PER_TOKEN,
    Footprint,
    MeasuredPeak,
    MemoryPeaks,
    RoundAmounts,
    in_short,
)
from raftune.policies.model_files import read_reference
from raftune.sanitize import megabytes

FOUR_BITS = 0.516  # bytes of a weight in NF4 with double quantisation, its share of the scales included
LOGITS = 16  # bytes of a logit while a token is chosen: the logit, its share in float32, and sums in float64


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

    def describe(self) -> str:
        return (
            f"generating {megabytes(self.drawing)} (weights {megabytes(self.weights)}, cache "
            f"{megabytes(self.cache)}), training {megabytes(self.training)} (with gradients and optimizer); "
            "activations and reward models come on top"
        )


@dataclass(frozen=True)
class ModelFootprint(Footprint):
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
    in_four_bits: int = 0  # of the parameters

    model_key: ClassVar[str] = "model"
    memory_key: ClassVar[str] = "memory"
    counts_tokens: ClassVar[bool] = True

    @classmethod
    def of(cls, policy: Any, start: Path, facts: Any) -> ModelFootprint:
        from raftune.policies.causal_lm import loading
        from raftune.training.devices import choose_device

        config, dtype = policy.config.policy, str(facts["dtype"])
        model, weight = loading.model_config(config, start), BYTES.get(dtype, 4)
        text = model.get_text_config(decoder=True)
        layers, heads = getattr(text, "num_hidden_layers", 0), getattr(text, "num_attention_heads", 0)
        cached_token = 0  # where the architecture does not say
        if layers and heads:
            width = getattr(text, "head_dim", None) or text.hidden_size // heads
            cached_token = int(2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * width * weight)
        trained = facts["parameters"]
        if config.adapter is not None:
            trained = sum(w.numel() for w in _without_memory(config, model, True).parameters() if w.requires_grad)
        return ModelFootprint(
            architecture=facts["architecture"],
            parameters=facts["parameters"],
            trained=trained,
            dtype=dtype,
            weight=weight,
            cached_token=cached_token,
            trained_weight=weight if config.adapter is None else 4,
            vocabulary=facts["vocabulary"],
            context=facts["context"],
            device=str(choose_device(config.device)),
            in_four_bits=_quantised(_without_memory(config, model, False)) if config.load_in_4bit else 0,
        )

    @classmethod
    def unread_facts(cls, config: RunConfig, start: Path) -> dict[str, Any] | None:
        """The facts in the model's configuration; None where the start's folder does not name a model yet."""
        from raftune.policies.causal_lm import loading

        policy = config.policy
        if not isinstance(policy, CausalLMPolicy) or read_reference(start) is None:
            return None
        model_config = loading.model_config(policy, start)
        model = _without_memory(policy, model_config, False)
        dtype = policy.dtype if policy.dtype != "auto" else model_config.dtype or "float32"
        return {
            "architecture": type(model).__name__,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "vocabulary": model.get_input_embeddings().weight.shape[0],
            "context": loading.context(model_config),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def describe(self, family: str) -> str:
        trained = "all trained" if self.trained == self.parameters else f"{in_short(self.trained)} trained (LoRA)"
        context = f", context {self.context}" if self.context else ""
        size = f"{in_short(self.parameters)} parameters, {trained}"
        return f"{self.architecture}, {size}, {self.dtype} on {self.device}{context}"

    def describe_work(self, config: RunConfig, planned: RoundAmounts, tokens: float | None) -> str:
        now = (
            f", about {int(planned.samples * tokens):,} if completions stay as long as now"
            if tokens is not None
            else ""
        )
        return f"at most {planned.samples * config.sampling.max_completion_length:,} tokens{now}"

    def remarks(self, config: RunConfig, longest: int | None) -> list[str]:
        """Completions that the model's context cuts off before max_completion_length does."""
        if self.context is None or longest is None:
            return []
        room, longest_completion = self.context - longest, config.sampling.max_completion_length
        if room >= longest_completion:
            return []
        return [
            f"the longest prompt leaves room for {room} tokens in the context of {self.context}, less than "
            f"sampling.max_completion_length = {longest_completion}: such completions end there"
        ]

    def length(self, config: RunConfig, prompt: int) -> int:
        """Tokens of a prompt of so many with the longest completion."""
        length = prompt + config.sampling.max_completion_length
        return min(length, self.context) if self.context else length

    def memory(self, config: RunConfig, longest_prompt: int = 0, rows: int = 0) -> TextMemory:
        alive = min(config.sampling.batch_size, rows)
        return TextMemory(
            weights=self.held,
            cache=alive * self.length(config, longest_prompt) * self.cached_token,
            trained_state=self.saved * (1 + ADAM),
        )

    def peaks(
        self, drawing: MeasuredPeak | None, training: MeasuredPeak | None, config: RunConfig, prompt: int, rows: int
    ) -> MemoryPeaks:
        """What was measured, and what it comes to with `rows` samples to generate, prompts of `prompt` tokens, and
        completions of the full length: the cache, the logits and the activations grow, the rest is there."""
        longest = self.length(config, prompt)
        run_drawing = run_training = None
        if drawing is not None:
            alive = min(config.sampling.batch_size, rows)
            cached = alive * longest - drawing.rows * (prompt + drawing.tokens)
            logits = (alive - drawing.rows) * self.vocabulary * LOGITS
            run_drawing = drawing.most + int(max(0, cached) * self.cached_token + max(0, logits))
        if training is not None:
            batch = config.training.per_device_train_batch_size
            held = self.held + self.saved * (1 + ADAM)
            activations = max(0, training.most - training.before - held)
            times = batch * longest / max(1.0, training.rows * (prompt + training.tokens))
            run_training = training.most + int(activations * max(0.0, times - 1))
        return MemoryPeaks(
            drawing.most if drawing else None, training.most if training else None, run_drawing, run_training
        )

    @property
    def held(self) -> int:
        """Bytes of the weights in memory."""
        return int((self.parameters - self.in_four_bits) * self.weight + self.in_four_bits * FOUR_BITS)

    @property
    def saved(self) -> int:
        return self.trained * self.trained_weight

    def sample_bytes(self, config: RunConfig, planned: RoundAmounts, sample: float | None) -> tuple[int, int]:
        content = config.sampling.max_completion_length * PER_TOKEN if sample is None else sample
        return super().sample_bytes(config, planned, content)


def _quantised(model: Any) -> int:
    """Parameters that QLoRA holds in 4 bits: those of linear layers, the output layer left out."""
    from torch.nn import Linear

    layers = (module for module in model.modules() if isinstance(module, Linear))
    return sum(layer.weight.numel() for layer in layers if layer is not model.get_output_embeddings())


def _without_memory(config: CausalLMPolicy, model_config: Any, adapted: bool) -> Any:
    """The model on the meta device, with a new adapter where `adapted`."""
    import torch
    from transformers import AutoModelForCausalLM

    from raftune.policies.causal_lm.loading import fresh_adapter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
        return fresh_adapter(model, config.adapter, 0) if adapted and config.adapter is not None else model

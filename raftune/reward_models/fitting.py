"""Trains a reward model: TRL's RewardTrainer on pairs, transformers' Trainer on ratings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.trainer.utils import disable_dropout_in_model

from raftune.arrays import FloatArray
from raftune.config.policy import AdapterConfig
from raftune.config.reward_model import RewardModelConfig, rate_for
from raftune.errors import ConfigError, ModelError, OutOfMemory
from raftune.protocols import Callback
from raftune.reward_models.examples import FeedbackExample, FeedbackKind
from raftune.sanitize import first_line
from raftune.store import interruption
from raftune.training.checkpoints import STATE, CheckpointCallback, newest_verified
from raftune.training.length_grouping import LengthGroupedSampler
from raftune.training.quiet import quiet

IDENTITY = "reward model"  # its folder is refused to another configuration and to other rows
NEVER = 2**31 - 1  # steps between checkpoints, where time alone decides


@dataclass(frozen=True)
class RatingScale:
    """Ratings are learned as standard deviations from their mean, so that a head without bias can express them."""

    mean: float
    std: float

    @classmethod
    def of(cls, examples: Sequence[FeedbackExample]) -> RatingScale:
        ratings = ratings_of(examples)
        return cls(float(ratings.mean()), float(ratings.std()))

    def standard(self, ratings: FloatArray) -> FloatArray:
        """The ratings as standard deviations from the mean."""
        return (ratings - self.mean) / self.std


def ratings_of(examples: Sequence[FeedbackExample]) -> FloatArray:
    """(N,) ratings, of rated examples."""
    return np.array([one.rating for one in examples], dtype=np.float64)


@dataclass(frozen=True)
class RewardFit:
    """The trained model, an adapter merged; the loss of each step, in nats per pair or squared deviations."""

    model: Any
    losses: tuple[float, ...]
    learning_rate: float


class OrderedTrainer:
    """What both trainers share: our order of rows, a stop at the first loss that is not finite, losses by step."""

    lengths: Sequence[int]
    args: Any
    state: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(self.lengths, step, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not math.isfinite(value := loss.item()):
            raise ModelError(not_finite(f"The loss of step {self.state.global_step + 1}", value))
        self.state.log_history.append({"step": self.state.global_step + 1, "part": value})
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: a checkpoint is no model to publish."""


class PairTrainer(OrderedTrainer, RewardTrainer):  # type: ignore[misc]
    """-log sigmoid(r_chosen - r_rejected), the mean over pairs (Bradley and Terry, 1952)."""


class RatingTrainer(OrderedTrainer, Trainer):  # type: ignore[misc]
    """The mean of squared differences between the score and the rating in standard deviations."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets_B = inputs.pop("targets")
        outputs = model(**inputs)
        loss = torch.nn.functional.mse_loss(outputs.logits.squeeze(-1).float(), targets_B)
        return (loss, outputs) if return_outputs else loss


class StepCallback(CheckpointCallback):
    """Reports each optimizer step."""

    def __init__(self, observe: Callback, nbytes: int) -> None:
        super().__init__(IDENTITY, nbytes)
        self.observe = observe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.observe("progress", {"done": state.global_step, "of": state.max_steps})
        super().on_step_end(args, state, control)


def fit(
    config: RewardModelConfig,
    objective: FeedbackKind,
    load: Callable[[], Any],
    tokenizer: Any,
    examples: Sequence[FeedbackExample],
    work: Path,
    observe: Callback,
) -> RewardFit:
    """The model fitted to the examples, going on from the newest checkpoint under `work`.

    Equal settings and rows give equal weights on a CPU, interrupted or not. Raises ModelError where a loss or a weight
    is not finite, OutOfMemory, and ConfigError for settings that the trainer does not take.
    """
    model = load()
    cached = getattr(model.config, "use_cache", None)
    model, rate = prepared(config, model)
    trainer = build(config, objective, model, tokenizer, examples, work, rate)
    trainer.lengths = [max(len(ids) for ids in one.ids) for one in examples]
    steps = StepCallback(observe, checkpoint_bytes(model))
    trainer.add_callback(steps)
    checkpoint, rejected = newest_verified(work, IDENTITY, STATE)
    for name in rejected:
        observe("said", {"words": f"{name} did not verify and was not used"})
    try:
        with quiet(), interruption.stretch(steps.promise):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"Memory did not suffice for {config.per_device_train_batch_size} rows: halve per_device_train_batch_size "
            "and double gradient_accumulation_steps; or lower max_length, or set gradient_checkpointing: true.",
            config.per_device_train_batch_size,
        ) from error
    trained = trainer.accelerator.unwrap_model(trainer.model)
    refuse_non_finite(trained)
    if config.adapter is not None:
        with quiet():
            trained = trained.merge_and_unload()
    if cached is not None:  # Trainer switches it off in the configuration, which is saved with the model
        trained.config.use_cache = cached
    return RewardFit(trained.cpu().eval(), losses_of(trainer.state), rate)


def prepared(config: RewardModelConfig, model: Any) -> tuple[Any, float]:
    """The model with its adapter, where one is asked for, and the peak rate for what is trained."""
    if config.disable_dropout:
        disable_dropout_in_model(model)
    if config.adapter is not None:
        from peft import get_peft_model

        with quiet():  # peft calls what transformers deprecates
            model = get_peft_model(model, lora(config.adapter))
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return model, config.learning_rate or rate_for(trained, config.adapter is not None)


def checkpoint_bytes(model: Any) -> int:
    """About how much a checkpoint writes: all weights, and two moments of each that is trained."""
    weights = list(model.parameters())
    return int(sum(weight.nbytes for weight in weights) + 2 * sum(w.nbytes for w in weights if w.requires_grad))


def lora(adapter: AdapterConfig) -> Any:
    """The adapter for peft, which trains the head whole."""
    from peft import LoraConfig

    named = adapter.target_modules
    return LoraConfig(
        task_type="SEQ_CLS",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=named if isinstance(named, str) else list(named),
        modules_to_save=list(adapter.modules_to_save) or None,
    )


def build(
    config: RewardModelConfig,
    objective: FeedbackKind,
    model: Any,
    tokenizer: Any,
    examples: Sequence[FeedbackExample],
    work: Path,
    rate: float,
) -> Any:
    """The trainer for the objective. Raises ConfigError."""
    try:
        with quiet():
            if objective == "pairwise":
                rows = {
                    "chosen_ids": [one.ids[0] for one in examples],
                    "rejected_ids": [one.ids[1] for one in examples],
                }
                own: dict[str, Any] = {"max_length": None, "disable_dropout": False, "pad_to_multiple_of": None}
                own |= {"center_rewards_coefficient": config.center_rewards_coefficient}
                args = alone(RewardConfig(**arguments(config, work, rate), **own))
                data = Dataset.from_dict(rows)
                return silent(PairTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer))
            args = alone(TrainingArguments(**arguments(config, work, rate)))
            targets = RatingScale.of(examples).standard(ratings_of(examples))
            rated = [{"ids": one.ids[0], "target": float(y)} for one, y in zip(examples, targets, strict=True)]
            collate = PaddingCollator(tokenizer.pad_token_id)
            return silent(RatingTrainer(model=model, args=args, train_dataset=rated, data_collator=collate))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the settings must be what transformers' Trainer takes: {first_line(error)}") from error


@dataclass(frozen=True)
class PaddingCollator:
    """Rows side by side, padded on the right."""

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["ids"]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": padded(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": padded([torch.ones_like(one) for one in ids], batch_first=True),
            "targets": torch.tensor([row["target"] for row in rows], dtype=torch.float32),
        }


def arguments(config: RewardModelConfig, work: Path, rate: float) -> dict[str, Any]:
    """What both trainers are told."""
    names = (
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type "
        "warmup_steps weight_decay max_grad_norm seed bf16 gradient_checkpointing"
    )
    return {
        **{name: getattr(config, name) for name in names.split()},
        "output_dir": str(work),
        "learning_rate": rate,
        "use_cpu": config.device == "cpu",
        "save_strategy": "steps",
        "save_steps": config.save_steps or NEVER,
        "save_total_limit": 2,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": config.device != "cpu" and torch.cuda.is_available(),
    }


def alone(args: Any) -> Any:
    """The arguments for one process on one device: without a launcher Trainer would take all GPUs."""
    if args.world_size > 1:
        raise ConfigError(
            f"A reward model is trained by one process; a launcher began {args.world_size}. Start raftune without it."
        )
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def silent(trainer: Any) -> Any:
    """The trainer without the callbacks that write to stdout, which belongs to results."""
    for name in ("PrinterCallback", "ProgressCallback"):
        for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == name]:
            trainer.remove_callback(callback)
    return trainer


def losses_of(state: Any) -> tuple[float, ...]:
    """The loss of each optimizer step: Trainer has divided that of each micro-batch by their number."""
    steps: dict[int, float] = {}
    for entry in state.log_history:
        if "part" in entry:
            steps[entry["step"]] = steps.get(entry["step"], 0.0) + entry["part"]
    return tuple(steps.values())


def refuse_non_finite(model: Any) -> None:
    """Raises ModelError if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(not_finite("Every weight", f"a NaN or an infinity in {name}"))


def not_finite(what: str, value: object) -> str:
    return f"{what} must be finite; got {value}. Nothing was saved: lower learning_rate, or look at the rows."

"""Trains a reward model with transformers' Trainer: Bradley-Terry on pairs, regression on ratings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, ProgressCallback, Trainer

from raftune.config.reward_model import RewardModelConfig, rate_for
from raftune.errors import ConfigError, ModelError, OutOfMemory
from raftune.protocols import Callback
from raftune.reward_models.examples import FeedbackExample
from raftune.sanitize import first_line
from raftune.store import interruption
from raftune.training.checkpoints import STATE, CheckpointCallback, newest_verified
from raftune.training.fit import LengthGroupedSampler, trainer_arguments
from raftune.training.quiet import quiet

IDENTITY = "reward model"  # the configuration and the rows of a folder are checked before
NOT_FINITE = "{} must be finite; got {}. Nothing was saved: lower learning_rate, or look at the rows."


class RewardModelTrainer(Trainer):  # type: ignore[misc]
    """Trainer with our order of rows, a stop at the first loss that is not finite, and losses by step.

    Loss of pairs: -log sigmoid(r_chosen - r_rejected), the mean over pairs (Bradley and Terry, 1952), as TRL's
    RewardTrainer computes it. Of ratings: the mean of squared differences in standard deviations.
    """

    def __init__(self, lengths: Sequence[int], center: float | None, **options: Any) -> None:
        super().__init__(**options)
        self.lengths, self.center = lengths, center

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(self.lengths, step, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets_B = inputs.pop("targets", None)
        if targets_B is not None:
            return F.mse_loss(model(**inputs).logits.squeeze(-1).float(), targets_B)
        chosen_B, rejected_B = torch.chunk(model(**inputs, use_cache=False).logits.squeeze(-1), chunks=2)
        loss = -F.logsigmoid(chosen_B - rejected_B).mean()
        if self.center is not None:
            loss += self.center * torch.mean((chosen_B + rejected_B) ** 2)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(value := loss.item()):
            raise ModelError(NOT_FINITE.format(f"The loss of step {self.state.global_step + 1}", value))
        self.state.log_history.append({"step": self.state.global_step + 1, "part": value})
        return loss


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
    load: Callable[[], Any],
    tokenizer: Any,
    examples: Sequence[FeedbackExample],
    targets: Sequence[float] | None,
    work: Path,
    observe: Callback,
) -> tuple[Any, tuple[float, ...], float]:
    """The trained model with an adapter merged, the loss of each step, and the learning rate; resumes under `work`.

    `targets` are the standardised ratings; None for pairs. Equal settings and rows give equal weights on a CPU,
    interrupted or not. Raises ModelError where a loss or a weight is not finite, OutOfMemory, and ConfigError for
    settings that the trainer does not take.
    """
    model = load()
    use_cache = getattr(model.config, "use_cache", None)
    if config.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0
    if config.adapter is not None:
        model = _with_adapter(config, model)
    weights = list(model.parameters())
    trainable = [weight for weight in weights if weight.requires_grad]
    rate = config.learning_rate or rate_for(sum(w.numel() for w in trainable), config.adapter is not None)
    try:
        with quiet():
            trainer = _trainer(config, model, tokenizer, examples, targets, work, rate)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the settings must be what transformers' Trainer takes: {first_line(error)}") from error
    steps = StepCallback(observe, int(sum(w.nbytes for w in weights) + 2 * sum(w.nbytes for w in trainable)))
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
    for name, weight in trained.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(NOT_FINITE.format("Every weight", f"a NaN or an infinity in {name}"))
    if config.adapter is not None:
        with quiet():
            trained = trained.merge_and_unload()
    if use_cache is not None:  # Trainer switches it off in the configuration, which is saved with the model
        trained.config.use_cache = use_cache
    losses: dict[int, float] = defaultdict(float)
    for entry in trainer.state.log_history:  # Trainer has divided the loss of each micro-batch by their number
        if "part" in entry:
            losses[entry["step"]] += entry["part"]
    return trained.cpu().eval(), tuple(losses.values()), rate


def _with_adapter(config: RewardModelConfig, model: Any) -> Any:
    """The model with a LoRA adapter; peft trains the head whole."""
    from peft import LoraConfig, get_peft_model

    assert config.adapter is not None
    targets = config.adapter.target_modules
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=config.adapter.r,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(config.adapter.modules_to_save) or None,
    )
    with quiet():  # peft calls what transformers deprecates
        model = get_peft_model(model, lora)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _trainer(
    config: RewardModelConfig,
    model: Any,
    tokenizer: Any,
    examples: Sequence[FeedbackExample],
    targets: Sequence[float] | None,
    work: Path,
    rate: float,
) -> RewardModelTrainer:
    names = (
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type "
        "warmup_steps weight_decay max_grad_norm seed bf16 gradient_checkpointing"
    )
    args = trainer_arguments(
        "A reward model",
        1,
        work,
        config.save_steps,
        **{name: getattr(config, name) for name in names.split()},
        learning_rate=rate,
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
    )

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        """Rows padded on the right; of pairs all preferred answers, then all others."""
        answers = range(len(examples[0].ids))
        ids = [torch.tensor(examples[row].ids[answer]) for answer in answers for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(text) for text in ids], batch_first=True),
        }
        if targets is not None:
            batch["targets"] = torch.tensor([targets[row] for row in rows], dtype=torch.float32)
        return batch

    trainer = RewardModelTrainer(
        [max(map(len, example.ids)) for example in examples],
        config.center_rewards_coefficient if targets is None else None,
        model=model,
        args=args,
        train_dataset=range(len(examples)),
        data_collator=collate,
        processing_class=tokenizer if targets is None else None,
    )
    for callback in (PrinterCallback, ProgressCallback):  # they write to stdout, which belongs to results
        trainer.remove_callback(callback)
    return trainer

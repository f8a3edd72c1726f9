"""Trains a denoiser on the latents of the kept samples.

Memory: prompts are encoded before the denoiser is loaded, and the initial model, with which the trained one is
compared, is loaded after the trained one was saved and released.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from raftune.config.training import TrainingConfig
from raftune.errors import OutOfMemory
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.ema import MovingAverage
from raftune.policies.diffusion.encoding import PromptEncoder
from raftune.policies.diffusion.loading import FrozenComponents, load_denoiser
from raftune.policies.diffusion.loss import DenoisingLoss, StepCounter
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall
from raftune.policies.diffusion.references import base_record
from raftune.policies.diffusion.rows import ImageRows, batch_of, read_rows
from raftune.policies.diffusion.saving import read_optimizer, write_model
from raftune.policies.diffusion.schedules import refuse_unfit, schedule_of
from raftune.policies.diffusion.weight_change import DenoisingProbe, evidence
from raftune.policies.unsupported import FamilyConfig
from raftune.protocols import TrainReport
from raftune.records import derive_seed
from raftune.training.checkpoints import identity
from raftune.training.fit import FitResult, FitTask, fit
from raftune.training.objectives import load_objective


class TrainablePolicy(Protocol):
    """What of a policy a fit needs; see policy.Diffusion."""

    config: FamilyConfig
    folder: Path
    start_folder: Path
    device: torch.device

    @property
    def frozen(self) -> FrozenComponents: ...
    @property
    def blank(self) -> PipelineAdapter: ...
    @property
    def call(self) -> PipelineCall: ...
    @property
    def latents_shape(self) -> tuple[int, int, int]: ...
    @property
    def encoder(self) -> PromptEncoder: ...
    def bound(self, denoiser: Any) -> PipelineAdapter: ...


class DenoiserModule(torch.nn.Module):
    """A denoiser as transformers' Trainer takes a model: without diffusers' `config`, into which it would write."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trainer's word for diffusers' enable_gradient_checkpointing; its options are transformers' own."""
        self.denoiser.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable


def train(
    policy: TrainablePolicy, rows: Path, work: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[TrainReport, tuple[str, ...]]:
    """Fits the policy to the rows and writes the new model into `out`; returns what was done, and notes for the user.

    Raises DataError for rows that cannot be used, ModelError for what is not finite, OutOfMemory.
    """
    config, shape = policy.config, policy.latents_shape
    found = read_rows(rows, shape)
    seed = derive_seed(config.seed, "tune", found.round)
    denoising = denoising_of(policy, found, shape, seed)
    task = task_of(policy, found, denoising, rows, callbacks)
    fitted = fitted_to(task, config.training, work, policy.device)
    details = {
        "noise_levels": config.training.diffusion.noise_levels,
        "prompts": len(found.prompts),
        "micro_batch": fitted.micro_batch,
        "gradient_accumulation_steps": fitted.accumulation,
        "out_of_memory_at": list(fitted.out_of_memory),
        **published(policy, fitted, DenoisingProbe.of(task.rows, denoising), out),
    }
    return TrainReport(len(found), len(fitted.losses), fitted.losses, details), fitted.notes


def denoising_of(policy: TrainablePolicy, found: ImageRows, shape: tuple[int, int, int], seed: int) -> DenoisingLoss:
    """What the loss is made of, over a denoiser that has no weights yet; here the prompts are encoded."""
    asked = Conditions.joined([policy.encoder.encode(found.prompts), policy.encoder.empty()])
    conditions = policy.blank.guided(asked, policy.call.guidance_scale)
    schedule, config = schedule_of(policy.frozen.pipe, policy.blank.denoiser, shape), policy.config.training.diffusion
    refuse_unfit(schedule, config)
    return DenoisingLoss(policy.blank, schedule, config, conditions, seed, StepCounter())


def task_of(
    policy: TrainablePolicy,
    found: ImageRows,
    denoising: DenoisingLoss,
    rows: Path,
    callbacks: Sequence[TrainerCallback],
) -> FitTask:
    """What the family brings to the fit."""
    training, objective = policy.config.training, load_objective(policy.config.training)
    decay = training.diffusion.ema_decay
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return FitTask(
        load=lambda: trainee(policy),
        rows=found.with_coefficients(training.loss_normalization, step),
        lengths=[1] * len(found),
        collate=batch_of,
        objective=lambda model: partial(objective.loss, denoising.over(policy.bound(model.denoiser))),
        seed=denoising.seed,
        identity=identity(rows, training.model_dump_json(), denoising.seed),
        carried=read_optimizer(policy.folder) if training.optimizer_state == "carried" else None,
        callbacks=[denoising.clock, *callbacks],
        companion=None if decay is None else lambda weights: MovingAverage(weights, decay),
    )


def trainee(policy: TrainablePolicy) -> DenoiserModule:
    """A fresh model, ready to be trained: the adapter alone where there is one, else the whole denoiser."""
    config = policy.config.policy
    denoiser = load_denoiser(config, policy.folder, policy.start_folder, train=True)
    if config.adapter is None:
        denoiser.requires_grad_(True)
    elif not lora.is_adapted(denoiser):
        lora.attach_fresh(denoiser, config.adapter, derive_seed(policy.config.seed, "adapter"))
    keep_labels(denoiser)
    return DenoiserModule(denoiser)


def fitted_to(task: FitTask, training: TrainingConfig, work: Path, device: torch.device) -> FitResult:
    """The fit, with a word about images where not even one fits into memory."""
    try:
        return fit(task, training, work, device)
    except OutOfMemory as error:
        raise OutOfMemory(
            "training.per_device_train_batch_size is 1 and one image does not fit into memory. Set "
            "training.gradient_checkpointing, or training.diffusion.noise_levels: 1, use an adapter, or generate "
            "smaller ones.",
            error.batch_size,
        ) from error


def published(policy: TrainablePolicy, fitted: FitResult, probe: DenoisingProbe, out: Path) -> dict[str, Any]:
    """Writes the model; returns the evidence of what it says of a few rows, beside what the initial model says."""
    trained, rows = policy.bound(fitted.model.denoiser.eval()), fitted.micro_batch
    write_model(trained, out, base_record(policy.start_folder), fitted.optimizer)
    after = probe.said_by(trained, rows)
    if lora.is_adapted(trained.denoiser):
        with lora.switched_off(trained.denoiser):
            return evidence(probe, probe.said_by(trained, rows), after)
    del trained
    fitted.model.denoiser = None  # one large model at a time
    start = load_denoiser(policy.config.policy, policy.start_folder, policy.start_folder, train=False)
    return evidence(probe, probe.said_by(policy.bound(start), rows), after)


def keep_labels(denoiser: Any) -> None:
    """Switches off a class embedding's own dropout: training.diffusion.condition_dropout is the one option for it."""
    for module in denoiser.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0

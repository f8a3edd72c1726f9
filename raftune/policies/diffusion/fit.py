"""Trains a denoiser on the latents of the kept samples.

Memory: prompts are encoded before the denoiser is loaded, and the initial model, with which the trained one is
compared, is loaded after the trained one was saved and released.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from raftune.errors import OutOfMemory
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.loading import load_denoiser
from raftune.policies.diffusion.loss import DenoisingLoss, DenoisingProbe, StepCounter, batch_of, read_rows
from raftune.policies.diffusion.model_folder import base_record
from raftune.policies.diffusion.pipelines.base import Conditions
from raftune.policies.diffusion.saving import read_optimizer, write_model
from raftune.policies.diffusion.schedules import check_schedule_options, schedule_of
from raftune.protocols import TrainReport
from raftune.records import derive_seed
from raftune.training.checkpoints import identity
from raftune.training.fit import FitTask, fit
from raftune.training.objectives import load_objective


class DenoiserModule(torch.nn.Module):
    """A denoiser as transformers' Trainer takes a model: without diffusers' `config`, into which it would write."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Calls diffusers' enable_gradient_checkpointing; Trainer's options for it are transformers' own."""
        self.denoiser.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable


def train(
    policy: Any, rows: Path, work: Path, out: Path, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[TrainReport, tuple[str, ...]]:
    """Trains a policy.Diffusion on the rows and writes the new model into `out`. Returns the report and notes.

    Raises DataError for rows that cannot be used, ModelError for what is not finite, OutOfMemory.
    """
    config, training, shape = policy.config, policy.config.training, policy.latents_shape
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    images = read_rows(rows, shape, training.loss_normalization, step)
    seed = derive_seed(config.seed, "tune", images.round)
    conditions = Conditions.joined([policy.encoder.encode(images.prompts), policy.encoder.empty()])
    conditions = policy.blank.guided(conditions, policy.call.guidance_scale)
    schedule = schedule_of(policy.frozen.pipe, policy.blank.denoiser, shape)
    check_schedule_options(schedule, training.diffusion)
    denoising = DenoisingLoss(policy.blank, schedule, training.diffusion, conditions, seed, StepCounter())
    objective = load_objective(training)
    task = FitTask(
        load=lambda: trainee(policy),
        rows=images.rows,
        lengths=[1] * len(images.rows),
        collate=batch_of,
        objective=lambda model: partial(objective.loss, denoising.over(policy.bound(model.denoiser))),
        seed=seed,
        identity=identity(rows, training.model_dump_json(), seed),
        carried=read_optimizer(policy.folder) if training.optimizer_state == "carried" else None,
        callbacks=[denoising.clock, *callbacks],
        ema_decay=training.diffusion.ema_decay,
    )
    try:
        result = fit(task, training, work, policy.device)
    except OutOfMemory as error:
        raise OutOfMemory(
            "training.per_device_train_batch_size is 1 and one image does not fit into memory. Set "
            "training.gradient_checkpointing, or training.diffusion.noise_levels: 1, use an adapter, or generate "
            "smaller ones.",
            error.batch_size,
        ) from error
    trained = policy.bound(result.model.denoiser.eval())
    write_model(trained, out, base_record(policy.start_folder), result.optimizer)
    probe = DenoisingProbe.of(task.rows, denoising)
    after = probe.predict(trained, result.micro_batch)
    if lora.is_adapted(trained.denoiser):
        with lora.switched_off(trained.denoiser):
            before = probe.predict(trained, result.micro_batch)
    else:
        del trained
        result.model.denoiser = None  # one large model at a time
        start = load_denoiser(config.policy, policy.start_folder, policy.start_folder, train=False)
        before = probe.predict(policy.bound(start), result.micro_batch)
    details = {
        "noise_levels": training.diffusion.noise_levels,
        "prompts": len(images.prompts),
        "micro_batch": result.micro_batch,
        "gradient_accumulation_steps": result.accumulation,
        "out_of_memory_at": list(result.out_of_memory),
        **probe.compare(before, after),
    }
    return TrainReport(len(images.rows), len(result.losses), result.losses, details), result.notes


def trainee(policy: Any) -> DenoiserModule:
    """A fresh model, ready to be trained: the adapter alone where there is one, else the whole denoiser."""
    config = policy.config.policy
    denoiser = load_denoiser(config, policy.folder, policy.start_folder, train=True)
    if config.adapter is None:
        denoiser.requires_grad_(True)
    elif not lora.is_adapted(denoiser):
        lora.attach_fresh(denoiser, config.adapter, derive_seed(policy.config.seed, "adapter"))
    for module in denoiser.modules():  # condition_dropout replaces the dropout of a class embedding's own
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return DenoiserModule(denoiser)

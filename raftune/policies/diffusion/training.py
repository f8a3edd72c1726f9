"""Trains a denoiser on the latents of the kept samples: rows, loss, and what training changed, by noise level.

Randomness is a function of (training seed, step, row): a resumed training uses the same noise, and so does one that had
to halve its micro-batch. Memory: prompts are encoded before the denoiser is loaded, and the initial model, with which
the trained one is compared, is loaded after the trained one was saved and released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import TrainerCallback

from raftune.config.training import SHARING, DiffusionTraining
from raftune.errors import DataError, OutOfMemory
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.images import FIELDS, latents_of
from raftune.policies.diffusion.loading import load_denoiser, write_model
from raftune.policies.diffusion.model_folder import base_record
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter
from raftune.policies.diffusion.schedules import Schedule, check_schedule_options, schedule_of, shares, stratified
from raftune.policies.model_files import read_optimizer
from raftune.protocols import TrainReport
from raftune.records import INVALID, Prompt, derive_seed
from raftune.training.checkpoints import identity
from raftune.training.devices import upload
from raftune.training.fit import FitTask, fit
from raftune.training.objectives import Normalization, coefficients, load_objective, read_weighted

PROBED = 8  # rows at which the trained and the initial denoiser are compared
QUARTERS = 4  # of the noise range


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRow:
    """One image: its number in the fit, the number of its distinct prompt, its coefficient in a step's loss, and its
    clean latents (C, h, w) in the dtype in which they were saved."""

    number: int
    prompt: int
    coefficient: float
    x0: torch.Tensor


@dataclass(frozen=True)
class ImageRows:
    """The images of positive weight, their distinct prompts, and the round that gathered them."""

    rows: list[ImageRow]
    prompts: list[Prompt]
    round: int


def read_rows(path: Path, shape: tuple[int, int, int], normalization: Normalization, step: int) -> ImageRows:
    """The rows of a Parquet file whose latents have this (C, h, w), for a fit whose steps have `step` rows.

    Raises DataError for one that cannot be used.
    """
    columns = ["sample_id", "prompt_id", "prompt", INVALID, *(field.name for field in FIELDS)]
    table, weights, round_ = read_weighted(path, columns)
    used = table.filter(pa.array(weights > 0))
    ids, contents = used.column("prompt_id").to_pylist(), used.column("prompt").to_pylist()
    first: dict[str, int] = {}
    numbers = [first.setdefault(repr(content), len(first)) for content in contents]
    prompts = {number: Prompt(name, content) for number, name, content in zip(numbers, ids, contents, strict=True)}
    latents = [_latents(row, shape) for row in used.drop_columns(["prompt"]).to_pylist()]
    elements = [int(np.prod(shape))] * len(latents)
    # By prompt id, not by text: equal texts asked twice are two prompts.
    shares = coefficients(weights[weights > 0], elements, ids, normalization, step).tolist()
    rows = list(map(ImageRow, range(len(latents)), numbers, shares, latents))
    return ImageRows(rows, list(prompts.values()), round_)


def _latents(row: dict[str, Any], shape: tuple[int, int, int]) -> torch.Tensor:
    """The latents of one row. Raises DataError where there are none, of another shape, or not finite."""
    name = row["sample_id"]
    content, actual, dtype = (row[field.name] for field in FIELDS)
    if content is None or actual is None or dtype is None:
        reason = f" ({row[INVALID]})" if row[INVALID] else ""
        raise DataError(
            f"Every row must have latents to learn from; {name} has none{reason}. "
            "Take a reference image out of its data set; generate a round's image again with `raftune train … --from "
            "generate`."
        )
    if tuple(actual) != shape:
        raise DataError(
            f"Latents must have the shape {shape} of this run's images; those of {name} have {tuple(actual)}. It was "
            "generated at another height or width: generate its round again with `raftune train … --from "
            "generate`, or set sampling.diffusion.height and width to its own."
        )
    try:
        x0 = latents_of(content, actual, dtype)
    except DataError as error:
        raise DataError(f"{name}: {error} Draw its round again with `raftune train … --from generate`.") from error
    if not bool(torch.isfinite(x0.float()).all()):
        raise DataError(f"Latents must be finite; those of {name} hold a NaN or an infinity. Leave the row out.")
    return x0


def batch_of(rows: Sequence[ImageRow]) -> dict[str, Any]:
    """x0 (N, C, h, w) float32, and of each row its coefficient, and (as lists, which stay on the host) its number and
    its prompt."""
    return {
        "x0": torch.stack([row.x0.float() for row in rows]),
        "rows": [row.number for row in rows],
        "prompts": [row.prompt for row in rows],
        "coefficients": torch.tensor([row.coefficient for row in rows], dtype=torch.float32),
    }


# -- the loss ----------------------------------------------------------------------------------------------------------


class StepCounter(TrainerCallback):  # type: ignore[misc]
    """The current optimizer step: the same for all its micro-batches, and after a resume."""

    step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


@dataclass(frozen=True)
class NoiseDraws:
    """The randomness of N rows at L levels each: (N, L) shares, (N, L) prompts left out, (N, L, C, h, w) noise."""

    shares: torch.Tensor
    dropped: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class DenoisingLoss:
    """The denoising loss of a denoiser. The rows of `conditions` are the distinct prompts, then no prompt."""

    adapter: PipelineAdapter
    schedule: Schedule
    config: DiffusionTraining
    conditions: Conditions
    seed: int
    clock: StepCounter

    def draws(self, rows: Sequence[int], shape: Sequence[int]) -> NoiseDraws:
        """The randomness of these rows in the clock's step; latents are of this (C, h, w)."""
        levels, parts = self.config.noise_levels, []
        for row in rows:
            generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, "noise", self.clock.step, row))
            uniform = stratified(1, levels, generator)[0]
            dropped = torch.rand(levels, generator=generator) < self.config.condition_dropout
            noise = torch.randn((levels, *shape), generator=generator)
            parts.append((shares(uniform, self.config, self.schedule), dropped, noise))
        return NoiseDraws(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))

    def terms(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The squared error of each row at each of its noise levels, summed over the elements of its latents; its share
        in the loss; and the weight of all."""
        x0, coefficients = batch["x0"], batch["coefficients"]
        draws = self.draws(batch["rows"], x0.shape[1:])
        levels = draws.noise.shape[1]
        asked = torch.tensor(batch["prompts"])[:, None]
        prompts = torch.where(draws.dropped, len(self.conditions) - 1, asked).flatten()
        t = upload(self.schedule.times(draws.shares.flatten()), x0.device)
        x0_levels = x0.repeat_interleave(levels, 0)
        noise = upload(draws.noise.flatten(0, 1).to(x0.dtype), x0.device)
        predicted = self.predict(self.schedule.noised(x0_levels, noise, t), t, prompts)
        errors = (predicted - self.schedule.target(x0_levels, noise, t)).square().flatten(1).sum(1)
        weights = self.schedule.weights(t, self.config.min_snr_gamma)
        return weights * errors, coefficients.repeat_interleave(levels) / levels, coefficients.sum() * x0[0].numel()

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) in float32; `prompts` (N,) are rows of the conditions."""
        taken = self.conditions.take(prompts).tensors.items()
        conditions = Conditions({name: upload(tensor, x_t.device) for name, tensor in taken})
        return self.adapter.predict(x_t.to(self.adapter.denoiser.dtype), t, conditions).float()


# -- what training changed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenoisingProbe:
    """R training rows, each at the middle of every quarter of the noise range: x_t, t and targets (R * 4, ...), and
    their prompts."""

    denoising: DenoisingLoss
    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[ImageRow], denoising: DenoisingLoss) -> DenoisingProbe:
        """Rows spread evenly over the fit's."""
        count = min(PROBED, len(rows))
        chosen = [rows[i * len(rows) // count] for i in range(count)]
        x0 = torch.stack([row.x0.float() for row in chosen]).repeat_interleave(QUARTERS, 0)
        noises = []
        for row in chosen:
            generator = torch.Generator().manual_seed(derive_seed(denoising.seed, "probe", row.number))
            noises.append(torch.randn((QUARTERS, *x0.shape[1:]), generator=generator))
        noise, schedule = torch.cat(noises), denoising.schedule
        low, high = denoising.config.noise_range
        middles = low + (high - low) * (torch.arange(QUARTERS, dtype=torch.float64) + 0.5) / QUARTERS
        t = schedule.times(middles).repeat(count)
        prompts = torch.tensor([row.prompt for row in chosen]).repeat_interleave(QUARTERS)
        return cls(denoising, schedule.noised(x0, noise, t), t, schedule.target(x0, noise, t), prompts)

    @torch.no_grad()
    def predict(self, adapter: PipelineAdapter, rows: int) -> torch.Tensor:
        """(R * 4, C, h, w) float32 on the CPU: the denoiser's predictions, so many rows at a time."""
        device = next(adapter.denoiser.parameters()).device
        denoising = replace(self.denoising, adapter=adapter)
        batches = [slice(first, first + rows) for first in range(0, len(self.t), rows)]
        return torch.cat(
            [denoising.predict(self.x_t[b].to(device), self.t[b].to(device), self.prompts[b]).cpu() for b in batches]
        )

    def compare(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
        """The mean squared error by quarter of the noise range, from the clean end on, now and at the start; and the
        drift: the mean squared change of the predictions over the mean square of the start's, None where that is 0."""

        def by_quarter(difference: torch.Tensor) -> torch.Tensor:
            return difference.double().square().flatten(1).mean(1).reshape(-1, QUARTERS).mean(0)

        def ratio(part: torch.Tensor, total: torch.Tensor) -> float | None:
            return float(part / total) if total > 0 else None

        moved, size = by_quarter(after - before), by_quarter(before)
        return {
            "loss_by_quarter": by_quarter(after - self.target).tolist(),
            "start_loss_by_quarter": by_quarter(before - self.target).tolist(),
            "drift": ratio(moved.sum(), size.sum()),
            "drift_by_quarter": [ratio(*pair) for pair in zip(moved, size, strict=True)],
            "probed": len(before) // QUARTERS,
        }


# -- training ----------------------------------------------------------------------------------------------------------


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
    """Trains a policy.Diffusion on the rows and writes the new model into `out`. Returns the report and notes."""
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
        load=lambda device: trainee(policy),
        rows=images.rows,
        lengths=[1] * len(images.rows),
        collate=batch_of,
        objective=lambda model: partial(objective.loss, replace(denoising, adapter=policy.bound(model.denoiser))),
        seed=seed,
        identity=identity(rows, training.model_dump_json(exclude={*SHARING}), seed),
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
    facts = {"noise_levels": training.diffusion.noise_levels, "prompts": len(images.prompts)}
    return result.report(len(images.rows), facts | probe.compare(before, after)), result.notes


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

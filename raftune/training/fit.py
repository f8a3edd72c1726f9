"""Trains a model with transformers' Trainer: exactly resumable, finite, within memory, on one or several processes.

A family defines its rows, its batches and its loss (`FitTask`). This module orders the rows, saves and verifies
checkpoints, refuses non-finite numbers, and halves micro-batches when memory runs out. On several processes the same
code runs in each (training/processes.py); they agree after each step on its loss, and on whether to save and to stop.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from raftune.arrays import IntArray
from raftune.config.training import TrainingConfig
from raftune.errors import ConfigError, ExtensionError, ModelError, NotFinite, OutOfMemory
from raftune.protocols import TrainReport
from raftune.records import derive_seed
from raftune.sanitize import counted
from raftune.store import interruption, pulse
from raftune.store.files import write_json
from raftune.training.checkpoints import CheckpointCallback, newest_verified, of_other_processes, required_files, seal
from raftune.training.devices import is_out_of_memory
from raftune.training.processes import (
    BatchShare,
    NotFirst,
    ObjectiveModule,
    Processes,
    SmallerBatches,
    current,
    part_of,
    shard_like,
    share_of,
    shares,
    spread,
    whole,
)
from raftune.training.quiet import quiet

WEIGHTS, AVERAGE, OPTIMIZER = "weights.safetensors", "average.safetensors", "optimizer.pt"
MICRO_BATCH = "micro_batch.json"
PADDING = "padding"  # of a batch: whether it is there only because other processes have one
SMALL = 50_000_000  # parameters: below, a full garbage collection costs more than the memory it could free
POOL = 50  # steps within which rows are sorted by length: enough to save padding, few enough to keep steps random
MANY_PASSES = 10  # over a round's rows, above which a note says so
NO_SUMS = torch.zeros(2, dtype=torch.float64)  # of losses and masses
NEVER = 2**31 - 1  # steps between checkpoints, where time alone decides
PASSED_ON = (
    *("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "optim", "bf16"),
)

Batch = Mapping[str, torch.Tensor]
# Of a micro-batch: its share of the step's loss (for backward), and the sum of its coefficients.
Loss = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FitTask:
    """A family's part of a training. `identity` names rows and settings: checkpoints of another identity are ignored.

    load(device): a fresh model there. Rows are dataclasses with a `coefficient` in the loss. objective(model) is called
    once for each loaded model. Its losses must already be normalised over an optimizer step: micro-batches of a step
    are summed. With `ema_decay` the result is the moving average of the trained weights.
    """

    load: Callable[[torch.device], Any]
    rows: Sequence[Any]
    lengths: Sequence[int]
    collate: Callable[[list[Any]], Batch]
    objective: Callable[[Any], Loss]
    seed: int
    identity: str
    carried: Mapping[str, torch.Tensor] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    ema_decay: float | None = None


@dataclass(frozen=True)
class FitResult:
    """The trained model, the loss of every step (the objective per unit of coefficient), and the optimizer's state."""

    model: Any
    losses: tuple[float, ...]
    optimizer: Mapping[str, torch.Tensor]
    micro_batch: int
    accumulation: int
    out_of_memory: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def report(self, rows: int, details: Mapping[str, Any]) -> TrainReport:
        """The report of a training on so many rows, with a family's own details."""
        batches: dict[str, Any] = {"micro_batch": self.micro_batch, "gradient_accumulation_steps": self.accumulation}
        if (processes := current()).world > 1:
            batches |= {"processes": processes.world, "parallel": processes.parallel}
        memory = {"out_of_memory_at": list(self.out_of_memory)}
        return TrainReport(rows, len(self.losses), self.losses, {**details, **batches, **memory})


def checked_loss(loss: Loss, name: str) -> Loss:
    """The loss of an objective of this name. Raises ExtensionError where it fails or does not return two tensors."""

    def checked(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            result = loss(batch)
        except Exception as error:
            if ":" not in name or is_out_of_memory(error):
                raise
            raise ExtensionError(
                f"training.objective: `loss` of {name} raised {type(error).__name__}: {error}. Fix it and resume the "
                "run."
            ) from error
        pair = isinstance(result, tuple) and len(result) == 2 and all(torch.is_tensor(part) for part in result)
        if not pair or any(part.dim() for part in result) or not result[0].requires_grad:
            raise ExtensionError(
                f"training.objective: `loss` of {name} must return two tensors without dimensions, the loss (with its "
                "gradient) and the weight behind it; it does not. Fix it and resume the run."
            )
        return result

    return checked


def fit(task: FitTask, config: TrainingConfig, work: Path, device: torch.device) -> FitResult:
    """Trains on the task's rows, bit for bit the same however often it was interrupted under `work`.

    Of several processes, the first one returns the result and the others raise NotFirst. Raises ModelError if a loss, a
    gradient or a weight is not finite; OutOfMemory if even one row does not fit; SmallerBatches where several processes
    have to start again.
    """
    work.mkdir(parents=True, exist_ok=True)
    processes = current()
    path = work / MICRO_BATCH  # the size that fitted in an earlier attempt: a resumed fit runs in the same batches
    size = MicroBatch.shared(config, processes)
    if path.is_file() and (earlier := MicroBatch(**json.loads(path.read_text()))).step == size.step:
        size = earlier
    while True:
        try:
            with kept_rng():
                return _attempt(task, config, size, work, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        size = size.halved()
        write_json(work, path, size._asdict())
        if processes.world > 1:
            raise SmallerBatches(
                f"memory ran out in process {processes.rank} of {processes.world}. Run the same command again: each "
                f"process then takes {size.rows} rows at once."
            )
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """Frees what only cycles keep alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _attempt(task: FitTask, config: TrainingConfig, size: MicroBatch, work: Path, device: torch.device) -> FitResult:
    processes = current()
    if processes.world > 1:  # a checkpoint is of so many processes
        task = replace(task, identity=f"{task.identity}/{processes.world}/{processes.parallel}")
    model = task.load(torch.device("cpu") if processes.sharded else device)
    required = required_files(processes.world, processes.sharded)
    other = processes.of_first(lambda: of_other_processes(work, task.identity))
    checkpoint, rejected = processes.of_first(lambda: newest_verified(work, task.identity, required))
    watch = FitCallback(task.identity)
    trainer = FitTrainer(task, model, watch, arguments(config, size, work, device, task.seed), device)
    watch.average = average = MovingAverage(trained(model), task.ema_decay) if task.ema_decay is not None else None
    # Each weight has two moments.
    watch.nbytes = 3 * sum(part_of(weight).nbytes for weight in trained(model).values())
    # Within, with a small model, collections skip what existed before: Trainer's own take 0.2 s a fit otherwise.
    small = sum(weight.numel() for weight in model.parameters()) < SMALL
    if small:
        gc.freeze()
    try:
        with quiet(), interruption.stretch(watch.promise):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if small:
            gc.unfreeze()
    if average:
        average.publish(trained(model))
    check_finite_weights(model)
    losses = tuple(entry["step_loss"] for entry in trainer.state.log_history if "step_loss" in entry)
    optimizer = optimizer_tensors(model, trainer.optimizer) if config.optimizer_state == "carried" else {}
    if processes.sharded:
        weights = {name: whole(weight.detach()).cpu() for name, weight in trained(model).items()}
    trainer.release()
    processes.barrier()
    if not processes.first:
        raise NotFirst
    if processes.sharded:
        del model, trainer
        free_memory(device)
        model = task.load(torch.device("cpu"))
        with torch.no_grad():
            for name, weight in trained(model).items():
                weight.copy_(weights.pop(name))
        model = on_device_if_it_fits(model, device)
    notes = [
        f"{name} {'is of other processes' if name in other else 'did not verify'} and was not used" for name in rejected
    ]
    steps_a_pass = math.ceil(len(task.rows) / (size.step * processes.world))
    if len(losses) > MANY_PASSES * steps_a_pass:
        field = "max_steps" if config.max_steps > 0 else "num_train_epochs"
        notes.append(
            f"{len(losses)} optimizer steps went {len(losses) / steps_a_pass:.0f} times over the round's "
            f"{counted(len(task.rows), 'row')}: training.{field} = {getattr(config, field):g} is meant for each round. "
            "Lower it, or raise prompts_per_round"
        )
    if checkpoint:
        notes.append(f"training was taken up after step {checkpoint.name.rpartition('-')[2]} of {len(losses)}")
    return FitResult(model, losses, optimizer, size.rows, size.accumulation, tuple(size.too_large), tuple(notes))


def on_device_if_it_fits(model: Any, device: torch.device) -> Any:
    """The model on the device, or where it is: a model that was trained in shards may be too large for one device."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return model.to("cpu")


class MicroBatch(NamedTuple):
    """Rows in memory at once, and how many such batches make an optimizer step; their product never changes."""

    rows: int
    accumulation: int
    too_large: tuple[int, ...] = ()

    @classmethod
    def shared(cls, config: TrainingConfig, processes: Processes) -> MicroBatch:
        """One process's share of the configured step. Raises ConfigError where the processes cannot share it evenly."""
        rows, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        return cls(*shares(rows, accumulation, processes.world))

    @property
    def step(self) -> int:
        """Rows of an optimizer step."""
        return self.rows * self.accumulation

    def halved(self) -> MicroBatch:
        """The next smaller micro-batch with the same product. Raises OutOfMemory at one row."""
        for rows in range(self.rows // 2, 0, -1):
            if self.step % rows == 0:
                return MicroBatch(rows, self.step // rows, (*self.too_large, self.rows))
        raise OutOfMemory(
            "training.per_device_train_batch_size is 1 and one row does not fit into memory. Set "
            "training.gradient_checkpointing, use an adapter, or shorten the completions.",
            self.rows,
        )


def arguments(
    config: TrainingConfig, size: MicroBatch, work: Path, device: torch.device, seed: int
) -> TrainingArguments:
    """The arguments of transformers' Trainer. Raises ConfigError where it refuses them."""
    try:
        with quiet():
            return trainer_arguments(
                "A round",
                current().world,
                work,
                config.save_steps,
                per_device_train_batch_size=size.rows,
                gradient_accumulation_steps=size.accumulation,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type == "cuda",
                seed=seed % 2**32,  # numpy takes no more
                **{name: getattr(config, name) for name in PASSED_ON},
                **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
                **config.trainer_kwargs,
            )
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"training must be what transformers' Trainer takes: {reason}") from error


def trainer_arguments(
    trained: str, processes: int, work: Path, save_steps: int | None, **options: Any
) -> TrainingArguments:
    """The arguments of a Trainer that writes checkpoints and logs nothing, in so many processes, each on one device.

    `trained` is the subject of the error where a launcher started others. Raises ConfigError for that, and what
    transformers raises for options that it refuses.
    """
    args = TrainingArguments(
        output_dir=str(work),
        save_strategy="steps",
        save_steps=save_steps or NEVER,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    if args.world_size != processes:
        raise ConfigError(
            f"{trained} is trained by {counted(processes, 'process', 'processes')}; a launcher began "
            f"{args.world_size}. Start raftune without it."
        )
    if args.n_gpu > 1:  # without a launcher Trainer would take all GPUs through DataParallel
        args._n_gpu = 1
    return args


class MovingAverage:
    """An exponential moving average of named weights, in float32: bfloat16 would round its small moves away.

    Step n mixes in 1 - d of the weights, d = min(decay, n / (n + 9)) and 0 at the first: an average over a fit's own
    steps, without the weights that it started from. The rule is that of diffusers' EMAModel.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.shadow = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def follow(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Moves towards the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9)) if self.steps > 1 else 0.0
        for name, weight in weights.items():
            self.shadow[name].lerp_(weight.float(), 1 - decay)

    @torch.no_grad()
    def publish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replaces the weights by the average."""
        for name, weight in weights.items():
            weight.copy_(self.shadow[name])

    def write(self, folder: Path) -> None:
        """Into a checkpoint, before it is sealed."""
        tensors = {name: part_of(tensor).contiguous() for name, tensor in self.shadow.items()}
        path = folder / current().of_rank(AVERAGE)
        save_file(tensors | {"steps": torch.tensor(self.steps)}, path, metadata={"format": "pt"})

    def read(self, folder: Path) -> None:
        """Out of a checkpoint that verified."""
        tensors = load_file(folder / current().of_rank(AVERAGE))
        self.steps = int(tensors.pop("steps"))
        for name, shadow in self.shadow.items():
            part_of(shadow).copy_(tensors[name])


class FitCallback(CheckpointCallback):
    """Records the loss of each step, and stops at the first that is not finite.

    Several processes add up their parts of the loss, and save and stop where the first one does.
    """

    average: MovingAverage | None = None

    def __init__(self, identity: str) -> None:
        super().__init__(identity, 0)
        self.processes = current()
        self.sums = NO_SUMS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.processes.rank:  # otherwise all processes would drop the same units
            torch.manual_seed((args.seed + self.processes.rank) % 2**32)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        save, stop = self.wishes() if self.processes.first else (False, False)
        loss, mass, saving, stopping = self.processes.total([*self.sums.tolist(), float(save), float(stop)])
        loss /= mass
        self.sums = NO_SUMS
        if not math.isfinite(loss):
            raise not_finite(f"The loss of step {state.global_step}", loss)
        state.log_history.append({"step": state.global_step, "step_loss": loss})
        if self.average:
            self.average.follow(trained(model))
        pulse.tell(state.global_step, state.max_steps, "steps")
        if stopping:  # the first process was asked
            interruption.ask_to_stop()
        self.end_step(state, control, bool(saving), bool(stopping))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_finite_weights(model)
        self.processes.barrier()  # every process has written its files
        super().on_save(args, state, control)

    def seal(self, folder: Path) -> None:
        if self.processes.first:
            seal(folder, self.identity)
        self.processes.barrier()


def not_finite(subject: str, value: object) -> NotFinite:
    return NotFinite(
        f"{subject} must be finite; got {value}. Nothing was published: lower training.learning_rate, or see the rows."
    )


def check_finite_weights(model: Any) -> None:
    """Raises ModelError, in every process, if a trained weight is NaN or infinite in one of them."""
    weights = trained(model)
    finite = torch.stack([part_of(weight).isfinite().all() for weight in weights.values()]).tolist()  # one transfer
    bad = [name for name, good in zip(weights, finite, strict=True) if not good]
    if current().total([float(len(bad))])[0]:
        raise not_finite("Every weight", f"a NaN or an infinity in {bad[0]}" if bad else "a NaN or an infinity")


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The weights that the fit changes, by name; tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class FitTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with our order of rows, our loss, and checkpoints of the trained weights alone.

    Of several processes each has its share of a step's micro-batches, and its gradients are averaged with the others'.
    """

    def __init__(
        self, task: FitTask, model: Any, watch: FitCallback, args: TrainingArguments, device: torch.device
    ) -> None:
        self.task, self.watch, self.processes, self.torch_device = task, watch, current(), device
        self.objective = task.objective(model)
        self.module = ObjectiveModule(model, self.objective)
        if self.processes.sharded:  # before the optimizer is made, which holds the shards
            spread(self.module, self.processes, device)
        cached = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=task.rows,
            data_collator=task.collate,
            callbacks=[watch, *task.callbacks],
            compute_loss_func=self.objective,  # given one, Trainer takes the loss as normalised over the whole step
        )
        if cached is not None:  # Trainer switches the cache off in the config, which is saved with the model
            model.config.use_cache = cached
        for callback in list(self.callback_handler.callbacks):  # stdout belongs to results
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.processes.world
        return LengthGroupedSampler(self.task.lengths, step, self.task.seed)

    def get_train_dataloader(self) -> Any:
        """Of several processes our own: accelerate's repeats rows where a step is not full, and counts them again."""
        if self.processes.world == 1:
            return super().get_train_dataloader()
        rows, size = self.task.rows, self.args
        share = BatchShare(
            self._get_train_sampler(),
            size.train_batch_size,
            size.gradient_accumulation_steps,
            self.processes,
            padding=len(rows),
            drop_last=size.dataloader_drop_last,
        )
        pad = replace(rows[0], coefficient=0.0)

        def collate(batch: list[Any]) -> dict[str, Any]:
            return {**self.task.collate(batch), PADDING: batch[0] is pad}

        padded: Any = [*rows, pad]
        loader: Any = DataLoader(padded, batch_sampler=share, collate_fn=collate, pin_memory=size.dataloader_pin_memory)
        loader.set_epoch = share.set_epoch
        return loader

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.processes.world == 1:
            return super()._wrap_model(model, *args, **kwargs)
        return self.module if self.processes.sharded else spread(self.module, self.processes, self.torch_device)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not self.processes.sharded:  # sharding has moved each shard
            super()._move_model_to_device(model, device)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        several = self.processes.world > 1
        if several:
            inputs = dict(inputs)
            padding = bool(inputs.pop(PADDING))
        with self.accelerator.autocast():  # the backbone is called without the forward that accelerate wraps
            loss, mass = model(inputs) if several else self.objective(inputs)
        if several and padding:
            loss, mass = loss * 0.0, mass * 0.0
        # In float64, and read once a step: a GPU is not waited for at every micro-batch.
        place = "cpu" if loss.device.type == "mps" else loss.device
        sums = [part.detach().to(place).double() for part in (loss, mass)]
        self.watch.sums = self.watch.sums.to(place) + torch.stack(sums)
        return loss * self.processes.world if several else loss  # their gradients are averaged

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.processes.sharded:
            weights = [weight for weight in model.parameters() if weight.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm([weight.grad for weight in weights]))
            torch.nn.utils.clip_grads_with_norm_(weights, self.args.max_grad_norm, norm)
        else:
            norm = super()._clip_grad_norm(model)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # float16 scaling skips such a step by itself
        if not scaled and norm is not None and not math.isfinite(norm):
            raise not_finite(f"The gradient of step {self.state.global_step + 1}", float(norm))
        return norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.task.carried and not optimizer.state:
            weights = trained(self.model)
            for key, value in self.task.carried.items():  # as `optimizer_tensors` named them
                name, _, entry = key.rpartition("/")
                if name not in weights:
                    raise ModelError(
                        f"The carried optimizer must be of this model; it has {name!r}. Set optimizer_state: fresh."
                    )
                optimizer.state[weights[name]][entry] = share_of(value, weights[name])
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (self.processes.first or self.processes.sharded):
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: part_of(weight.detach()).contiguous() for name, weight in trained(self.model).items()}
        save_file(tensors, folder / self.processes.of_rank(WEIGHTS), metadata={"format": "pt"})
        if self.watch.average:
            self.watch.average.write(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, weights = Path(resume_from_checkpoint), trained(self.model)
        saved = load_file(folder / self.processes.of_rank(WEIGHTS))
        assert saved.keys() == weights.keys(), "the identity of a checkpoint covers the model's parameters"
        with torch.no_grad():
            for name, weight in weights.items():
                part_of(weight).copy_(saved[name])
        if self.watch.average:
            self.watch.average.read(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.processes.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, folder = self.plain_optimizer, Path(output_dir)
        moments = [
            {entry: part_of(value) for entry, value in optimizer.state[weight].items()}
            for weight in weights_in(optimizer)
        ]
        groups = optimizer.state_dict()["param_groups"]
        torch.save({"state": moments, "param_groups": groups}, folder / self.processes.of_rank(OPTIMIZER))
        if self.processes.first:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.processes.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, folder = self.plain_optimizer, Path(checkpoint)
        saved = torch.load(folder / self.processes.of_rank(OPTIMIZER), map_location="cpu", weights_only=True)
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
        for weight, moments in zip(weights_in(optimizer), saved["state"], strict=True):
            for entry, value in moments.items():
                optimizer.state[weight][entry] = shard_like(value, weight) if torch.is_tensor(value) else value
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    @property
    def plain_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: counting them walks over all parameters at every step."""
        return 0

    def release(self) -> None:
        """Cuts the cycles that would keep the model and the optimizer's state alive until a full collection."""
        optimizer = self.plain_optimizer
        optimizer.state.clear()
        optimizer.param_groups.clear()
        self.accelerator.__dict__.clear()
        self.__dict__.clear()


def weights_in(optimizer: Any) -> list[Any]:
    """The weights that an optimizer moves, in the order of its groups."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def optimizer_tensors(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """The optimizer's state as `parameter/entry` → tensor; numbers become tensors of no dimension."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {
        f"{name}/{entry}": whole(value.detach()).cpu().contiguous() if torch.is_tensor(value) else torch.tensor(value)
        for name, weight in trained(model).items()
        for entry, value in state.get(weight, {}).items()
        if value is not None
    }


def grouped_order(lengths: Sequence[int], step: int, seed: int, epoch: int) -> IntArray:
    """A permutation of the rows in which every `step` successive ones have similar lengths.

    Rows are shuffled, sorted by length within pools of POOL steps, and cut into steps, which are shuffled again: a
    step's length is independent of its position. Rows that do not fill a step come last, as Trainer expects.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    order, size = random.permutation(len(lengths)), np.asarray(lengths)
    full = len(order) // step * step

    def longest_first(rows: IntArray) -> IntArray:
        return rows[np.argsort(-size[rows], kind="stable")]

    pools = [longest_first(order[i : min(i + POOL * step, full)]) for i in range(0, full, POOL * step)]
    steps = np.concatenate(pools).reshape(-1, step) if pools else np.empty((0, step), dtype=np.int64)
    return np.concatenate([random.permutation(steps).reshape(-1), longest_first(order[full:])]).astype(np.int64)


class LengthGroupedSampler(Sampler[int]):
    """Sampler of `grouped_order` for the epoch that was last set."""

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed = lengths, step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_order(self.lengths, self.step, self.seed, self.epoch).tolist())


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Restores the global random states afterwards."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        several = torch.cuda.is_available() and current().world > 1
        with torch.random.fork_rng([torch.cuda.current_device()] if several else range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)

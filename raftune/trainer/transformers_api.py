"""Trainer methods that scripts call besides `train`, for a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import trainer_pt_utils

# Members of transformers' and TRL's trainers that RaftTrainer lacks, and what serves instead.
_OWN_OPTIMIZER = "every round makes its own; set optim and learning_rate"
_LIKELIHOOD = "the loss is the likelihood of what was kept"
_HELD_OUT = "held-out prompts are generated and scored; evaluate(dataset) does it for others"
ELSEWHERE = {
    "get_train_dataloader": "each round trains on rows that it keeps itself; they lie in round-NNNN/rows/rows.parquet",
    **dict.fromkeys(("get_eval_dataloader", "get_test_dataloader"), _HELD_OUT),
    "predict": "evaluate(dataset) measures prompts; trainer.model.generate generates",
    **dict.fromkeys(("compute_loss", "training_step"), _LIKELIHOOD),
    **dict.fromkeys(("create_optimizer", "optimizer"), _OWN_OPTIMIZER),
    "create_optimizer_and_scheduler": "every round makes its own; set optim, learning_rate and lr_scheduler_type",
    "lr_scheduler": "every round makes its own; set lr_scheduler_type and warmup_steps",
    "ref_model": "beta measures the distance to the start model, which is in the run",
    "model_wrapped": "trainer.model is the model itself",
    "hyperparameter_search": "give each trial an output_dir of its own",
}


class SingleProcessAccelerator:
    """The members of accelerate's Accelerator that scripts use, for one process on one device."""

    is_main_process = is_local_main_process = is_last_process = True
    num_processes, process_index, local_process_index = 1, 0, 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def state(self) -> SingleProcessAccelerator:
        return self

    def print(self, *values: Any, **options: Any) -> None:
        print(*values, **options)

    def wait_for_everyone(self) -> None:
        """Returns at once: there is one process."""

    def unwrap_model(self, model: Any, **options: Any) -> Any:
        return model

    def gather(self, values: Any) -> Any:
        return values

    gather_for_metrics = gather


class TransformersTrainerMixin:
    """Callbacks, and metrics and state where transformers' Trainer writes them."""

    args: Any
    state: Any
    control: Any
    model: Any
    _handler: Any

    # transformers' own functions, which ask for `args`, `state` and is_world_process_zero()
    log_metrics = trainer_pt_utils.log_metrics
    metrics_format = staticmethod(trainer_pt_utils.metrics_format)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        trainer_pt_utils.save_metrics(self, split, metrics, combined)

    def save_state(self) -> None:
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        trainer_pt_utils.save_state(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds numbers of a script's own to the history, and tells the callbacks."""
        entry = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self.control = self._handler.on_log(self.args, self.state, self.control, logs=entry)

    def add_callback(self, callback: Any) -> None:
        """Adds a TrainerCallback, an instance or a class."""
        self._handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Removes a callback, given as an instance or a class, and returns it; None where there is none."""
        return self._handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback, given as an instance or a class."""
        self._handler.remove_callback(callback)

    def get_num_trainable_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def is_world_process_zero(self) -> bool:
        return True

    def is_local_process_zero(self) -> bool:
        return True

    @property
    def accelerator(self) -> SingleProcessAccelerator:
        return SingleProcessAccelerator(self.args.device)

    @property
    def hub_model_id(self) -> str:
        """The repository that `push_to_hub` writes to."""
        return str(self.args.hub_model_id or Path(self.args.output_dir).name)

    def __getattr__(self, name: str) -> Any:
        hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}")

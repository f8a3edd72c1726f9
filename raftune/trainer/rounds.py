"""The callback behind a trainer: updates TrainerState, transformers callbacks and logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from raftune.results.round_metrics import held_out, kept, losses, sample_stats
from raftune.results.summary import overlap_warning, seconds_by_round
from raftune.sanitize import one_line
from raftune.store.run import RunFolder
from raftune.trainer.arguments import default_of
from raftune.trainer.config import RaftConfig


class StopAfterRound(Exception):
    """A callback asked to stop: raised at the end of a round, when everything of it is committed."""


class RoundFlow(DefaultFlowCallback):  # type: ignore[misc]
    """Replaces transformers' own flow: rounds log, evaluate and end by the run's rules."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control


class LazyModel:
    """The current model for callbacks, loaded at the first use in an event, and released after the event."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._loaded = load, None

    def _get(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance sees the model's class
        return type(self._get())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get()(*args, **kwargs)


class RoundCallbackHandler(CallbackHandler):  # type: ignore[misc]
    """Gives callbacks the model of the latest round and the tokenizer; reporters, which only describe a model, none."""

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        model, kwargs = self.model, {"processing_class": self.processing_class, **kwargs}
        kwargs |= dict.fromkeys(("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"))
        try:
            for callback in self.callbacks:
                reports = type(callback).__module__.startswith("transformers.integrations")
                result = getattr(callback, event)(args, state, control, model=None if reports else model, **kwargs)
                control = control if result is None else result
        finally:
            if model is not None:
                model._loaded = None
        return control


class RoundTracker:
    """Follows one call of train(). Rounds that were done before fill the state; only new ones reach the callbacks.

    An epoch of transformers' callbacks is a round, a step an optimizer step; steps are reported after their round.
    """

    def __init__(self, args: RaftConfig, handler: CallbackHandler, run: RunFolder, encoder: Callable[[], Any]) -> None:
        self.args, self.handler, self.run, self._encoder = args, handler, run, encoder
        # optimizer steps between two logs of the loss; a share of all steps, which no round knows, is the default
        self._every = int(args.logging_steps if args.logging_steps >= 1 else default_of(RaftConfig, "logging_steps"))
        self.state = TrainerState(
            logging_steps=self._every,
            num_train_epochs=args.num_rounds,
            max_steps=args.num_rounds * max(0, args.max_steps),
            train_batch_size=args.per_device_train_batch_size,
            is_local_process_zero=True,
            is_world_process_zero=True,
        )
        self.control = TrainerControl()
        self.round = self.done = 0  # the latest round with a model; the number of rounds that are done
        self.summary: dict[str, float] = {}  # of the whole training, once it ended
        self.worked = False  # whether anything had to be done
        self.notes: dict[str, None] = {}  # warnings about prompts and generation, each once
        self._losses: list[float] = []
        self._live = False  # whether the current round is new

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        if follow := getattr(self, f"_on_{kind}", None):
            follow(**facts)

    def start(self) -> None:
        self._event("on_train_begin")

    def end(self) -> None:
        """Logs the mean loss and the time of all rounds, as transformers does."""
        if self._losses:
            seconds = sum(seconds_by_round(self.run.events).values())
            self.summary = {"train_runtime": seconds, "train_loss": sum(self._losses) / len(self._losses)}
            self.summary["train_steps_per_second"] = len(self._losses) / seconds if seconds else 0.0
            self._live = self.worked
            self._log(self.summary)
            self.summary["epoch"] = float(self.state.epoch or 0)
        self._event("on_train_end")

    def _on_round_begin(self, round: int, **_: Any) -> None:
        self._live = False
        self.state.epoch = float(max(0, round - 1))

    def _on_stage_begin(self, round: int, **_: Any) -> None:
        if not self._live:
            self._live = self.worked = True
            if round:
                self._event("on_epoch_begin")

    def _on_chunk(self, notes: list[str], **_: Any) -> None:
        self.notes |= dict.fromkeys(notes)

    def _on_stage_end(self, stage: str, notes: Sequence[str] = (), **_: Any) -> None:
        self.notes |= dict.fromkeys(notes)
        if stage == "data" and (warning := overlap_warning(self.run.root)):
            self.notes[warning] = None

    def _on_round_end(self, round: int, metrics: dict[str, Any], summary: dict[str, Any], **_: Any) -> None:
        self.round = round
        if round:
            self.done += 1
            self._log_training(round, summary)
        if metrics:
            evaluation = held_out(metrics)
            self._log(evaluation)
            if self._live:
                self._event("on_evaluate", metrics=evaluation)
            name = str(self.args.metric_for_best_model or "eval_reward")
            value = evaluation.get(name, evaluation.get("eval_reward"))
            if value is not None and (self.state.best_metric is None or value > self.state.best_metric):
                self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        if not self._live:
            return
        if round:
            if self.args.log_completions:
                show(kept(self.run, round, self.args.num_completions_to_print), round)
            self._event("on_save")
            self._event("on_epoch_end")
        if self.control.should_training_stop and round < self.args.num_rounds:
            raise StopAfterRound(f"a callback stopped the training after round {round}")

    def _log_training(self, round_: int, summary: dict[str, Any]) -> None:
        """Counts the round's optimizer steps, logs their loss every `logging_steps`, then the round's metrics."""
        values = losses(self.run, round_)
        self._losses += values
        waiting: list[float] = []
        for number, loss in enumerate(values, 1):
            self.state.global_step += 1
            self.state.epoch = round_ - 1 + number / len(values)
            waiting.append(loss)
            first = self.args.logging_first_step and self.state.global_step == 1
            if self.args.logging_strategy == "steps" and (first or self.state.global_step % self._every == 0):
                self._log({"loss": sum(waiting) / len(waiting)})
                waiting = []
            if self._live:
                self._event("on_step_end")
        self.state.epoch = float(round_)
        stats, tokens = sample_stats(self.run, round_, self._encoder())
        self.state.num_input_tokens_seen += tokens
        entry = stats | {"num_tokens": float(self.state.num_input_tokens_seen)}
        if values:
            entry["train_loss"] = sum(values) / len(values)
        entry |= {name: float(summary[name]) for name in ("kept", "reward_kept") if summary.get(name) is not None}
        if seconds := seconds_by_round(self.run.events).get(round_):
            entry |= {"step_time": seconds / max(1, len(values)), "round_time": seconds}
        self._log(entry)

    def _log(self, entry: dict[str, float]) -> None:
        logs = {**entry, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        if self._live and self.args.logging_strategy != "no":
            self._event("on_log", logs=logs)

    def _event(self, name: str, **facts: Any) -> None:
        self.control = getattr(self.handler, name)(self.args, self.state, self.control, **facts)


def show(rows: list[tuple[Any, str, float | None, dict[str, Any]]], round_: int) -> None:
    """Prints kept samples and the values that rewards logged as a table; texts are sanitized, on one line."""
    extras = sorted({name for *_, logged in rows for name in logged})
    heads = ("prompt", "completion", "reward", *map(one_line, extras))
    table = Table(*heads, title=f"kept in round {round_}", title_justify="left")
    for prompt, completion, score, logged in rows:
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        number = "" if score is None else f"{score:.3f}"
        values = ("" if logged.get(name) is None else str(logged[name]) for name in extras)
        more = (Text(one_line(value, 100)) for value in values)
        table.add_row(Text(one_line(text, 200)), Text(one_line(completion, 400)), number, *more)
    Console(stderr=True).print(table)

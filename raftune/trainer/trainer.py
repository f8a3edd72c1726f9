"""RaftTrainer: model, rewards and data in TRL's words, and behind them a run like any other."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as transformers_logging

from raftune.build import Objects
from raftune.config.run import RunConfig
from raftune.digest import held_out_names
from raftune.errors import ConfigError, RaftuneError, StoreError
from raftune.loop import Observer
from raftune.policies.causal_lm.encoding import Encoder
from raftune.progress import Progress
from raftune.runs import root_of, run
from raftune.starters.resolve import resolve_starters
from raftune.store.run import RunFolder
from raftune.trainer import metrics, publishing
from raftune.trainer.config import RaftConfig, flat_names, mapping, run_of
from raftune.trainer.inputs import GivenPrompts, given_prompts, given_rewards
from raftune.trainer.models import given_model, load_tokenizer
from raftune.trainer.rounds import RoundFlow, Rounds, StopAfterRound

logger = logging.getLogger("raftune")


class RaftTrainer:
    """Reward-ranked fine-tuning of a language model: each round draws K answers a prompt, and learns from the best.

    The arguments are GRPOTrainer's. A model given as an object is never changed: `trainer.model` is the tuned one. The
    run lies in `args.output_dir`, and is exact: the same call again, in a new process or a notebook's cell run twice,
    continues it or finds it finished; another call is refused with the difference. Raises ConfigError, DataError.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RaftConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        _refuse(args, train_dataset, optimizers)
        args = args if args is not None else RaftConfig(output_dir=_default_folder(model))
        init = mapping(args.model_init_kwargs, "model_init_kwargs")
        given = given_model(model, processing_class, peft_config, init, args.trust_remote_code)
        rewards = given_rewards(reward_funcs, reward_processing_classes, args.reward_weights)
        train = given_prompts(train_dataset, "train_dataset")
        held_out = given_prompts(eval_dataset, "eval_dataset") if eval_dataset is not None else GivenPrompts("")
        self.args = args
        self.run_config: RunConfig = run_of(
            args,
            {
                "policy": given.policy,
                "data": {"prompts": train.source},
                "rewards": {"reward_funcs": rewards.specs},
                "evaluation": {"prompts": held_out.source or None},
            },
        )
        self._objects = Objects(
            train=train.table,
            held_out=held_out.table,
            rewards=rewards.objects,
            reward_weights=rewards.weights,
            model=given.model,
            tokenizer=given.tokenizer,
        )
        self._given, self._tokenizer, self._model = model, given.tokenizer, None
        self._handler = _handler(args, callbacks or ())
        if torch.cuda.device_count() > 1 and not args.use_cpu:
            logger.warning(
                "Of %d GPUs the first is used; CUDA_VISIBLE_DEVICES chooses another.", torch.cuda.device_count()
            )
        self.state, self.control = TrainerState(), TrainerControl()
        self.control = self._handler.on_init_end(args, self.state, self.control)

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *, redo: str | None = None) -> TrainOutput:
        """Runs the rounds that are missing, and returns steps, mean loss and the best round's metrics.

        It always resumes: `resume_from_checkpoint` may say so too, or name the run's own directory. `redo` is STAGE or
        ROUND/STAGE: the work is done again from there on, under the arguments as they are now.
        """
        self._refuse_checkpoint(resume_from_checkpoint or self.args.resume_from_checkpoint)
        if self.args.log_level != "passive":
            transformers_logging.set_verbosity(self.args.get_process_log_level())
        self._model = None
        rounds = Rounds(self.args, self._handler, self._run, self._encoder)
        self.state, self.control = rounds.state, rounds.control
        rounds.begin()
        reason = self._go(rounds, redo)
        rounds.end()
        self.control = rounds.control
        if not rounds.worked:
            logger.warning("The run in %s is finished: %s. Nothing had to be done.", self._run.root, reason)
        if self.args.disable_tqdm:  # else the progress has shown them
            for note in rounds.notes:
                logger.warning(note)
        if self.args.push_to_hub:
            self.push_to_hub()
        return self._output(reason)

    def _go(self, rounds: Rounds, redo: str | None) -> str:
        """Runs, and says why it ended."""
        progress = contextlib.nullcontext() if self.args.disable_tqdm else self._progress()
        try:
            with progress as shown:
                outcome = run(self.run_config, self._objects, observe=_both(shown, rounds), redo=redo)
        except StopAfterRound as stop:
            return f"{stop}; train() goes on from there"
        except RaftuneError as error:  # the fields under their names here; the class and the cause stay
            words = re.sub(r"(?:add )?`--from ([^`]+)`", r"call train(redo='\1')", flat_names(str(error)))
            error.args = (words, *error.args[1:])
            raise
        return outcome.reason

    def _progress(self) -> Progress:
        return Progress(held_out=held_out_names(self.run_config))

    def _output(self, reason: str) -> TrainOutput:
        found = [entry["train_loss"] for entry in self.state.log_history if "train_loss" in entry]
        best = self._best()
        summary = {"best_round": best, "stopped_because": reason}
        with contextlib.suppress(ConfigError):
            summary |= self.evaluate()
        return TrainOutput(self.state.global_step, sum(found) / len(found) if found else 0.0, summary)

    def evaluate(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The held-out metrics of the best round under TRL's names, as they were measured when the round ended."""
        path = self._run.folder(self._best(), "evaluate") / "metrics.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if not found:
            raise ConfigError(
                f"evaluate() needs held-out prompts; got none with num_eval_prompts={self.args.num_eval_prompts}. Give "
                "eval_dataset, or ten prompts or more: a tenth of them is held out."
            )
        return metrics.held_out(found, metric_key_prefix, ends=True)

    # -- what came of it -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The best round's model, of transformers or peft, in eval mode; before any round is done, the start model."""
        if self._model is None:
            if not (self._run.root / "best.json").is_file():
                return self._given if self._objects.model is not None else publishing.load_named(self._policy())
            self._model = publishing.load_round(self._policy(), self._run, self._best())
        return self._model

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        if self._tokenizer is None:
            policy = self._policy()
            self._tokenizer = load_tokenizer(policy.tokenizer or policy.model, policy.trust_remote_code)
        return self._tokenizer

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes the best round's model, which plain transformers or peft loads, with tokenizer and model card.

        Without a folder it lies in `args.output_dir`, beside the run, as after other trainers.
        """
        self._best()
        publishing.publish(self._run, Path(output_dir) if output_dir is not None else self._run.root)

    def push_to_hub(self, commit_message: str = "End of training", **options: Any) -> Any:
        """Uploads what `save_model` writes; returns the hub's answer. Raises StoreError where that fails."""
        self._best()
        name = self.args.hub_model_id or self._run.root.name
        settings = {
            "token": self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
        }
        return publishing.push(self._run, name, commit_message, {**settings, **options})

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        self._handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self._handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self._handler.remove_callback(callback)

    # -- what it stands on ---------------------------------------------------------------------------------------------

    @property
    def _run(self) -> RunFolder:
        return RunFolder(root_of(self.run_config))

    def _policy(self) -> Any:
        return resolve_starters(self.run_config).policy

    def _best(self) -> int:
        """The number of the best round. Raises StoreError before there is one."""
        path = self._run.root / "best.json"
        if not path.is_file():
            raise StoreError(f"{self._run.root} has no trained model yet: no round is done. Call train() first.")
        return int(json.loads(path.read_text())["round"])

    def _encoder(self) -> Encoder:
        return Encoder(self.processing_class, self.run_config.sampling, None, 0)

    def _refuse_checkpoint(self, given: str | bool | None) -> None:
        if isinstance(given, (str, Path)) and Path(given).resolve() != self._run.root.resolve():
            raise ConfigError(
                f"resume_from_checkpoint must be left out; got {str(given)!r}. train() always continues the run in "
                f"{self._run.root}; another run is continued by its own output_dir."
            )


def _refuse(args: Any, train_dataset: Any, optimizers: tuple[Any, Any]) -> None:
    """Raises ConfigError for arguments that cannot be meant."""
    if args is not None and not isinstance(args, RaftConfig):
        raise ConfigError(
            f"args must be a RaftConfig; got {type(args).__name__}. Write RaftConfig(…) with the same arguments."
        )
    if train_dataset is None:
        raise ConfigError("train_dataset must be given; got None. Give rows with a 'prompt' column.")
    if any(one is not None for one in optimizers):
        raise ConfigError(
            "optimizers must be (None, None): every round fits a newly loaded model under a fresh schedule. Set optim, "
            "learning_rate and lr_scheduler_type."
        )


def _default_folder(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
    return f"runs/{str(name).rstrip('/').rsplit('/', 1)[-1]}-RAFT"


def _handler(args: RaftConfig, callbacks: Sequence[Any]) -> CallbackHandler:
    try:
        reporting = get_reporting_integration_callbacks(args.report_to)
        return CallbackHandler([RoundFlow(), *reporting, *callbacks], None, None, None, None)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to must name what is installed; got {args.report_to}: {error}") from error


def _both(*observers: Any) -> Observer:
    """One observer that tells all; None is nobody."""
    listening: list[Callable[[str, dict[str, Any]], None]] = [one for one in observers if one is not None]

    def observe(kind: str, facts: dict[str, Any]) -> None:
        for listener in listening:
            listener(kind, facts)

    return observe

"""RaftTrainer: RAFT with the interface of TRL's trainers."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as transformers_logging

from raftune.config.run import RunConfig, held_out_names
from raftune.errors import ConfigError, RaftuneError, StoreError
from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.protocols import Callback
from raftune.results import round_metrics as metrics
from raftune.results.summary import best_round, read_json
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.progress import Progress
from raftune.runtime.run import root_of, run
from raftune.starters.resolve import resolve_starters
from raftune.store.run import RunFolder
from raftune.trainer import publishing
from raftune.trainer.config import RaftConfig, mapping, outline, plain_process, run_of
from raftune.trainer.evaluating import ALL, evaluate_on, measure
from raftune.trainer.face import TransformersTrainerMixin
from raftune.trainer.inputs import PromptInputs, given_held_out, given_prompts, given_rewards
from raftune.trainer.interrupts import leaving_on_interrupt
from raftune.trainer.models import given_model, load_tokenizer
from raftune.trainer.rounds import LazyModel, RoundCallbackHandler, RoundFlow, RoundTracker, StopAfterRound
from raftune.trainer.wording import in_python, python_advice

logger = logging.getLogger("raftune")


class RaftTrainer(TransformersTrainerMixin):
    """Reward-ranked fine-tuning of a language model: each round generates K answers a prompt, and learns from the best.

    The arguments are GRPOTrainer's. A model given as an object is never changed: `trainer.model` is the trained one.
    The run lies in `args.output_dir`, and is exact: the same call again, in a new process or a notebook's cell run
    twice, continues it or finds it finished; another call is refused with the difference. Raises ConfigError,
    DataError.
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
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        args = _checked(args, model)
        faults = ErrorCollector()
        extras = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        faults.attempt(_refuse_extras, extras, optimizers, args.strict)
        init = mapping(args.model_init_kwargs, "model_init_kwargs")
        trust, strict = args.trust_remote_code, args.strict
        given = faults.attempt(
            given_model, model, processing_class, peft_config, init, trust, quantization_config, strict
        )
        rewards = faults.attempt(given_rewards, reward_funcs, reward_processing_classes, args.reward_weights)
        planned = outline(args)
        self._columns, judged = _columns(args, planned), planned.evaluation.num_prompts
        size = planned.prompts_per_round
        needed = planned.num_rounds * size + judged
        train = faults.attempt(given_prompts, train_dataset, "train_dataset", self._columns, needed, size)
        held_out = PromptInputs("")
        if eval_dataset is not None:
            held_out = faults.attempt(given_held_out, eval_dataset, self._columns, judged)
        faults.end()
        self.args = args
        self._sections = {
            "policy": given.policy,
            "data": {"prompts": train.source},
            "rewards": {"reward_funcs": rewards.specs},
            "evaluation": {"prompts": held_out.source or None},
        }
        self.run_config: RunConfig = run_of(args, self._sections)
        self._objects = PythonObjects(
            train=train.table,
            held_out=held_out.table,
            rewards=rewards.objects,
            reward_weights=rewards.weights,
            model=given.model,
            tokenizer=given.tokenizer,
        )
        self.train_dataset, self.eval_dataset, self._given_eval = train_dataset, eval_dataset, eval_dataset
        self._given, self._tokenizer, self._model = model, given.tokenizer, None
        self._handler = _handler(args, callbacks or ())
        self._handler.processing_class = given.tokenizer
        self._handler.model = LazyModel(lambda: self.model)
        if torch.cuda.device_count() > 1 and not args.use_cpu:
            logger.warning(
                "Of %d GPUs the first is used; CUDA_VISIBLE_DEVICES chooses another.", torch.cuda.device_count()
            )
        self.state, self.control = TrainerState(), TrainerControl()
        self.control = self._handler.on_init_end(args, self.state, self.control)

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        redo: str | None = None,
        only: str | None = None,
    ) -> TrainOutput:
        """Runs the rounds that are missing, and returns steps, mean loss and the best round's metrics.

        It always resumes: `resume_from_checkpoint` may say so too, or name the run's own directory. `redo` is STAGE or
        ROUND/STAGE: the work is done again from there on, under the arguments as they are now. With
        redo="score", `only` names statuses such as "error,timeout": all other samples keep their scores. Ctrl-C raises
        KeyboardInterrupt: the same call goes on.
        """
        self._refuse_checkpoint(resume_from_checkpoint or self.args.resume_from_checkpoint)
        if self.args.log_level != "passive":
            transformers_logging.set_verbosity(self.args.get_process_log_level())
        self._model = None
        self.run_config = run_of(self.args, self._sections)  # a notebook's next cell may have changed self.args
        rounds = RoundTracker(self.args, self._handler, self._run, self._encoder)
        self.state, self.control = rounds.state, rounds.control
        self._handler.tell_of(rounds, self._model_of_round, self._own_tokenizer())
        rounds.begin()
        with leaving_on_interrupt(), plain_process(), python_advice():
            reason = self._go(rounds, redo, only)
        rounds.end()
        self.control = rounds.control
        if not rounds.worked:
            logger.warning("The run in %s is finished: %s. Nothing had to be done.", self._run.root, reason)
        if self.args.disable_tqdm:  # else the progress has shown them
            for note in rounds.notes:
                logger.warning(in_python(note))
        self._warn_of_start(rounds.done)
        if self.args.push_to_hub:
            self.push_to_hub()
        return self._output(rounds, reason)

    def _go(self, rounds: RoundTracker, redo: str | None, only: str | None) -> str:
        """Runs, and says why it ended."""
        progress = contextlib.nullcontext() if self.args.disable_tqdm else self._progress()
        try:
            with progress as shown:
                outcome = run(self.run_config, self._objects, observe=_both(shown, rounds), redo=redo, only=only)
        except StopAfterRound as stop:
            return f"{stop}; train() goes on from there"
        return outcome.reason

    def _progress(self) -> Progress:
        return Progress(held_out=held_out_names(self.run_config))

    def _warn_of_start(self, rounds: int) -> None:
        """Says that the model is the start's where no round was better."""
        best = self._best()
        self.state.best_model_checkpoint = str(self._run.folder(best, "model"))
        if rounds and best == 0:
            written = " with an adapter of zero effect" if self._policy().adapter else ""
            logger.warning(
                "No round was better than the start by %s: trainer.model, save_model and push_to_hub give the start "
                "model%s. More or other rounds, rewards or held-out prompts may change that.",
                self.run_config.evaluation.best_by,
                written,
            )

    def _output(self, rounds: RoundTracker, reason: str) -> TrainOutput:
        summary = {**rounds.summary, "best_round": self._best(), "stopped_because": reason}
        if found := self._measured():
            summary |= metrics.held_out(found, ends=True)
        return TrainOutput(self.state.global_step, rounds.summary.get("train_loss", 0.0), summary)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of the best round's model, under TRL's names.

        On `eval_dataset`, or a dictionary of several, its prompts are generated to and scored now, all of them; before
        any round is done, by the initial model. A trainer that was given a dictionary evaluates each in it. Without
        one these are the run's own held-out prompts, as they were measured when the round ended.
        """
        several = isinstance(self.eval_dataset, Mapping)  # of which the rounds were judged together
        if eval_dataset is None and (several or self.eval_dataset is not self._given_eval):
            eval_dataset = self.eval_dataset
        if eval_dataset is not None:
            return self._evaluate_on(eval_dataset, metric_key_prefix)
        best = self._best()
        found = self._measured()
        if not found:
            raise ConfigError(
                f"evaluate() needs held-out prompts; got none with num_eval_prompts={self.args.num_eval_prompts}. Give "
                "eval_dataset, or ten prompts or more: a tenth of them is held out."
            )
        return metrics.held_out(found, metric_key_prefix, ends=True) | {"epoch": float(best)}

    def _measured(self) -> dict[str, Any]:
        """What was measured of the best round when it ended; empty without held-out prompts."""
        return read_json(self._run.folder(self._best(), "evaluate") / "metrics.json")

    def _evaluate_on(self, given: Any, prefix: str) -> dict[str, float]:
        several = given if isinstance(given, Mapping) else {"": given}
        prompts = {str(name): given_prompts(rows, "eval_dataset", self._columns, ALL) for name, rows in several.items()}
        trained = (self._run, self._best()) if self._has_model() else None

        def measured(rows: PromptInputs) -> dict[str, Any]:
            progress = contextlib.nullcontext() if self.args.disable_tqdm else self._progress()
            with progress as shown:
                return measure(self.run_config, self._objects, trained, rows, _both(shown))

        with leaving_on_interrupt(), plain_process(), python_advice():
            found = evaluate_on(prompts, prefix, measured)
        found["epoch"] = float(trained[1] if trained else 0)
        self.state.log_history.append({**found, "step": self.state.global_step})
        self.control = self._handler.on_evaluate(self.args, self.state, self.control, metrics=found)
        return found

    # -- what came of it -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The best round's model, of transformers or peft, in eval mode; before the first round the initial model."""
        if self._model is None:
            best = self._best() if self._has_model() else None
            self._model = self._start_model() if best is None else self._model_of_round(best)
        return self._model

    def _model_of_round(self, round_: int) -> Any:
        if not self._has_model():
            return self._start_model()
        return publishing.load_round(self._policy(), self._run, round_)

    def _start_model(self) -> Any:
        """The model as given; with peft_config under the adapter that is to be trained, on a copy."""
        policy = self._policy()
        if policy.adapter is None or isinstance(self._given, PeftModel):
            return self._given if self._objects.model is not None else publishing.load_named(policy)
        base = copy.deepcopy(self._given) if self._objects.model is not None else publishing.load_named(policy)
        return publishing.with_fresh_adapter(base, policy)

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        if self._tokenizer is None:
            policy = self._policy()
            self._tokenizer = load_tokenizer(policy.tokenizer or policy.model, policy.trust_remote_code)
        return self._tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, by its older name."""
        return self.processing_class

    def save_model(self, output_dir: str | Path | None = None, **unused: Any) -> None:
        """Writes the best round's model, which plain transformers or peft loads, with tokenizer and model card.

        Without a folder it lies in `args.output_dir`, beside the run, as after other trainers. Where no round was
        better than the start, a run of an adapter writes one of zero effect.
        """
        self._best()
        with python_advice():
            publishing.publish(self._run, self._policy(), Path(output_dir or self._run.root))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **facts: Any
    ) -> None:
        """Writes the best round's model card, README.md, into `args.output_dir`."""
        self._best()
        facts |= {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        publishing.write_card(self._run, self._policy(), self._run.root, facts)

    def push_to_hub(
        self, commit_message: str = "End of training", blocking: bool = True, token: str | None = None, **options: Any
    ) -> Any:
        """Uploads what `save_model` writes; returns the hub's answer. Raises StoreError where that fails.

        `dataset_name`, `model_name`, `tags`, `language` and `license` go into the model card.
        """
        self._best()
        settings = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
        }
        with python_advice():
            return publishing.push(
                self._run, self._policy(), self.hub_model_id, commit_message, {**settings, **options}
            )

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        """Adds a TrainerCallback, an instance or a class."""
        self._handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Removes a callback, given as an instance or a class, and returns it; None where there is none."""
        return self._handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback, given as an instance or a class."""
        self._handler.remove_callback(callback)

    # -- what it stands on ---------------------------------------------------------------------------------------------

    @property
    def _run(self) -> RunFolder:
        return RunFolder(root_of(self.run_config))

    def _has_model(self) -> bool:
        return (self._run.root / "best.json").is_file()

    def _own_tokenizer(self) -> Any:
        """The tokenizer for callbacks; None where the run will say what is wrong with it."""
        with contextlib.suppress(RaftuneError):
            return self.processing_class
        return None

    def _policy(self) -> Any:
        return resolve_starters(self.run_config).policy

    def _best(self) -> int:
        """The number of the best round. Raises StoreError before there is one."""
        best = best_round(self._run.root)
        if best is None:
            raise StoreError(f"{self._run.root} has no trained model yet: no round is done. Call train() first.")
        return best

    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.processing_class, self.run_config.sampling, None, 0)

    def _refuse_checkpoint(self, given: str | bool | None) -> None:
        root = self._run.root.resolve()
        if isinstance(given, (str, Path)) and root not in (Path(given).resolve(), *Path(given).resolve().parents):
            raise ConfigError(
                f"resume_from_checkpoint must be left out; got {str(given)!r}. train() always continues the run in "
                f"{self._run.root}; another run is continued by its own output_dir."
            )


class ErrorCollector:
    """Collects the errors of several steps to report them together."""

    def __init__(self) -> None:
        self.errors: list[RaftuneError] = []

    def attempt(self, step: Callable[..., Any], *given: Any) -> Any:
        """What the step returns; None where it raised, which `end` tells."""
        try:
            return step(*given)
        except RaftuneError as error:
            self.errors.append(error)

    def end(self) -> None:
        """Raises the one error there was, or one that holds the lines of all."""
        if not self.errors:
            return
        if len(kinds := {type(error) for error in self.errors}) == 1 and len(self.errors) == 1:
            raise self.errors[0]
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind("\n".join(map(str, self.errors))) from self.errors[0]


EXTRAS = {
    "tools": "a sample is one completion, without calls of tools",
    "rollout_func": "raftune's own sampler generates",
    "environment_factory": "a sample is one completion, without turns of an environment",
}


def _checked(args: Any, model: Any) -> RaftConfig:
    if args is None:
        return RaftConfig(output_dir=_default_folder(model))
    if not isinstance(args, RaftConfig):
        raise ConfigError(
            f"args must be a RaftConfig; got {type(args).__name__}. Write RaftConfig(…) with the same arguments."
        )
    return args


def _refuse_extras(extras: dict[str, Any], optimizers: tuple[Any, Any], strict: bool) -> None:
    """Raises ConfigError for what would make another model than was asked for; warns of it where not `strict`."""
    lines = [f"{name} must be None: {EXTRAS[name]}. Remove it." for name, value in extras.items() if value]
    if any(optimizer is not None for optimizer in optimizers):
        lines.append(
            "optimizers must be (None, None): every round trains a newly loaded model under a fresh schedule. Set "
            "optim, learning_rate and lr_scheduler_type."
        )
    if lines and strict:
        raise ConfigError("\n".join(lines))
    if lines:
        logger.warning("strict=False, so the run goes on without what was asked for:\n%s", "\n".join(lines))


def _default_folder(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
    return f"runs/{str(name).rstrip('/').rsplit('/', 1)[-1]}-RAFT"


def _columns(args: RaftConfig, planned: RunConfig) -> Callable[[str], bool] | None:
    """Which columns the rewards see: all, or with remove_unused_columns only what the run itself reads."""
    if not args.remove_unused_columns:
        return None
    read = {planned.data.prompt_column, *planned.sampling.candidate_columns, planned.evaluation.reference_column}
    return lambda name: name in read


def _handler(args: RaftConfig, callbacks: Sequence[Any]) -> RoundCallbackHandler:
    try:
        reporting = get_reporting_integration_callbacks(args.report_to)
        return RoundCallbackHandler([RoundFlow(), *reporting, *callbacks], None, None, None, None)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to must name what is installed; got {args.report_to}: {error}") from error


def _both(*observers: Any) -> Callback:
    """One observer that tells all; None is nobody."""
    listening: list[Callable[[str, dict[str, Any]], None]] = [one for one in observers if one is not None]

    def observe(kind: str, facts: dict[str, Any]) -> None:
        for listener in listening:
            listener(kind, facts)

    return observe

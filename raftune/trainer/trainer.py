"""RaftTrainer: RAFT with the interface of TRL's trainers."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as transformers_logging

from raftune.config.load import validate
from raftune.config.run import RunConfig, held_out_names
from raftune.errors import ConfigError, DataError, RaftuneError, StoreError
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.policies.causal_lm.policy import CausalLM
from raftune.results import round_metrics as metrics
from raftune.results.summary import best_round, read_json
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.evaluation_target import INHERITED, without_learning
from raftune.runtime.progress import Progress
from raftune.runtime.run import root_of, run
from raftune.starters.resolve import resolve_starters
from raftune.store.run import RunFolder
from raftune.trainer import publishing
from raftune.trainer.config import RaftConfig, mapping, outline, plain_process, run_of
from raftune.trainer.inputs import PromptInputs, held_out_inputs, prompt_inputs, reward_inputs
from raftune.trainer.interrupts import leaving_on_interrupt
from raftune.trainer.messages import in_python, python_advice
from raftune.trainer.models import load_tokenizer, model_inputs
from raftune.trainer.rounds import LazyModel, RoundCallbackHandler, RoundFlow, RoundTracker, StopAfterRound
from raftune.trainer.transformers_api import TransformersTrainerMixin
from raftune.training.devices import choose_device

logger = logging.getLogger("raftune")

ALL = 2**31  # prompts at most
EXTRAS = {
    "tools": "a sample is one completion, without calls of tools",
    "rollout_func": "raftune's own sampler generates",
    "environment_factory": "a sample is one completion, without turns of an environment",
}


class RaftTrainer(TransformersTrainerMixin):
    """Reward-ranked fine-tuning of a language model: each round trains on the best of K completions a prompt.

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
        if args is None:
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
            args = RaftConfig(output_dir=f"runs/{str(name or 'model').rstrip('/').rsplit('/', 1)[-1]}-RAFT")
        if not isinstance(args, RaftConfig):
            raise ConfigError(
                f"args must be a RaftConfig; got {type(args).__name__}. Write RaftConfig(…) with the same arguments."
            )
        errors: list[RaftuneError] = []  # of all arguments, reported together

        def attempt(step: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return step(*arguments)
            except RaftuneError as error:
                errors.append(error)

        extras = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        attempt(_check_extras, extras, optimizers, args.strict)
        init = mapping(args.model_init_kwargs, "model_init_kwargs")
        trust, strict = args.trust_remote_code, args.strict
        inputs = attempt(model_inputs, model, processing_class, peft_config, init, trust, quantization_config, strict)
        rewards = attempt(reward_inputs, reward_funcs, reward_processing_classes, args.reward_weights)
        config = outline(args)
        evaluated, size = config.evaluation.num_prompts, config.prompts_per_round
        self._columns: Callable[[str], bool] | None = None  # all columns reach the rewards
        if args.remove_unused_columns:
            read = {config.data.prompt_column, *config.sampling.candidate_columns, config.evaluation.reference_column}
            self._columns = lambda name: name in read
        needed = config.num_rounds * size + evaluated
        train = attempt(prompt_inputs, train_dataset, "train_dataset", self._columns, needed, size)
        held_out = PromptInputs("")
        if eval_dataset is not None:
            held_out = attempt(held_out_inputs, eval_dataset, self._columns, evaluated)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            kinds = {type(error) for error in errors}
            kind = kinds.pop() if len(kinds) == 1 else ConfigError
            raise kind("\n".join(map(str, errors))) from errors[0]
        self.args = args
        self._sections = {
            "policy": inputs.policy,
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
            model=inputs.model,
            tokenizer=inputs.tokenizer,
        )
        self.train_dataset, self.eval_dataset, self._original_eval = train_dataset, eval_dataset, eval_dataset
        self._tokenizer, self._model = inputs.tokenizer, None
        try:
            reporting = get_reporting_integration_callbacks(args.report_to)
            all_callbacks = [RoundFlow(), *reporting, *(callbacks or ())]
            self._handler = RoundCallbackHandler(all_callbacks, None, None, None, None)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to must name what is installed; got {args.report_to}: {error}") from error
        self._handler.processing_class = inputs.tokenizer
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
        checkpoint, root = resume_from_checkpoint or self.args.resume_from_checkpoint, self._run.root.resolve()
        if isinstance(checkpoint, (str, Path)):
            path = Path(checkpoint).resolve()
            if root not in (path, *path.parents):
                raise ConfigError(
                    f"resume_from_checkpoint must be left out; got {str(checkpoint)!r}. train() always continues the "
                    f"run in {self._run.root}; another run is continued by its own output_dir."
                )
        if self.args.log_level != "passive":
            transformers_logging.set_verbosity(self.args.get_process_log_level())
        self._model = None
        self.run_config = run_of(self.args, self._sections)  # a notebook's next cell may have changed self.args

        def encoder() -> TextEncoder:
            return TextEncoder(self.processing_class, self.run_config.sampling, None, 0)

        rounds = RoundTracker(self.args, self._handler, self._run, encoder)
        self.state, self.control = rounds.state, rounds.control
        self._handler.model = LazyModel(lambda: self._model_of_round(int(rounds.round)))
        with contextlib.suppress(RaftuneError):  # the run says what is wrong with the tokenizer
            self._handler.processing_class = self.processing_class
        rounds.start()
        with leaving_on_interrupt(), plain_process(), python_advice():
            try:
                with self._progress() as progress:

                    def observe(kind: str, facts: dict[str, Any]) -> None:
                        if progress is not None:
                            progress(kind, facts)
                        rounds(kind, facts)

                    reason = run(self.run_config, self._objects, observe=observe, redo=redo, only=only).reason
            except StopAfterRound as stop:
                reason = f"{stop}; train() goes on from there"
        rounds.end()
        self.control = rounds.control
        if not rounds.worked:
            logger.warning("The run in %s is finished: %s. Nothing had to be done.", self._run.root, reason)
        if self.args.disable_tqdm:  # else the progress has shown them
            for note in rounds.notes:
                logger.warning(in_python(note))
        best = self._best()
        self.state.best_model_checkpoint = str(self._run.folder(best, "model"))
        if rounds.done and best == 0:
            logger.warning(
                "No round was better than the start by %s: trainer.model, save_model and push_to_hub give the start "
                "model%s. More or other rounds, rewards or held-out prompts may change that.",
                self.run_config.evaluation.best_by,
                " with an adapter of zero effect" if self._policy().adapter else "",
            )
        if self.args.push_to_hub:
            self.push_to_hub()
        summary = {**rounds.summary, "best_round": best, "stopped_because": reason}
        summary |= metrics.held_out(self._metrics_of_best(), ends=True)
        return TrainOutput(self.state.global_step, rounds.summary.get("train_loss", 0.0), summary)

    def _progress(self) -> Any:
        if self.args.disable_tqdm:
            return contextlib.nullcontext()
        return Progress(held_out=held_out_names(self.run_config))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of the best round's model, under TRL's names.

        On `eval_dataset`, or a dictionary of several, completions for all its prompts are generated and scored now;
        before any round is done, by the initial model. A trainer with a dictionary evaluates each data set in it.
        Without one these are the run's own held-out prompts, as they were measured when the round ended.
        """
        several = isinstance(self.eval_dataset, Mapping)  # which the rounds were evaluated on together
        if eval_dataset is None and (several or self.eval_dataset is not self._original_eval):
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            best = self._best()
            measured = self._metrics_of_best()
            if not measured:
                raise ConfigError(
                    f"evaluate() needs held-out prompts; got none with num_eval_prompts={self.args.num_eval_prompts}. "
                    "Give eval_dataset, or ten prompts or more: a tenth of them is held out."
                )
            return metrics.held_out(measured, metric_key_prefix, ends=True) | {"epoch": float(best)}
        datasets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        prompts = {
            str(name): prompt_inputs(rows, "eval_dataset", self._columns, ALL) for name, rows in datasets.items()
        }
        result: dict[str, float] = {}
        with leaving_on_interrupt(), plain_process(), python_advice():
            for name, rows in prompts.items():
                start_time = time.perf_counter()
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                values = metrics.held_out(self._measure(rows), prefix, ends=True)
                seconds = time.perf_counter() - start_time
                samples = sum(count for key, count in values.items() if key.startswith(f"{prefix}_statuses/"))
                result |= {**values, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": samples / seconds}
        result["epoch"] = float(self._best() if self._has_model() else 0)
        self.state.log_history.append({**result, "step": self.state.global_step})
        self.control = self._handler.on_evaluate(self.args, self.state, self.control, metrics=result)
        return result

    def _metrics_of_best(self) -> dict[str, Any]:
        """Metrics of the best round at its end; empty without held-out prompts."""
        return read_json(self._run.folder(self._best(), "evaluate") / "metrics.json")

    def _measure(self, prompts: PromptInputs) -> dict[str, Any]:
        """The metrics of the best round's model on all of these prompts; before a run, of the start.

        Completions are as many and as long as those for the run's held-out prompts, under the same seeds.
        """
        plain = self.run_config.model_dump(mode="json")
        sections = without_learning({name: plain[name] for name in ("policy", *INHERITED)})
        objects = replace(self._objects, train=None, held_out=prompts.table)
        if self._has_model():
            folder, start = (self._run.folder(number, "model").resolve() for number in (self._best(), 0))
            sections["policy"] = CausalLM.section_at(plain["policy"], folder, start)
            objects = replace(objects, model=None, tokenizer=None)
        sections["evaluation"] |= {"prompts": prompts.source, "num_prompts": ALL, "best_by": "reward", "kl": False}
        sections["evaluation"] |= {"reference_column": None, "features": None}
        sections["data"] |= {"prompts": None, "limit": None}
        with self._progress() as progress, tempfile.TemporaryDirectory(prefix="raftune-evaluation-") as root:
            config = validate({**sections, "output_dir": root, "num_rounds": 0, "report": False})
            run(config, objects, observe=progress or (lambda kind, facts: None))
            measured: dict[str, Any] = read_json(RunFolder(root).folder(0, "evaluate") / "metrics.json")
        if not measured:
            raise DataError("eval_dataset must hold at least one prompt; got none.")
        return measured

    # -- the trained model ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The best round's model, of transformers or peft, in eval mode; before the first round the initial model."""
        if self._model is None:
            self._model = self._model_of_round(self._best() if self._has_model() else 0)
        return self._model

    def _model_of_round(self, round_: int) -> Any:
        """The round's model; before there is a run the initial one, with peft_config under its new adapter."""
        policy = self._policy()
        if self._has_model():
            return publishing.load_round(policy, self._run, round_)
        model, keep = self._objects.model, policy.adapter is None
        if model is None:
            model = loading.load_weights(policy, policy.model, policy.revision, choose_device(policy.device))
        elif isinstance(model, PeftModel):
            keep = True
        elif not keep:
            model = copy.deepcopy(model)
        return model if keep else loading.fresh_adapter(model, policy.adapter, seed=0).eval()

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
        options = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
            **options,
        }
        with python_advice():
            return publishing.push(self._run, self._policy(), self.hub_model_id, commit_message, options)

    @property
    def _run(self) -> RunFolder:
        return RunFolder(root_of(self.run_config))

    def _has_model(self) -> bool:
        return (self._run.root / "best.json").is_file()

    def _policy(self) -> Any:
        return resolve_starters(self.run_config).policy

    def _best(self) -> int:
        """The number of the best round. Raises StoreError before there is one."""
        best = best_round(self._run.root)
        if best is None:
            raise StoreError(f"{self._run.root} has no trained model yet: no round is done. Call train() first.")
        return best


def _check_extras(extras: dict[str, Any], optimizers: tuple[Any, Any], strict: bool) -> None:
    """Raises ConfigError for arguments by which another model would come of it; warns of them if not `strict`."""
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

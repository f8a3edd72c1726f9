"""RaftConfig: flat arguments with TRL's names, mapped to a run's configuration."""

# ruff: noqa: RUF009 - `_arg` makes a field of a dataclass

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from raftune.config.load import merge, nested, validate
from raftune.config.training import TRAINER_KWARGS
from raftune.errors import ConfigError
from raftune.sanitize import first_line
from raftune.trainer.arguments import MAPPED, BorrowedArguments, default_of, unknown, unread

logger = logging.getLogger("raftune")

_SAME_NAME = {
    "sampling": (
        *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "generation_kwargs", "chat_template_kwargs"),
    ),
    "training": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs"),
        *("max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16"),
        *("gradient_checkpointing", "save_steps", "mask_truncated_completions", "replay_rounds", "start_from"),
        *("processes", "parallel"),
    ),
}
# From the flat name to the field of RunConfig.
TABLE: dict[str, str] = {
    **{name: name for name in ("output_dir", "seed", "num_rounds", "prompts_per_round", "keep_models")},
    **{name: f"{section}.{name}" for section, names in _SAME_NAME.items() for name in names},
    "beta": "selection.beta",
    "num_eval_prompts": "evaluation.num_prompts",
    "num_generations_eval": "evaluation.num_generations",
    "metric_for_best_model": "evaluation.best_by",
    "use_cpu": "policy.device",
    "trust_remote_code": "policy.trust_remote_code",
    "empty_rounds": "stop.empty_rounds",
    "workers": "engine.workers",
}
# From the argument of RaftTrainer to the field.
_OF_TRAINER = {
    "model": "policy.model",
    "processing_class": "policy.tokenizer",
    "peft_config": "policy.adapter",
    "train_dataset": "data.prompts",
    "eval_dataset": "evaluation.prompts",
    "reward_funcs": "rewards.reward_funcs",
}
# Read by RaftTrainer itself.
OWN = (
    "strict",
    *("selection", "reward_weights", "model_init_kwargs", "run_config", "log_completions", "num_completions_to_print"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "log_level", "resume_from_checkpoint"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
)
# Left at their defaults while TrainingArguments checks the others: it would act on them, or fail.
_HIDDEN_FROM_TRANSFORMERS = (
    *("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "load_best_model_at_end"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "dataloader_prefetch_factor"),
    *("fp16_full_eval", "bf16_full_eval", "ddp_backend", "ddp_timeout"),
)


def _arg(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


def _accept_any_name(cls: type[Any]) -> type[Any]:
    """Lets the dataclass's constructor take any name; `__post_init__` reports those that are no arguments."""
    plain: Callable[..., None] = vars(cls)["__init__"]
    names = {f.name for f in fields(cls) if f.init}

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **options: Any) -> None:
        self._unknown = [name for name in options if name not in names]
        plain(self, *args, **{name: value for name, value in options.items() if name in names})

    any_class: Any = cls
    any_class.__init__ = init
    return cls


@_accept_any_name
@dataclass
class RaftConfig(BorrowedArguments, TrainingArguments):  # type: ignore[misc]
    """The arguments of a RAFT run under TRL's and transformers' names.

    Epochs, steps, batch size and learning rate mean the training of *one round*, whose schedule starts anew. Other
    arguments of TrainingArguments and GRPOConfig are accepted if they change nothing, accepted with a warning if they
    are a part of GRPO alone, and refused with ConfigError, all in one message, if another model would come of them;
    with `strict=False` these are warned of too. Fields of RunConfig without a name here go into `run_config`.
    """

    output_dir: str | None = _arg(None, "The run's directory; None is runs/RUN_NAME.")
    # -- the rounds --
    num_rounds: int = _arg(8, "Rounds at most: generate, score, keep the best, fine-tune.")
    prompts_per_round: int = _arg(64, "Prompts in each round, without replacement.")
    selection: dict[str, Any] | str | None = _arg(
        None, "What is kept: a rule's name, or its fields such as {'rule': 'top_m', 'm': 2}; None: the best of K."
    )
    reward_weights: list[float] | None = _arg(None, "One factor for each reward function; None: 1 for each.")
    beta: float = _arg(
        0.0, "Acts on the ranking, not on a loss: completions are ranked by reward - beta * log(p / p_start)."
    )
    start_from: str = _arg("previous", "Each round's training starts from the `previous` round or the `start`.")
    replay_rounds: int = _arg(0, "Earlier rounds whose kept completions are trained on again.")
    empty_rounds: int = _arg(
        3, "Stop after so many rounds in a row with nothing to learn from; each leaves the policy as is."
    )
    keep_models: str = _arg("all", "Models of older rounds to keep: all, best or last.")
    workers: int = _arg(1, "Local processes that generate; 1 is this process alone.")
    # -- the generation --
    num_generations: int = _arg(8, "K, completions generated for each prompt.")
    max_completion_length: int = _arg(512, "Tokens generated at most.")
    temperature: float = _arg(1.0, "Divides the logits; 0 is greedy.")
    top_p: float = _arg(1.0, "Nucleus; 1 is off.")
    top_k: int = _arg(0, "Only the k likeliest tokens; 0 is off.")
    min_p: float | None = _arg(None, "Drops tokens below this share of the likeliest; None is off.")
    repetition_penalty: float = _arg(1.0, "1 is off.")
    generation_kwargs: dict[str, Any] | str | None = _arg(
        None, "Anything else `generate` takes; the generation then goes through `generate`."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _arg(None, "For the chat template.")
    # -- the model --
    model_init_kwargs: dict[str, Any] | str | None = _arg(
        None, "For from_pretrained, where the model is given by name; dtype is float32 otherwise."
    )
    trust_remote_code: bool = _arg(False, "Run code that comes with the model.")
    # -- the held-out prompts --
    num_eval_prompts: int = _arg(
        64, "Held-out prompts after every round; 0 turns it off. Without eval_dataset a tenth is held out."
    )
    num_generations_eval: int | None = _arg(None, "Completions to each held-out prompt; None: 4.")
    load_best_model_at_end: bool = _arg(False, "Holds in any case: the best round is what is published.")
    metric_for_best_model: str | None = _arg(None, "What the best round is chosen by: 'reward', or one reward's name.")
    # -- the training of a round, where defaults differ from TrainingArguments' --
    learning_rate: float = _arg(1e-5, "Peak rate of each round's own schedule.")
    num_train_epochs: float = _arg(1.0, "Passes over the kept completions in each round.")
    max_steps: int = _arg(-1, "Optimizer steps in each round, in place of epochs; -1 is off.")
    processes: int | str = _arg(1, "Processes that train together, a GPU for each; 'auto': one for each visible GPU.")
    parallel: str = _arg("ddp", "What they hold: 'ddp', each the whole model, or 'fsdp', each a shard of it.")
    save_steps: float = _arg(100, "Optimizer steps between checkpoints inside a round.")
    mask_truncated_completions: bool = _arg(False, "Do not learn from completions that were cut off.")
    # -- what is shown --
    logging_steps: float = _arg(10, "The loss is logged every so many steps, the rest by round.")
    remove_unused_columns: bool = _arg(False, "Every column reaches the rewards.")
    log_completions: bool = _arg(False, "Show kept completions after each round.")
    num_completions_to_print: int | None = _arg(8, "How many of them; None: all.")
    # -- everything else --
    strict: bool = _arg(True, "Refuse arguments that cannot be had; off: warn, and go on without them.")
    run_config: dict[str, Any] | str | None = _arg(
        None, "Fields of RunConfig without a name here: {'training.loss_normalization': 'sample'}."
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - a class attribute of TrainingArguments
        *getattr(TrainingArguments, "_VALID_DICT_FIELDS", ()),
        *("selection", "generation_kwargs", "chat_template_kwargs", "model_init_kwargs", "run_config"),
    ]

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/{_slug(self.run_name or 'raft')}"
        for name in ("checkpointing", "checkpointing_kwargs"):  # the older name without transformers' warning
            if getattr(self, f"activation_{name}", None) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        arguments = [*TABLE, *TRAINER_KWARGS, *OWN, *MAPPED]
        refused, without = unread(self, TrainingArguments, arguments)
        refused += unknown(getattr(self, "_unknown", ()), arguments)
        faults: list[str] = []
        if (count := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            faults.append(
                f"RaftTrainer must be one process; got WORLD_SIZE={count} from a launcher. Start the script with plain "
                "`python`: it starts its own, `processes='auto'` to train on all GPUs, `workers=N` to generate."
            )
        faults += refused if self.strict else []
        hidden = {name: getattr(self, name) for name in _HIDDEN_FROM_TRANSFORMERS}
        for name in hidden:
            setattr(self, name, default_of(TrainingArguments, name))
        try:
            with plain_process():
                super().__post_init__()
        except (ValueError, TypeError, ImportError) as error:
            faults.append(first_line(error))
        for name, value in hidden.items():
            setattr(self, name, value)
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            faults.append(
                f"lr_scheduler_type must go by steps; got {schedule}, which goes by evaluations, and "
                "there is none inside a round. Write 'cosine', for example."
            )
        if self.load_best_model_at_end:
            self.metric_for_best_model = self.metric_for_best_model or "reward"
            self.greater_is_better = True
        try:
            outline(self)
        except ConfigError as error:
            faults += str(error).splitlines()
        if faults:
            raise ConfigError("\n".join(dict.fromkeys(faults)))
        if without:
            lines = [f"  {', '.join(names)}: {reason}" for reason, names in without.items()]
            logger.warning(
                "These arguments have no part in a RAFT run, which goes on without them:\n%s", "\n".join(lines)
            )
        if refused:
            logger.warning("strict=False, so the run goes on without what was asked for:\n%s", "\n".join(refused))

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', without the arguments of GRPO that a run does not read."""
        borrowed = {field.name for field in fields(BorrowedArguments)} - {*MAPPED}
        return {name: value for name, value in super().to_dict().items() if name not in borrowed}


@contextlib.contextmanager
def plain_process() -> Iterator[None]:
    """The environment without variables of `accelerate launch` and torchrun: the configuration alone decides."""
    launcher = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    removed = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(launcher)}
    try:
        yield
    finally:
        os.environ.update(removed)


def outline(args: RaftConfig) -> Any:
    """The RunConfig with placeholders for model and data. Raises ConfigError for a value that breaks its rule."""
    return run_of(args, {"policy": {"family": "causal_lm", "model": "-"}, "data": {"prompts": "-"}})


def run_of(args: RaftConfig, inputs: Mapping[str, Any]) -> Any:
    """The RunConfig of the arguments, under `inputs` (model, data, rewards) and `run_config`. Raises ConfigError."""
    values = {name: getattr(args, name) for name in TABLE}
    if args.num_iterations != 1:  # passes over the samples of one generation
        values["num_train_epochs"] = args.num_train_epochs * args.num_iterations
    if args.warmup_ratio and not args.warmup_steps:
        values["warmup_steps"] = args.warmup_ratio
    if args.save_total_limit is not None and args.save_total_limit <= args.num_rounds and args.keep_models == "all":
        values["keep_models"] = "best"  # which keeps the last as well
    if args.top_k in (-1, None):
        values["top_k"] = 0
    if args.save_steps < 1:  # a share of all steps, which no round knows
        values["save_steps"] = default_of(RaftConfig, "save_steps")
    if values["save_steps"] == int(values["save_steps"]):
        values["save_steps"] = int(values["save_steps"])
    values["use_cpu"] = "cpu" if args.use_cpu or args.no_cuda else "auto"
    for name in ("lr_scheduler_type", "optim"):
        if values[name] is not None:
            values[name] = str(getattr(values[name], "value", values[name]))
    if (metric := args.metric_for_best_model) is not None:  # `eval_reward`, `eval_rewards/NAME/mean`
        metric = metric.removeprefix("eval_")
        of_reward = re.fullmatch(r"(?:held_out/)?rewards/(.+)/mean", metric)
        values["metric_for_best_model"] = of_reward[1] if of_reward else metric
    flat = {TABLE[name]: value for name, value in values.items() if value is not None}
    if args.max_prompt_length is not None:
        flat["sampling.max_prompt_length"] = args.max_prompt_length
    passed = {n: getattr(args, n) for n in TRAINER_KWARGS if getattr(args, n) != default_of(TrainingArguments, n)}
    flat |= {"name": _slug(Path(str(args.output_dir)).name), "training.trainer_kwargs": passed}
    if isinstance(args.selection, str) and not args.selection.startswith("{"):
        selection = {"rule": args.selection}
    else:
        selection = mapping(args.selection, "selection")
    if selection.get("beta", args.beta) != args.beta and args.beta:
        raise ConfigError(f"beta must be said once; got {args.beta} and {selection['beta']} in selection. Remove one.")
    extra = nested(copy.deepcopy(mapping(args.run_config, "run_config")))
    try:
        return validate(merge([nested(flat), {"selection": selection}, inputs, extra]))
    except ConfigError as error:
        raise ConfigError(flat_names(str(error))) from error


def flat_names(message: str) -> str:
    """The message with the fields under the names that they have here."""
    for flat, dotted in (TABLE | _OF_TRAINER).items():
        if flat != dotted:
            message = re.sub(rf"\b{re.escape(dotted)}\b", flat, message)
    return message


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A copy of a dictionary argument, empty for None. Raises ConfigError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} must be a dictionary; got {type(value).__name__} {value!r}. Write {{'field': value}}."
        )
    return dict(value)


def _slug(text: str) -> str:
    """The text as a run's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-_")[:100] or "raft"

"""RaftConfig: flat arguments under TRL's names, and the one table that maps them to a run's configuration."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from raftune.config.load import merge, nested, validate
from raftune.errors import ConfigError
from raftune.trainer.refused import default_of, strangers, unread

# From the flat name to the field of RunConfig.
TABLE: dict[str, str] = {
    **{name: name for name in ("output_dir", "seed", "num_rounds", "prompts_per_round", "keep_models")},
    "num_generations": "sampling.num_generations",
    "max_completion_length": "sampling.max_completion_length",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "generation_kwargs": "sampling.generation_kwargs",
    "chat_template_kwargs": "sampling.chat_template_kwargs",
    "beta": "selection.beta",
    "per_device_train_batch_size": "tuning.per_device_train_batch_size",
    "gradient_accumulation_steps": "tuning.gradient_accumulation_steps",
    "learning_rate": "tuning.learning_rate",
    "num_train_epochs": "tuning.num_train_epochs",
    "max_steps": "tuning.max_steps",
    "lr_scheduler_type": "tuning.lr_scheduler_type",
    "warmup_steps": "tuning.warmup_steps",
    "weight_decay": "tuning.weight_decay",
    "max_grad_norm": "tuning.max_grad_norm",
    "optim": "tuning.optim",
    "bf16": "tuning.bf16",
    "gradient_checkpointing": "tuning.gradient_checkpointing",
    "save_steps": "tuning.save_steps",
    "mask_truncated_completions": "tuning.mask_truncated_completions",
    "replay_rounds": "tuning.replay_rounds",
    "start_from": "tuning.start_from",
    "num_eval_prompts": "evaluation.num_prompts",
    "num_generations_eval": "evaluation.num_generations",
    "metric_for_best_model": "evaluation.best_by",
    "use_cpu": "policy.device",
    "trust_remote_code": "policy.trust_remote_code",
    "workers": "engine.workers",
}
# What RaftTrainer is given, and the field that it becomes.
_GIVEN = {
    "model": "policy.model",
    "processing_class": "policy.tokenizer",
    "peft_config": "policy.adapter",
    "train_dataset": "data.prompts",
    "eval_dataset": "evaluation.prompts",
    "reward_funcs": "rewards.reward_funcs",
}
# What transformers' Trainer takes beside: only where it differs from its default.
PASSED_ON = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs"),
    *("neftune_noise_alpha", "fp16", "tf32", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    "dataloader_drop_last",
)
# What RaftTrainer itself reads.
OWN = (
    *("selection", "reward_weights", "model_init_kwargs", "run_config", "log_completions", "num_completions_to_print"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "log_level", "resume_from_checkpoint"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
)


def _best_by(name: str) -> str:
    """`eval_reward` and `eval_rewards/NAME/mean` as evaluation.best_by has them: `reward`, `NAME`."""
    plain = name.removeprefix("eval_")
    found = re.fullmatch(r"(?:held_out/)?rewards/(.+)/mean", plain)
    return found[1] if found else plain


_AS: dict[str, Callable[[Any], Any]] = {
    "use_cpu": lambda given: "cpu" if given else "auto",
    "metric_for_best_model": _best_by,
    **dict.fromkeys(("lr_scheduler_type", "optim"), lambda given: str(getattr(given, "value", given))),
    "save_steps": lambda given: int(given) if given == int(given) else given,
}


def refusing(cls: type[Any]) -> type[Any]:
    """The dataclass with a constructor that says why it does not take an argument, and which one was meant."""
    plain: Callable[..., None] = vars(cls)["__init__"]
    names = [f.name for f in fields(cls) if f.init]

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **given: Any) -> None:
        foreign = {name: value for name, value in given.items() if name not in names}
        if lines := strangers(foreign, names):
            raise ConfigError("\n".join(lines))
        plain(self, *args, **{name: value for name, value in given.items() if name in names})

    vars_of: Any = cls
    vars_of.__init__ = init
    return cls


@refusing
@dataclass
class RaftConfig(TrainingArguments):  # type: ignore[misc]
    """The arguments of a RAFT run under TRL's and transformers' names.

    Epochs, steps, batch size and learning rate mean the tuning of *one round*, whose schedule starts anew. An argument
    of TrainingArguments or of GRPOConfig that could have no effect raises ConfigError, saying why. What RunConfig has
    and this has not goes into `run_config`.
    """

    output_dir: str | None = field(default=None, metadata={"help": "The run's directory; None is runs/RUN_NAME."})
    # -- the rounds --
    num_rounds: int = field(default=8, metadata={"help": "Rounds at most: draw, score, keep the best, fine-tune."})
    prompts_per_round: int = field(default=64, metadata={"help": "Prompts in each round, without replacement."})
    selection: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What is kept: a rule's name, or its fields such as {'rule': 'top_m', 'm': 2}; None: the best of K."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One factor for each reward function; None: 1 for each."}
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Acts on the ranking, not on a loss: answers are ranked by reward - beta * log(p / p_start)."
        },
    )
    start_from: str = field(
        default="previous", metadata={"help": "Each fit begins from the `previous` round or the `start`."}
    )
    replay_rounds: int = field(default=0, metadata={"help": "Earlier rounds whose kept answers are trained on again."})
    keep_models: str = field(default="all", metadata={"help": "Models of older rounds to keep: all, best or last."})
    workers: int = field(default=1, metadata={"help": "Local processes that draw; 1 is this process alone."})
    # -- the draw --
    num_generations: int = field(default=8, metadata={"help": "K, answers drawn for each prompt."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens drawn at most."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Only the k likeliest tokens; 0 is off."})
    min_p: float | None = field(
        default=None, metadata={"help": "Drops tokens below this share of the likeliest; None is off."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "1 is off."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Anything else `generate` takes; the draw then goes through `generate`."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "For the chat template."})
    # -- the model --
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For from_pretrained, where the model is given by name; dtype is float32 otherwise."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    # -- the held-out prompts --
    num_eval_prompts: int = field(
        default=64,
        metadata={
            "help": "Held-out prompts after every round; 0 turns it off. Without eval_dataset a tenth is held out."
        },
    )
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Answers to each held-out prompt; None: 4."}
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Holds in any case: the best round is what is published."}
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What the best round is chosen by: 'reward', or one reward's name."}
    )
    # -- the tuning of a round, where we differ from TrainingArguments --
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak rate of each round's own schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the kept answers in each round."})
    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps in each round, in place of epochs; -1 is off."}
    )
    save_steps: float = field(default=100, metadata={"help": "Optimizer steps between checkpoints inside a round."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not learn from answers that were cut off."}
    )
    # -- what is shown --
    logging_steps: float = field(
        default=10, metadata={"help": "The loss is logged every so many steps, the rest by round."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Every column reaches the rewards."})
    log_completions: bool = field(default=False, metadata={"help": "Show kept answers after each round."})
    num_completions_to_print: int | None = field(default=8, metadata={"help": "How many of them; None: all."})
    # -- everything else --
    run_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of RunConfig without a name here: {'tuning.loss_normalization': 'sample'}."},
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - a class attribute of TrainingArguments
        *getattr(TrainingArguments, "_VALID_DICT_FIELDS", ()),
        *("selection", "generation_kwargs", "chat_template_kwargs", "model_init_kwargs", "run_config"),
    ]

    def __post_init__(self) -> None:
        _refuse_launcher()
        self.output_dir = self.output_dir or f"runs/{_slug(self.run_name or 'raft')}"
        if lines := unread(self, TrainingArguments, [*TABLE, *PASSED_ON, *OWN]):
            raise ConfigError("\n".join(lines))
        if self.logging_strategy == "steps" and self.logging_steps < 1:
            raise ConfigError(
                f"logging_steps must be at least 1; got {self.logging_steps}. Give whole steps: rounds differ."
            )
        best = self.load_best_model_at_end  # holds in any case; TrainingArguments would ask for matching strategies
        self.load_best_model_at_end = False
        super().__post_init__()
        self.load_best_model_at_end = best
        if best:
            self.metric_for_best_model = self.metric_for_best_model or "reward"
            self.greater_is_better = True
        check(self)


def check(args: RaftConfig) -> None:
    """Raises ConfigError for a value that breaks its rule, before any model or data is looked at."""
    run_of(args, {"policy": {"family": "causal_lm", "model": "-"}, "data": {"prompts": "-"}})


def run_of(args: RaftConfig, given: Mapping[str, Any]) -> Any:
    """The RunConfig of the arguments, under `given` (model, data, rewards) and `run_config`. Raises ConfigError."""
    layers = [sections(args), given, nested(copy.deepcopy(mapping(args.run_config, "run_config")))]
    try:
        return validate(merge(layers))
    except ConfigError as error:
        raise ConfigError(flat_names(str(error))) from error


def sections(args: RaftConfig) -> dict[str, Any]:
    """The arguments as sections of a RunConfig: what is None is left to the default there."""
    values = {name: getattr(args, name) for name in TABLE}
    flat = {TABLE[name]: _AS.get(name, _same)(value) for name, value in values.items() if value is not None}
    passed = {n: getattr(args, n) for n in PASSED_ON if getattr(args, n) != default_of(TrainingArguments, n)}
    own = {"name": _slug(Path(str(args.output_dir)).name), "tuning": {"trainer_kwargs": passed}}
    return merge([nested(flat), {"selection": selection_of(args)}, own])


def selection_of(args: RaftConfig) -> dict[str, Any]:
    """The section `selection`: the rule by name, or the fields as given. `beta` is said once."""
    given = args.selection
    if isinstance(given, str) and not given.startswith("{"):
        return {"rule": given}
    found = mapping(given, "selection")
    if "beta" in found and found["beta"] != args.beta and args.beta:
        raise ConfigError(f"beta must be said once; got {args.beta} and {found['beta']} in selection. Remove one.")
    return found


def flat_names(message: str) -> str:
    """The message with the fields under the names that they have here."""
    for flat, dotted in (TABLE | _GIVEN).items():
        if flat != dotted:
            message = re.sub(rf"\b{re.escape(dotted)}\b", flat, message)
    return message


def mapping(given: Any, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{name} must be a dictionary; got {type(given).__name__} {given!r}. Write {{'field': value}}."
        )
    return dict(given)


def _same(value: Any) -> Any:
    return value


def _slug(text: str) -> str:
    """The text as a run's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-_")[:100] or "raft"


def _refuse_launcher() -> None:
    """Raises ConfigError under `accelerate launch` or torchrun with several processes."""
    if (count := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise ConfigError(
            f"RaftTrainer must be one process; got WORLD_SIZE={count} from a launcher. Start the script with plain "
            "`python`: it takes one device, and `workers=N` draws and scores in N local processes."
        )

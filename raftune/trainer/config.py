"""RaftConfig: flat arguments with TRL's names, mapped to a run's configuration."""

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
from raftune.errors import ConfigError
from raftune.sanitize import first_line
from raftune.trainer.refused import (
    KEPT_FROM_TRANSFORMERS,
    MAPPED,
    BorrowedArguments,
    default_of,
    unknown,
    unread,
    warning_of,
)

logger = logging.getLogger("raftune")

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
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "num_train_epochs": "training.num_train_epochs",
    "max_steps": "training.max_steps",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "warmup_steps": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "optim": "training.optim",
    "bf16": "training.bf16",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "save_steps": "training.save_steps",
    "mask_truncated_completions": "training.mask_truncated_completions",
    "replay_rounds": "training.replay_rounds",
    "start_from": "training.start_from",
    "num_eval_prompts": "evaluation.num_prompts",
    "num_generations_eval": "evaluation.num_generations",
    "metric_for_best_model": "evaluation.best_by",
    "use_cpu": "policy.device",
    "trust_remote_code": "policy.trust_remote_code",
    "empty_rounds": "stop.empty_rounds",
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
    "strict",
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


def taking_any_name(cls: type[Any]) -> type[Any]:
    """The dataclass with a constructor that takes any name; `__post_init__` names those that are no arguments."""
    plain: Callable[..., None] = vars(cls)["__init__"]
    names = {f.name for f in fields(cls) if f.init}

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **given: Any) -> None:
        self._unknown = [name for name in given if name not in names]
        plain(self, *args, **{name: value for name, value in given.items() if name in names})

    vars_of: Any = cls
    vars_of.__init__ = init
    return cls


@taking_any_name
@dataclass
class RaftConfig(BorrowedArguments, TrainingArguments):  # type: ignore[misc]
    """The arguments of a RAFT run under TRL's and transformers' names.

    Epochs, steps, batch size and learning rate mean the training of *one round*, whose schedule starts anew. Of other
    arguments of TrainingArguments and GRPOConfig, those that change nothing are accepted, those that are a part of
    GRPO alone with a warning, and those by which another model would come of it raise ConfigError, all in one message;
    with `strict=False` these are warned of too. What RunConfig has and this has not goes into `run_config`.
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
    empty_rounds: int = field(
        default=3,
        metadata={
            "help": "Stop after so many rounds in a row with nothing to learn from; each leaves the policy as is."
        },
    )
    keep_models: str = field(default="all", metadata={"help": "Models of older rounds to keep: all, best or last."})
    workers: int = field(default=1, metadata={"help": "Local processes that generate; 1 is this process alone."})
    # -- the generation --
    num_generations: int = field(default=8, metadata={"help": "K, answers generated for each prompt."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens generated at most."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus; 1 is off."})
    top_k: int = field(default=0, metadata={"help": "Only the k likeliest tokens; 0 is off."})
    min_p: float | None = field(
        default=None, metadata={"help": "Drops tokens below this share of the likeliest; None is off."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "1 is off."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Anything else `generate` takes; the generation then goes through `generate`."}
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
    # -- the training of a round, where we differ from TrainingArguments --
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
    strict: bool = field(
        default=True, metadata={"help": "Refuse arguments that cannot be had; off: warn, and go on without them."}
    )
    run_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of RunConfig without a name here: {'training.loss_normalization': 'sample'}."},
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
        known = [*TABLE, *PASSED_ON, *OWN, *MAPPED]
        foreign, without = unread(self, TrainingArguments, known)
        foreign = [*foreign, *unknown(getattr(self, "_unknown", ()), known)]
        faults = [*_launched(), *(foreign if self.strict else ())]
        faults += _faults(self._settle)
        schedule = _AS["lr_scheduler_type"](self.lr_scheduler_type)
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            faults.append(
                f"lr_scheduler_type must go by steps; got {schedule}, which goes by evaluations, and "
                "there is none inside a round. Write 'cosine', for example."
            )
        if self.load_best_model_at_end:
            self.metric_for_best_model = self.metric_for_best_model or "reward"
            self.greater_is_better = True
        faults += _faults(lambda: outline(self))
        if faults:
            raise ConfigError("\n".join(dict.fromkeys(faults)))
        if without:
            logger.warning(warning_of(without))
        if foreign:
            logger.warning("strict=False, so the run goes on without what was asked for:\n%s", "\n".join(foreign))

    def _settle(self) -> None:
        """TrainingArguments' own checks and normal forms, without what it would act on in our place."""
        kept = {name: getattr(self, name) for name in KEPT_FROM_TRANSFORMERS}
        for name in kept:
            setattr(self, name, default_of(TrainingArguments, name))
        try:
            with plain_process():
                super().__post_init__()
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(first_line(error)) from error
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', for those who log it: without the arguments of GRPO that a run does not read."""
        unread_names = {field.name for field in fields(BorrowedArguments)} - {*MAPPED}
        return {name: value for name, value in super().to_dict().items() if name not in unread_names}


def _faults(attempt: Callable[[], Any]) -> list[str]:
    """The lines of the ConfigError that the call raises; none where it does not."""
    try:
        attempt()
    except ConfigError as error:
        return str(error).splitlines()
    return []


@contextlib.contextmanager
def plain_process() -> Iterator[None]:
    """The environment without what `accelerate launch` and torchrun leave in it: the configuration alone decides."""
    left = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    kept = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(left)}
    try:
        yield
    finally:
        os.environ.update(kept)


def outline(args: RaftConfig) -> Any:
    """The RunConfig as far as the arguments say it. Raises ConfigError for a value that breaks its rule."""
    return run_of(args, {"policy": {"family": "causal_lm", "model": "-"}, "data": {"prompts": "-"}})


def run_of(args: RaftConfig, given: Mapping[str, Any]) -> Any:
    """The RunConfig of the arguments, under `given` (model, data, rewards) and `run_config`. Raises ConfigError."""
    layers = [sections(args), given, nested(copy.deepcopy(mapping(args.run_config, "run_config")))]
    try:
        return validate(merge(layers))
    except ConfigError as error:
        raise ConfigError(flat_names(str(error))) from error


def sections(args: RaftConfig) -> dict[str, Any]:
    """The arguments as sections of a RunConfig: what is None is left to the default there."""
    values = {name: getattr(args, name) for name in TABLE} | _mapped(args)
    flat = {TABLE[name]: _AS.get(name, _same)(value) for name, value in values.items() if value is not None}
    if args.max_prompt_length is not None:
        flat["sampling.max_prompt_length"] = args.max_prompt_length
    passed = {n: getattr(args, n) for n in PASSED_ON if getattr(args, n) != default_of(TrainingArguments, n)}
    own = {"name": _slug(Path(str(args.output_dir)).name), "training": {"trainer_kwargs": passed}}
    return merge([nested(flat), {"selection": selection_of(args)}, own])


def _mapped(args: RaftConfig) -> dict[str, Any]:
    """The arguments that other names of TRL and transformers stand for."""
    found: dict[str, Any] = {}
    if args.num_iterations != 1:  # passes over what one generation gave
        found["num_train_epochs"] = args.num_train_epochs * args.num_iterations
    if args.warmup_ratio and not args.warmup_steps:
        found["warmup_steps"] = args.warmup_ratio
    if args.save_total_limit is not None and args.save_total_limit <= args.num_rounds and args.keep_models == "all":
        found["keep_models"] = "best"  # which keeps the last as well
    if args.top_k in (-1, None):
        found["top_k"] = 0
    if args.no_cuda:
        found["use_cpu"] = True
    if args.save_steps < 1:  # a share of all steps, which no round knows
        found["save_steps"] = default_of(RaftConfig, "save_steps")
    return found


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


def _launched() -> list[str]:
    """What to say under `accelerate launch` or torchrun with several processes."""
    if (count := os.environ.get("WORLD_SIZE", "1")) in ("", "1"):
        return []
    return [
        f"RaftTrainer must be one process; got WORLD_SIZE={count} from a launcher. Start the script with plain "
        "`python`: it takes one device, and `workers=N` generates and scores in N local processes."
    ]

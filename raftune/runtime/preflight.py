"""Checks a valid configuration for problems before the run starts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec

from raftune.config.guards import ALIKE_ALARMS, PICTURE_ALARMS, TEXT_ALARMS
from raftune.config.sampling import load_backend
from raftune.config.selection import Random, TopM
from raftune.config.training import CustomTraining
from raftune.errors import ConfigError, RunDamaged
from raftune.evaluation.metrics import load_metrics
from raftune.protocols import (
    SupportsBackends,
    SupportsObjectives,
    SupportsPromptCheck,
    SupportsServers,
    SupportsTrainer,
)
from raftune.records import LATENTS
from raftune.rewards.reward_set import incompatible_rewards
from raftune.runtime.assembly import CONDENSE, TEXTS, Runtime
from raftune.runtime.distributed import check_processes, launched_processes
from raftune.selection import load_rule
from raftune.stages.gather import prompts_of, reference_rows
from raftune.store.parquet import column_names
from raftune.training.objectives import load_objective

# Optimizers by a pattern of their names, and the package that each needs.
OPTIMIZERS = {
    "bitsandbytes": r"^(adamw_bnb_8bit|adamw_8bit|ademamix|lion_|paged_|rmsprop_bnb)",
    "galore_torch": "^galore_",
    "lomo_optim": "lomo$",
    "grokadamw": "^grokadamw",
    "schedulefree": "^schedule_free_",
    "apollo_torch": "^apollo_",
    "torchao": r"^adamw_torch_[48]bit$",
}


def preflight(runtime: Runtime) -> None:
    """Raises ConfigError with a line for each thing that cannot work: a missing reward, beta without log-probabilities,
    a rule that can never select, an alarm that can never be raised, a reward of texts on images, and the like.

    Raises DataError for reference completions that cannot be read, RewardError for a reward that cannot be loaded.
    """
    config = runtime.config
    if findings := [*_sampling_and_selection(runtime), *_evaluation_and_guards(runtime), *_training(runtime)]:
        raise ConfigError("\n".join(findings))
    reference = config.training.reference
    if reference is not None and config.num_rounds and not runtime.run.is_committed(0, "data"):
        prompts_of(reference_rows(reference), reference)  # read once now, so that an error does not cost a round
    generated = ("evaluate/generate",) if config.evaluation.num_prompts else ("generate",)
    done = all(runtime.run.is_committed(config.num_rounds, name) for name in generated)
    if not done and isinstance(runtime.family, SupportsServers):
        runtime.family.check_servers(config)
    # Last, because this loads the rewards.
    media, family, evaluation = runtime.family.media, config.policy.family, config.evaluation
    findings = [*incompatible_rewards(runtime.rewards(), media, family)]
    if evaluation.reward_funcs and evaluation.num_prompts:
        findings += incompatible_rewards(runtime.held_out_rewards(), media, family, "evaluation.reward_funcs")
    if evaluation.features is not None and evaluation.num_prompts:
        runtime.extractor()
    if findings:
        raise ConfigError("\n".join(findings))
    if runtime.run.is_committed(0, "data"):  # otherwise the data stage checks the columns
        data = runtime.run.folder(0, "data")
        with contextlib.suppress(RunDamaged):  # reported later, unless the stage is redone
            runtime.check_columns(*(column_names(data / f"{part}.parquet") for part in ("train", "held_out")))


def _needs_log_probs(runtime: Runtime, field: str, value: str, fix: str, leave: str) -> str:
    return (
        f"{field} must be {leave} for a family that knows no likelihoods; got {value} with policy.family: "
        f"{runtime.config.policy.family}. {fix}, or give the family `log_probs` and `recorded_log_probs`."
    )


def _sampling_and_selection(runtime: Runtime) -> Iterator[str]:
    config, family, name = runtime.config, runtime.family, runtime.config.policy.family
    sampling, selection = config.sampling, config.selection
    if not config.rewards.reward_funcs and not runtime.objects.rewards:
        yield (
            "rewards.reward_funcs must name at least one reward; got none. Add one, such as "
            "`reward_funcs: [rewards.py:score]`; a run whose rewards were objects is continued by its own script."
        )
    if sampling.unusable_prompts == "drop" and not isinstance(family, SupportsPromptCheck):
        yield (
            "sampling.unusable_prompts must be refuse for a family that does not say which prompts it cannot take; got "
            f"drop with policy.family: {name}. Leave it out, or give the family `unread`."
        )
    if selection.beta > 0 and not runtime.has_log_probs():
        yield _needs_log_probs(runtime, "selection.beta", f"{selection.beta:g}", "Set it to 0", "0")
    load_rule(selection)  # these raise ConfigError
    load_backend(sampling)
    own_way = not isinstance(family, SupportsBackends)
    if own_way and (sampling.backend != "auto" or sampling.backend_options):
        yield (
            f"sampling.backend must be auto for policy.family: {name}, which generates in its own way; got "
            f"{sampling.backend!r}{' with options' if sampling.backend == 'auto' else ''}. Leave it out."
        )
    others = len(sampling.candidate_columns) + (sampling.teacher.num_generations if sampling.teacher else 0)
    pool = sampling.num_generations + others
    counted = "(sampling.num_generations and other sources). Lower it, or raise sampling.num_generations."
    if config.num_rounds and isinstance(selection, TopM) and selection.m >= pool:
        yield (
            f"selection.m must be less than the candidates of a prompt, or nothing is selected; got {selection.m} of "
            f"{pool} {counted}"
        )
    elif config.num_rounds and isinstance(selection, Random) and selection.m > pool:
        yield f"selection.m must not exceed the candidates of a prompt; got {selection.m} of {pool} {counted}"
    if pool == 1 and selection.all_equal == "skip":
        yield (
            "selection.all_equal: skip can never select from one sample a prompt; got sampling.num_generations = 1."
            " Raise it to 2 or more, or write keep."
        )
    if pool == 1 and selection.margin > 0:
        yield (
            f"selection.margin can never be reached by one sample a prompt, which is its own mean; got "
            f"{selection.margin:g} with sampling.num_generations = 1. Raise it to 2 or more, or leave out the margin."
        )
    longest, shortest = sampling.max_completion_length, selection.min_length
    if "completion_ids" in family.payload.names and not others and shortest is not None and shortest > longest:
        yield (
            f"selection.min_length must not exceed sampling.max_completion_length, or nothing can be selected; got "
            f"{shortest} and {longest}. Lower the one or raise the other."
        )
    for field in ("min_length", "max_length"):
        if (limit := getattr(selection, field)) is not None and family.media == "image":
            yield f"selection.{field} is about lengths, and an image has none; got {limit}. Leave it out."
    if config.keep_latents == "selected" and LATENTS not in family.payload.names:
        yield (
            f"keep_latents: selected means nothing to policy.family: {name}, whose samples have no column "
            f"{LATENTS!r}. Leave it out."
        )


def _evaluation_and_guards(runtime: Runtime) -> Iterator[str]:
    config, name, media = runtime.config, runtime.config.policy.family, runtime.family.media
    evaluation, guards = config.evaluation, config.guards
    load_metrics(evaluation)  # raises ConfigError
    column = evaluation.reference_column
    if column is not None and not runtime.has_log_probs():
        yield _needs_log_probs(runtime, "evaluation.reference_column", repr(column), "Leave it out", "left out")
    if evaluation.features is not None and media != "image":
        yield (
            f"evaluation.features compares images, and policy.family: {name} generates none; got "
            f"{evaluation.features!r}. Leave it out."
        )
    judges = config.rewards.model_copy(update={"reward_funcs": evaluation.reward_funcs}).names
    rewards = runtime.rewards().names if runtime.objects.rewards else config.rewards.names
    names = [*dict.fromkeys(["reward", *(["held_out"] if judges else []), *rewards, *judges])]
    if evaluation.num_prompts == 0 and evaluation.best_by != "reward":
        yield (
            f"evaluation.best_by needs evaluations; got {evaluation.best_by!r} with evaluation.num_prompts = 0. Raise "
            "it, or leave out best_by."
        )
    elif evaluation.best_by not in names:
        yield (
            f"evaluation.best_by must be one of {', '.join(names)}; got {evaluation.best_by!r}. Choose one of these."
        )
    about: dict[str, tuple[Collection[str], Collection[str]]] = {
        "texts": (TEXT_ALARMS, TEXTS),
        "images": (PICTURE_ALARMS, CONDENSE),
        "texts and images": (ALIKE_ALARMS, (*TEXTS, *CONDENSE)),
    }
    for subject, (alarms, generated) in about.items():
        for alarm in sorted({*guards.stop_on} & {*alarms}) if media not in generated else ():
            yield f"guards.stop_on: {alarm} is about {subject}, and policy.family: {name} generates none. Leave it out."
    if "part_dominates" in guards.stop_on and len([weight for weight in runtime.factors().values() if weight]) < 2:
        yield "guards.stop_on: part_dominates needs two rewards that count; got fewer. Add one, or leave it out."
    if "kl_beyond_budget" in guards.stop_on and not runtime.has_log_probs():
        yield f"guards.stop_on: kl_beyond_budget is about likelihoods, and {name} knows none. Leave it out."
    if guards.max_kl is not None and not runtime.has_log_probs():
        yield _needs_log_probs(runtime, "guards.max_kl", f"{guards.max_kl:g}", "Leave it out", "left out")


def _training(runtime: Runtime) -> Iterator[str]:
    """What would otherwise fail after a round was generated and scored, such as an option of transformers' Trainer."""
    config, training = runtime.config, runtime.config.training
    load_objective(training)  # raises ConfigError
    if isinstance(training, CustomTraining) and not isinstance(runtime.family, SupportsObjectives):
        yield (
            f"training.objective must be sft for policy.family: {config.policy.family}, whose loss is its own; "
            f"got {training.objective!r}. Leave it out, or choose causal_lm."
        )
    if config.num_rounds:
        yield from check_processes(config, runtime.family)
    if not isinstance(runtime.family, SupportsTrainer) or not config.num_rounds:
        return
    if runtime.run.is_committed(config.num_rounds, "model"):  # training is done
        return
    from raftune.training.devices import choose_device
    from raftune.training.fit import MicroBatch, arguments
    from raftune.training.processes import training_together

    size = MicroBatch(training.per_device_train_batch_size, training.gradient_accumulation_steps)
    device = choose_device(getattr(config.policy, "device", "cpu"))
    try:
        with training_together(launched_processes()):
            arguments(training, size, runtime.run.root, device, config.seed)
    except ConfigError as error:
        yield str(error)
    for package, pattern in OPTIMIZERS.items():
        if re.search(pattern, training.optim) and find_spec(package) is None:
            yield (
                f"training.optim: {training.optim} needs the package {package}, which is not installed. Install it, "
                "or write adamw_torch."
            )

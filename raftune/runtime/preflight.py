"""Checks a valid configuration for problems before the run starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec

from raftune.config.guards import ALIKE_ALARMS, PICTURE_ALARMS, TEXT_ALARMS
from raftune.config.sampling import load_backend
from raftune.config.selection import Random, TopM
from raftune.config.training import CustomTraining
from raftune.errors import ConfigError
from raftune.evaluation.metrics import load_metrics
from raftune.protocols import SupportsBackends, SupportsObjectives, SupportsPromptCheck, SupportsTrainer
from raftune.records import LATENTS
from raftune.rewards.panel import misfits
from raftune.runtime.assembly import CONDENSE, TEXTS, Runtime
from raftune.selection import load_rule
from raftune.stages.gather import prompts_of, reference_rows
from raftune.training.objectives import load_objective


def preflight(assembly: Runtime) -> None:
    """Raises ConfigError with a line for each thing that cannot work: no reward, beta without likelihoods, a selection
    that can never select, a best round by a reward that is not there, an alarm that can never be raised, a reward of
    texts on images or the reverse. Raises DataError for reference answers that cannot be read, RewardError for a
    reward that cannot be loaded."""
    if findings := [
        *rewards(assembly),
        *unusable(assembly),
        *likelihood(assembly),
        *selection(assembly),
        *best_round(assembly),
        *guards(assembly),
        *pictures(assembly),
        *training(assembly),
    ]:
        raise ConfigError("\n".join(findings))
    references(assembly)
    if findings := [*media(assembly)]:  # last, for it loads the rewards
        raise ConfigError("\n".join(findings))


def rewards(assembly: Runtime) -> Iterator[str]:
    if not assembly.config.rewards.reward_funcs and not assembly.objects.rewards:
        yield (
            "rewards.reward_funcs must name at least one reward; got none. Add one, such as "
            "`reward_funcs: [rewards.py:score]`; a run whose rewards were objects is continued by its own script."
        )


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


def training(assembly: Runtime) -> Iterator[str]:
    """What transformers' Trainer would refuse after a round was generated and scored: a name, a type, a missing
    package.
    """
    config = assembly.config
    if not isinstance(assembly.family, SupportsTrainer) or not config.num_rounds:
        return
    if assembly.run.is_committed(config.num_rounds, "model"):  # nothing is trained any more
        return
    from raftune.training.devices import choose_device
    from raftune.training.fit import MicroBatch, arguments

    size = MicroBatch(config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps)
    try:
        arguments(
            config.training,
            size,
            assembly.run.root,
            choose_device(getattr(config.policy, "device", "cpu")),
            config.seed,
        )
    except ConfigError as error:
        yield str(error)
    for package, pattern in OPTIMIZERS.items():
        if re.search(pattern, config.training.optim) and find_spec(package) is None:
            yield (
                f"training.optim: {config.training.optim} needs the package {package}, which is not "
                f"installed. Install it, "
                "or write adamw_torch."
            )


def unusable(assembly: Runtime) -> Iterator[str]:
    if assembly.config.sampling.unusable_prompts == "drop" and not isinstance(assembly.family, SupportsPromptCheck):
        yield (
            "sampling.unusable_prompts must be refuse for a family that does not say which prompts it cannot take; got "
            f"drop with policy.family: {assembly.config.policy.family}. Leave it out, or give the family `unread`."
        )


def references(assembly: Runtime) -> None:
    """Reads the reference completions once before a new run, so that unreadable ones do not cost a round."""
    config = assembly.config.training.reference
    if config is not None and assembly.config.num_rounds and not assembly.run.is_committed(0, "data"):
        prompts_of(reference_rows(config), config)


def media(assembly: Runtime) -> Iterator[str]:
    """Rewards, of the training and held out, that cannot read what the policy makes; this loads them."""
    family = assembly.config.policy.family
    yield from misfits(assembly.panel().panel, assembly.family.media, family)
    if assembly.config.evaluation.reward_funcs and assembly.config.evaluation.num_prompts:
        yield from misfits(assembly.judge().panel, assembly.family.media, family, "evaluation.reward_funcs")
    if assembly.config.evaluation.features is not None and assembly.config.evaluation.num_prompts:
        assembly.extractor()  # a model that cannot be read is missed now


def likelihood(assembly: Runtime) -> Iterator[str]:
    beta = assembly.config.selection.beta
    if beta > 0 and not assembly.has_log_probs():
        yield (
            f"selection.beta must be 0 for a family that knows no likelihoods; got {beta:g} with policy.family: "
            f"{assembly.config.policy.family}. Set it to 0, or give the family `log_probs` and `recorded_log_probs`."
        )
    column = assembly.config.evaluation.reference_column
    if column is not None and not assembly.has_log_probs():
        yield (
            f"evaluation.reference_column must be left out for a family that knows no likelihoods; got {column!r} with "
            f"policy.family: {assembly.config.policy.family}. Leave it out, or give the family "
            "`log_probs` and `recorded_log_probs`."
        )


def selection(assembly: Runtime) -> Iterator[str]:
    """Rules that no sample can satisfy; a custom one is loaded, which raises ConfigError where it cannot
    be.
    """
    load_rule(assembly.config.selection)
    load_backend(assembly.config.sampling)
    if assembly.config.sampling.backend != "auto" and not isinstance(assembly.family, SupportsBackends):
        yield (
            f"sampling.backend must be auto for policy.family: {assembly.config.policy.family}, which generates in its "
            f"own way; got {assembly.config.sampling.backend!r}. Leave it out."
        )
    load_metrics(assembly.config.evaluation)
    load_objective(assembly.config.training)
    if isinstance(assembly.config.training, CustomTraining) and not isinstance(assembly.family, SupportsObjectives):
        yield (
            f"training.objective must be sft for policy.family: {assembly.config.policy.family}, whose loss "
            f"is its own; "
            f"got {assembly.config.training.objective!r}. Leave it out, or choose causal_lm."
        )
    chosen, sampling = assembly.config.selection, assembly.config.sampling
    teacher = sampling.teacher.num_generations if sampling.teacher else 0
    others = len(sampling.candidate_columns) + teacher
    pool = sampling.num_generations + others
    if assembly.config.num_rounds and isinstance(chosen, TopM) and chosen.m >= pool:
        yield (
            f"selection.m must be less than the candidates of a prompt, or nothing is selected; got {chosen.m} of "
            f"{pool} (sampling.num_generations and other sources). Lower it, or raise sampling.num_generations."
        )
    elif assembly.config.num_rounds and isinstance(chosen, Random) and chosen.m > pool:
        yield (
            f"selection.m must not exceed the candidates of a prompt; got {chosen.m} of {pool} "
            "(sampling.num_generations and other sources). Lower it, or raise sampling.num_generations."
        )
    if sampling.num_generations + others == 1:
        if chosen.all_equal == "skip":
            yield (
                "selection.all_equal: skip can never select from one sample a prompt; got sampling.num_generations = 1."
                " Raise it to 2 or more, or write keep."
            )
        if chosen.margin > 0:
            yield (
                f"selection.margin can never be reached by one sample a prompt, which is its own mean; got "
                f"{chosen.margin:g} with sampling.num_generations = 1. Raise it to 2 or more, or leave out the margin."
            )
    longest = sampling.max_completion_length
    counted = "completion_ids" in assembly.family.payload.names
    if counted and not others and chosen.min_length is not None and chosen.min_length > longest:
        yield (
            f"selection.min_length must not exceed sampling.max_completion_length, or nothing can be selected; got "
            f"{chosen.min_length} and {longest}. Lower the one or raise the other."
        )


def guards(assembly: Runtime) -> Iterator[str]:
    """Alarms that are to stop the run, or a budget to be watched, where nothing could ever raise them."""
    chosen, family = assembly.config.guards, assembly.config.policy.family
    about: dict[str, tuple[Collection[str], Collection[str]]] = {
        "texts": (TEXT_ALARMS, TEXTS),
        "images": (PICTURE_ALARMS, CONDENSE),
        "texts and images": (ALIKE_ALARMS, (*TEXTS, *CONDENSE)),
    }
    for what, (names, generated) in about.items():
        for name in sorted({*chosen.stop_on} & {*names}) if assembly.family.media not in generated else ():
            yield f"guards.stop_on: {name} is about {what}, and policy.family: {family} generates none. Leave it out."
    if "part_dominates" in chosen.stop_on and len([weight for weight in assembly.factors().values() if weight]) < 2:
        yield "guards.stop_on: part_dominates needs two rewards that count; got fewer. Add one, or leave it out."
    if "kl_beyond_budget" in chosen.stop_on and not assembly.has_log_probs():
        yield f"guards.stop_on: kl_beyond_budget is about likelihoods, and {family} knows none. Leave it out."
    if chosen.max_kl is not None and not assembly.has_log_probs():
        yield (
            f"guards.max_kl must be left out for a family that knows no likelihoods; got {chosen.max_kl:g} with "
            f"policy.family: {family}. Leave it out, or give the family `log_probs` and `recorded_log_probs`."
        )


def pictures(assembly: Runtime) -> Iterator[str]:
    """What is about images, where the policy makes none; and what an image does not have."""
    config, family = assembly.config, assembly.config.policy.family
    for name in ("min_length", "max_length"):
        given = getattr(config.selection, name)
        if given is not None and assembly.family.media == "image":
            yield f"selection.{name} is about lengths, and an image has none; got {given}. Leave it out."
    if config.evaluation.features is not None and assembly.family.media != "image":
        yield (
            f"evaluation.features compares images, and policy.family: {family} generates none; got "
            f"{config.evaluation.features!r}. Leave it out."
        )
    if config.keep_latents == "selected" and LATENTS not in assembly.family.payload.names:
        yield (
            f"keep_latents: selected means nothing to policy.family: {family}, whose samples have no column "
            f"{LATENTS!r}. Leave it out."
        )


def best_round(assembly: Runtime) -> Iterator[str]:
    evaluation, names = assembly.config.evaluation, reward_names(assembly)
    by = evaluation.best_by
    if evaluation.num_prompts == 0 and by != "reward":
        yield (
            f"evaluation.best_by needs evaluations; got {by!r} with evaluation.num_prompts = 0. Raise it, or leave out "
            "best_by."
        )
    elif by not in names:
        yield f"evaluation.best_by must be one of {', '.join(names)}; got {by!r}. Choose one of these."


def reward_names(assembly: Runtime) -> list[str]:
    """What rounds can be compared by: the reward, the held-out one, and each by its own name."""
    config = assembly.config
    judges = config.rewards.model_copy(update={"reward_funcs": config.evaluation.reward_funcs}).names
    ours = assembly.panel().names if assembly.objects.rewards else config.rewards.names
    return [*dict.fromkeys(["reward", *(["held_out"] if judges else []), *ours, *judges])]

"""Counts what a configuration asks for: samples, kept rows, optimizer steps."""

from __future__ import annotations

import math

from raftune.config.run import RunConfig
from raftune.config.selection import BestOfK, Random, Threshold, TopFraction, TopM
from raftune.policies.footprint import RoundAmounts


def amounts(config: RunConfig, train: int, held_out: int) -> RoundAmounts:
    """The amounts with so many prompts."""
    sampling = config.sampling
    prompts = min(config.prompts_per_round, train)
    teacher = sampling.teacher.num_generations if sampling.teacher else 0
    pool = sampling.num_generations + len(sampling.candidate_columns) + teacher
    kept, exact = kept_of(config, prompts, pool)
    return RoundAmounts(
        rounds=config.num_rounds,
        prompts=prompts,
        drawn=prompts * sampling.num_generations,
        competing=prompts * pool,
        kept=kept,
        kept_exact=exact,
        steps=steps_of(config, kept),
        judged=held_out * config.evaluation.num_generations,
    )


def kept_of(config: RunConfig, prompts: int, pool: int) -> tuple[int, bool]:
    """Rows that a round keeps at most, and whether it is exactly that many where every sample has a score."""
    chosen = config.selection
    skips = chosen.skips_equal and pool > 1
    free = not skips and chosen.margin == 0 and not chosen.drop_duplicates
    free = free and chosen.min_length is None and chosen.max_length is None
    if isinstance(chosen, BestOfK):
        return prompts, free
    if isinstance(chosen, TopM | Random):
        return prompts * min(chosen.m, pool), free
    if isinstance(chosen, TopFraction):
        return max(1, math.floor(prompts * pool * chosen.keep_fraction)), free and chosen.max_per_prompt is None
    most = (chosen.max_per_prompt or pool) if isinstance(chosen, Threshold) else pool
    return prompts * min(pool, most), False


def steps_of(config: RunConfig, kept: int) -> int:
    """Optimizer steps of a round with so many kept rows, replayed and reference rows included."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps
    rows = float(kept * (1 + min(training.replay_rounds, max(0, config.num_rounds - 1))))
    if training.reference is not None:
        rows /= 1 - training.reference.fraction
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return max(1, math.ceil(math.ceil(rows / per_step) * training.num_train_epochs))

"""The measures of a comparison: recorded rewards, rewards that score now, and a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raftune.analysis.compare.pairs import SCORED, ComparedRun, SamplePairs
from raftune.arrays import FloatArray
from raftune.clients.chat import ChatEndpoint
from raftune.config.rewards import RewardsConfig, RewardSpec, unique_names
from raftune.errors import RewardError
from raftune.evaluation.judge import TEMPLATE, JudgeResult, ProgressCallback, judge
from raftune.evaluation.paired import PairedTest, judged, outcomes, paired

SHARE = 0.5  # of samples that a reward could not score, above which there is no result
NOW = "`--reward SPEC` scores both now"


@dataclass(frozen=True)
class ComparisonMeasure:
    """One way to compare. `result` is None where nothing was compared, and `why` gives the reason.

    Outcomes (N,) of the pairs are 1 where A wins, 0 for a tie, -1 where B wins, else NaN; `a` and `b` are the scores,
    None of a judge. `aliases` are other names in gates. facts: left_out (pairs without an outcome); of a judge also
    questions, cached, identical, inconsistent, first, failures (a share), failed (counts by kind).
    """

    name: str
    title: str
    kind: Literal["recorded", "new", "judge"]
    result: PairedTest | None = None
    outcomes: FloatArray = field(default_factory=lambda: np.zeros(0))
    a: FloatArray | None = None
    b: FloatArray | None = None
    aliases: tuple[str, ...] = ()
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    judgement: JudgeResult | None = None

    @property
    def leads(self) -> FloatArray:
        """(N,) by how much A is ahead in each pair: in units of the score, or of verdicts; NaN where it is unknown."""
        return self.outcomes if self.a is None or self.b is None else self.a - self.b


@dataclass(frozen=True)
class JudgeSpec:
    """The judge model of a comparison and its settings."""

    endpoint: ChatEndpoint
    template: str = TEMPLATE


def planned(pairs: SamplePairs, specs: Sequence[RewardSpec], judge_spec: JudgeSpec | None) -> list[ComparisonMeasure]:
    """All measures before anything is scored; `why` says of those that cannot be computed what is in the way.

    A new reward whose name is taken gets the next free number.
    """
    measures: list[ComparisonMeasure] = []
    sides = (pairs.side_a, pairs.side_b)
    for name in SCORED:
        present = [name in side.scores for side in sides]
        if all(present):
            measures += _recorded(name, *sides)
        elif any(present):
            why = f"{'B' if present[0] else 'A'} recorded none. {NOW}"
            measures.append(ComparisonMeasure(name, name, "recorded", why=why))
    judges = []
    if judge_spec is not None:
        model = judge_spec.endpoint.model
        title = f"judge ({PurePath(model).name or model})"  # of a folder the last part
        judges.append(ComparisonMeasure("judge", title, "judge"))
    taken = [(measure.name, True) for measure in [*measures, *judges]]
    names = unique_names(taken + [(spec.derived_name, False) for spec in specs])[len(taken) :]
    return [*measures, *(ComparisonMeasure(name, f"{name} (now)", "new") for name in names), *judges]


def _recorded(name: str, a: ComparedRun, b: ComparedRun) -> list[ComparisonMeasure]:
    """The score of this name that both recorded, and its parts where it is a sum of several, or weighted."""
    folder, section = SCORED[name]
    commits = [side.run.commit(side.round, f"evaluate/{folder}") for side in (a, b)]
    hashes = [str(commit.fields.get("hash of rewards", "")) if commit is not None else "" for commit in commits]
    lists = [" + ".join(side.parts(name)) for side in (a, b)]
    why = ""  # the scores are one measure only if code, options and weights are equal
    if hashes[0] != hashes[1]:
        why = f"{lists[0]} changed between A and B (code, options or weights). {NOW}"
        if lists[0] != lists[1]:
            why = f"A was scored by {lists[0]}, B by {lists[1]}. {NOW}"
    single = [
        parts[0]
        for side in (a, b)
        if len(parts := side.parts(name)) == 1
        and np.array_equal(side.scores[name], side.scores[f"{name}/{parts[0]}"], equal_nan=True)
    ]
    if len(single) == 2 and single[0] == single[1]:
        aliases = (single[0], f"{name}/{single[0]}")
        return [ComparisonMeasure(name, f"{name} ({single[0]})", "recorded", aliases=aliases, why=why)]
    specs = []  # by name; without rewards that were given as objects
    for side in (a, b):
        funcs = side.config.get(section, {}).get("reward_funcs", ())
        config = RewardsConfig.model_validate({"reward_funcs": funcs})
        listed = [spec.model_dump(mode="json") for spec in config.reward_funcs]
        specs.append(dict(zip(config.names, listed, strict=True)))
    measures = [ComparisonMeasure(name, name, "recorded", why=why)]
    for part in (part for part in a.parts(name) if part in b.parts(name)):
        # Equal lists of specs under unequal hashes mean that code changed, but not whose.
        unweighted = [{key: value for key, value in spec.get(part, {}).items() if key != "weight"} for spec in specs]
        same = bool(unweighted[0]) and unweighted[0] == unweighted[1] and specs[0] != specs[1]
        unsure = f"{part} is not known to be the same in A and B. {NOW}" if why and not same else ""
        title = f"  {part}"
        measures.append(ComparisonMeasure(f"{name}/{part}", title, "recorded", aliases=(part,), why=unsure))
    return measures


def compare_scores(
    measure: ComparisonMeasure, pairs: SamplePairs, a: FloatArray, b: FloatArray, tie_within: float
) -> ComparisonMeasure:
    """The measure with its result by two rows of scores, A's and B's of each pair."""
    won = outcomes(a, b, tie_within)
    result = paired(pairs.groups, a, b, tie_within)
    why = "" if result else "no pair has a score on both sides"
    facts = {"left_out": int(np.isnan(won).sum())}
    return replace(measure, result=result, outcomes=won, a=a, b=b, why=why, facts=facts)


def score_now(
    specs: Sequence[RewardSpec], measures: Sequence[ComparisonMeasure], pairs: SamplePairs, tie_within: float
) -> list[ComparisonMeasure]:
    """Both sides' completions, scored by each of these rewards in this process; nothing is written into the runs.

    Raises ConfigError and RewardError where a reward cannot be loaded, or fails for more than half of the samples.
    """
    from raftune.rewards.loading import load_rewards
    from raftune.rewards.outcome import FAILED

    tables = [pairs.side_a.samples.take(pa.array(pairs.a)), pairs.side_b.samples.take(pa.array(pairs.b))]
    columns = ("sample_id", "completion", "completion_ids", "invalid")
    shared = [name for name in columns if all(name in table.column_names for table in tables)]
    samples = pa.concat_tables([table.select(shared) for table in tables])
    named = [spec.model_copy(update={"name": measure.name}) for spec, measure in zip(specs, measures, strict=True)]
    rewards = load_rewards(RewardsConfig(reward_funcs=tuple(named)))
    try:
        scores = rewards.score_samples(pairs.prompt_of_each * 2, samples)
    finally:
        rewards.close()
    results = []
    for spec, measure in zip(specs, measures, strict=True):
        parts = [score.parts[measure.name] for score in scores]
        failed = [part for part in parts if part.status in FAILED]  # "does not apply" is no failure
        if len(failed) > SHARE * len(parts):
            details = list(dict.fromkeys(f"  {part.status.value}: {part.detail}" for part in failed))[:3]
            head = f"--reward {measure.name} could not score {len(failed)} of {len(parts)} completions."
            raise RewardError("\n".join([head, *details, "Try it with `raftune reward check`."]))
        values = np.array([np.nan if part.value is None else part.value * spec.weight for part in parts])
        results.append(compare_scores(measure, pairs, values[: len(pairs)], values[len(pairs) :], tie_within))
    return results


def ask_judge(
    spec: JudgeSpec, measure: ComparisonMeasure, pairs: SamplePairs, tell: ProgressCallback
) -> ComparisonMeasure:
    """The judge's verdicts on all pairs. Raises RewardError where it gives too few."""
    a, b = (list(map(str, answers)) for answers in pairs.answers)
    contents = [prompt.content for prompt in pairs.prompt_of_each]
    verdicts = judge(spec.endpoint, list(zip(contents, a, b, strict=True)), spec.template, tell)
    facts = {name: getattr(verdicts, name) for name in ("questions", "cached", "identical", "inconsistent", "first")}
    facts |= {
        "failures": sum(verdicts.failures.values()) / verdicts.questions if verdicts.questions else 0.0,
        "failed": verdicts.failures,
        "left_out": int(np.isnan(verdicts.outcomes).sum()),
    }
    result = judged(pairs.groups, verdicts.outcomes)
    return replace(measure, result=result, outcomes=verdicts.outcomes, facts=facts, judgement=verdicts)

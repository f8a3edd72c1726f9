"""What a comparison is based on: recorded rewards, rewards that score now, and a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raftune.analysis.compare.pairing import SamplePairs
from raftune.analysis.compare.sides import SCORED, ComparedRun
from raftune.arrays import FloatArray
from raftune.clients.chat import ChatEndpoint
from raftune.config.rewards import RewardsConfig, RewardSpec, unique_names
from raftune.errors import RewardError
from raftune.evaluation.judge import TEMPLATE, JudgeResult, ProgressCallback, judge
from raftune.evaluation.paired import PairedTest, judged, outcomes, paired

JUDGE = "judge"
SHARE = 0.5  # of samples that a reward could not score, above which there is no result


@dataclass(frozen=True)
class ComparisonMeasure:
    """One way to compare: outcomes (N,) pair by pair are 1 where A wins, 0 for a tie, -1 where B wins, NaN if unknown.

    `a` and `b` are the scores, None of a judge; `result` is None where nothing could be compared, `why` says why.
    `aliases` are other names under which a gate may speak of it. facts: left_out (pairs without an outcome); of a judge
    also questions, cached, identical, inconsistent, first, failures (a share), failed (counts by kind).
    """

    name: str
    title: str
    kind: Literal["recorded", "new", "judge"]
    result: PairedTest | None
    outcomes: FloatArray
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


@dataclass(frozen=True)
class PlannedMeasure:
    """A measure by name before anything is scored; `why` it will not be computed, if it is known already."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    why: str = ""


# -- what both recorded ------------------------------------------------------------------------------------------------


def recorded(pairs: SamplePairs) -> list[PlannedMeasure]:
    """The scores that A and B, or one of them, recorded, and their parts by name."""
    found = []
    for name in SCORED:
        sides = [side for side in (pairs.side_a, pairs.side_b) if name in side.scores]
        if len(sides) == 1:
            letter = "B" if sides[0] is pairs.side_a else "A"
            found.append(PlannedMeasure(name, name, why=f"{letter} recorded none. `--reward SPEC` scores both now"))
        elif sides:
            found += planned(name, pairs)
    return found


def planned(name: str, pairs: SamplePairs) -> Iterator[PlannedMeasure]:
    """The score of this name, and its parts where it has several."""
    a, b = pairs.side_a, pairs.side_b
    why = whether_same(name, a, b)
    sums = [only_part(name, side) for side in (a, b)]
    alone = sums[0] if sums[0] == sums[1] else None
    title = f"{name} ({alone})" if alone else name
    yield PlannedMeasure(name, title, (alone, f"{name}/{alone}") if alone else (), why)
    if alone:
        return
    for part in (part for part in a.parts(name) if part in b.parts(name)):
        yield PlannedMeasure(f"{name}/{part}", f"  {part}", (part,), part_differs(name, part, a, b) if why else "")


def only_part(name: str, side: ComparedRun) -> str | None:
    """The part that the score is equal to; None where it is a sum of several, or weighted."""
    parts = side.parts(name)
    if len(parts) != 1 or not np.array_equal(side.scores[name], side.scores[f"{name}/{parts[0]}"], equal_nan=True):
        return None
    return parts[0]


def whether_same(name: str, a: ComparedRun, b: ComparedRun) -> str:
    """Why A's and B's scores of this name are not one measure; empty where they are."""
    if a.fingerprint(name) == b.fingerprint(name):
        return ""
    lists = [" + ".join(side.parts(name)) for side in (a, b)]
    if lists[0] != lists[1]:
        return f"A was scored by {lists[0]}, B by {lists[1]}. `--reward SPEC` scores both now"
    return f"{lists[0]} changed between A and B (code, options or weights). `--reward SPEC` scores both now"


def part_differs(name: str, part: str, a: ComparedRun, b: ComparedRun) -> str:
    """Why a part of this name is not one measure, where the sums are not; empty where both come from equal specs.

    Equal sums of unequal fingerprint tell that code changed; whose, they do not tell.
    """
    specs = [side.specs(name) for side in (a, b)]
    unweighted = [{key: value for key, value in spec.get(part, {}).items() if key != "weight"} for spec in specs]
    if unweighted[0] and unweighted[0] == unweighted[1] and specs[0] != specs[1]:
        return ""
    return f"{part} is not known to be the same in A and B. `--reward SPEC` scores both now"


def compare_recorded(plan: PlannedMeasure, pairs: SamplePairs, tie_within: float) -> ComparisonMeasure:
    if plan.why:
        return missing(plan, len(pairs), "recorded")
    a, b = pairs.side_a.scores[plan.name][pairs.a], pairs.side_b.scores[plan.name][pairs.b]
    return by_scores(plan, pairs, a, b, tie_within, "recorded")


# -- rewards that score now --------------------------------------------------------------------------------------------


def named(specs: Sequence[RewardSpec], taken: Sequence[str]) -> list[PlannedMeasure]:
    """The new rewards by name; one that is taken gets the next free number."""
    names = unique_names([(name, True) for name in taken] + [(spec.derived_name, False) for spec in specs])
    return [PlannedMeasure(name, f"{name} (now)") for name in names[len(taken) :]]


def score_now(
    specs: Sequence[RewardSpec], plans: Sequence[PlannedMeasure], pairs: SamplePairs, tie_within: float
) -> list[ComparisonMeasure]:
    """Both sides' answers, scored by each of these rewards in this process; nothing is written into the runs.

    Raises ConfigError and RewardError where a reward cannot be loaded, or fails for more than half of the samples.
    """
    from raftune.rewards.loading import load_panel
    from raftune.rewards.panel import SampleScorer

    named_specs = [spec.model_copy(update={"name": plan.name}) for spec, plan in zip(specs, plans, strict=True)]
    panel = SampleScorer(load_panel(RewardsConfig(reward_funcs=tuple(named_specs))))
    try:
        scores = panel.score_samples(pairs.asked * 2, both_answers(pairs))
    finally:
        panel.close()
    found = []
    for spec, plan in zip(specs, plans, strict=True):
        parts = [score.parts[plan.name] for score in scores]
        refuse_failing(plan.name, parts)
        values = np.array([np.nan if part.value is None else part.value * spec.weight for part in parts])
        found.append(by_scores(plan, pairs, values[: len(pairs)], values[len(pairs) :], tie_within, "new"))
    return found


def both_answers(pairs: SamplePairs) -> pa.Table:
    """A's answers, then B's: sample_id, completion and, where both have them, completion_ids and invalid."""
    tables = [pairs.side_a.samples.take(pa.array(pairs.a)), pairs.side_b.samples.take(pa.array(pairs.b))]
    wanted = ("sample_id", "completion", "completion_ids", "invalid")
    shared = [name for name in wanted if all(name in t.column_names for t in tables)]
    return pa.concat_tables([table.select(shared) for table in tables])


def refuse_failing(name: str, parts: Sequence[Any]) -> None:
    """Raises RewardError where more than half of the samples failed; a part that does not apply is no failure."""
    from raftune.rewards.outcome import FAILED

    failed = [part for part in parts if part.status in FAILED]
    if len(failed) > SHARE * len(parts):
        details = list(dict.fromkeys(f"  {part.status.value}: {part.detail}" for part in failed))[:3]
        head = f"--reward {name} could not score {len(failed)} of {len(parts)} answers."
        raise RewardError("\n".join([head, *details, "Try it with `raftune reward check`."]))


# -- a judge -----------------------------------------------------------------------------------------------------------


def ask_judge(who: JudgeSpec, plan: PlannedMeasure, pairs: SamplePairs, tell: ProgressCallback) -> ComparisonMeasure:
    """The judge's verdicts on all pairs. Raises RewardError where it gives too few."""
    a, b = (list(map(str, answers)) for answers in pairs.answers)
    contents = [prompt.content for prompt in pairs.asked]
    said = judge(who.endpoint, list(zip(contents, a, b, strict=True)), who.template, tell)
    facts = {
        "questions": said.questions,
        "cached": said.cached,
        "identical": said.identical,
        "inconsistent": said.inconsistent,
        "first": said.first,
        "failures": sum(said.failures.values()) / said.questions if said.questions else 0.0,
        "failed": said.failures,
        "left_out": int(np.isnan(said.outcomes).sum()),
    }
    result = judged(pairs.groups, said.outcomes)
    return ComparisonMeasure(plan.name, plan.title, "judge", result, said.outcomes, facts=facts, judgement=said)


def judge_plan(model: str) -> PlannedMeasure:
    """The judge under its name; a model given as a folder is called by the folder's last part."""
    return PlannedMeasure(JUDGE, f"judge ({PurePath(model).name or model})")


# -- what they share ---------------------------------------------------------------------------------------------------


def by_scores(
    plan: PlannedMeasure,
    pairs: SamplePairs,
    a: FloatArray,
    b: FloatArray,
    tie_within: float,
    kind: Literal["recorded", "new"],
) -> ComparisonMeasure:
    """The measure by two rows of scores."""
    found = outcomes(a, b, tie_within)
    result = paired(pairs.groups, a, b, tie_within)
    why = "" if result else "no pair has a score on both sides"
    facts = {"left_out": int(np.isnan(found).sum())}
    return ComparisonMeasure(plan.name, plan.title, kind, result, found, a, b, plan.aliases, why, facts)


def missing(plan: PlannedMeasure, size: int, kind: Literal["recorded", "new"]) -> ComparisonMeasure:
    """A measure that could not be computed."""
    return ComparisonMeasure(
        plan.name, plan.title, kind, None, np.full(size, np.nan), aliases=plan.aliases, why=plan.why
    )

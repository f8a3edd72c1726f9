"""Two rounds or runs, compared on the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raftune.analysis.compare import gate as gates
from raftune.analysis.compare.gate import GateResult
from raftune.analysis.compare.measures import (
    ComparisonMeasure,
    JudgeSpec,
    PlannedMeasure,
    ask_judge,
    compare_recorded,
    judge_plan,
    named,
    recorded,
    score_now,
)
from raftune.analysis.compare.pairing import SamplePairs, differences, pair
from raftune.analysis.compare.rows import check_out, write_rows
from raftune.analysis.compare.sides import ComparedRun, choose
from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, DataError
from raftune.evaluation.bootstrap import mean_by_prompt
from raftune.evaluation.judge import ProgressCallback
from raftune.results.samples import readable
from raftune.starters.resolve import resolve_reward

PREFERRED = ("held_out", "reward")  # what prompts are ranked by, unless it is said: what was not trained on, first


@dataclass(frozen=True)
class Comparison:
    """Comparison of A and B: `differences` in how they were generated, measures, and gates.

    `by` is the measure that ranks the prompts.
    """

    pairs: SamplePairs
    differences: list[str]
    measures: list[ComparisonMeasure]
    gates: list[GateResult]
    by: ComparisonMeasure

    @property
    def computed(self) -> list[ComparisonMeasure]:
        return [measure for measure in self.measures if measure.result is not None]

    def extremes(self, number: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The prompts on which A leads most, and on which it trails most, with the mean lead: at most so many each."""
        leads = mean_by_prompt(self.pairs.groups, self.by.leads)
        known = [(index, float(lead)) for index, lead in enumerate(leads) if np.isfinite(lead)]
        ahead = sorted((item for item in known if item[1] > 0), key=lambda item: -item[1])
        behind = sorted((item for item in known if item[1] < 0), key=lambda item: item[1])
        return ahead[:number], behind[:number]

    def telling(self, prompt: int, lead: float) -> int:
        """Of the prompt's pairs the one that shows its lead most clearly."""
        rows = np.flatnonzero(self.pairs.groups == prompt)
        shown = np.nan_to_num(math.copysign(1.0, lead) * self.by.leads[rows], nan=-np.inf)
        return int(rows[np.argmax(shown)])

    @property
    def failure(self) -> str | None:
        """What to say of the gates that are closed; None where all are open."""
        return gates.failed(self.gates)


def compare(
    a: str,
    b: str | None = None,
    *,
    rewards: Sequence[RewardSpec | str] = (),
    judge: JudgeSpec | None = None,
    fail_if: Sequence[str] = (),
    tie_within: float = 0.0,
    by: str | None = None,
    out: str | Path | None = None,
    tell: ProgressCallback = lambda done, of: None,
) -> Comparison:
    """A against B, each `RUN`, `RUN@3`, `RUN@best`, `RUN@last` or `RUN@start`; without B, A's run as it started.

    Whatever can be found wrong is found before a reward or a judge is asked. Raises RaftuneError; a closed gate is no
    error here: see `Comparison.failure`.
    """
    asked = [gates.read_gate(text) for text in fail_if]
    check_out(out)
    if not (math.isfinite(tie_within) and tie_within >= 0):
        raise ConfigError(f"--tie-within must be at least 0; got {tie_within}. It is in units of the score.")
    side_a, side_b = sides(a, b)
    pairs = pair(side_a, side_b)
    if judge is not None and pairs.of_pictures:
        raise ConfigError(
            "--judge reads texts, and A and B hold images. Score them with --reward: the reward `http` asks an "
            "endpoint about images."
        )
    plans = recorded(pairs)
    family = side_a.config["policy"]["family"]
    given = [spec if isinstance(spec, RewardSpec) else RewardSpec(spec=spec) for spec in rewards]
    specs = [resolve_reward(spec, family) for spec in given]
    new = named(specs, [plan.name for plan in plans] + ([judge_plan("").name] if judge else []))
    judges = [judge_plan(judge.endpoint.model)] if judge else []
    names = names_of([*plans, *new, *judges])
    wanted = [gates.find("--fail-if", gate.measure, names) for gate in asked]
    ranked_by = None if by is None else gates.find("--by", by, names)

    measures = [compare_recorded(plan, pairs, tie_within) for plan in plans]
    if specs:
        measures += score_now(specs, new, pairs, tie_within)
    if judge is not None:
        measures.append(ask_judge(judge, judges[0], pairs, tell))
    found = {measure.name: measure for measure in measures}
    checked = [gates.check(gate, found[name]) for gate, name in zip(asked, wanted, strict=True)]
    comparison = Comparison(pairs, differences(pairs), measures, checked, ranking(found, ranked_by))
    if out is not None:
        write_rows(out, pairs, measures)
    return comparison


def sides(a: str, b: str | None) -> tuple[ComparedRun, ComparedRun]:
    side_a = choose(a, "A")
    return side_a, choose(b, "B") if b is not None else choose(f"{side_a.run.root}@start", "B")


def names_of(plans: Sequence[PlannedMeasure]) -> dict[str, str]:
    """Every name and alias, and the measure that it stands for: names come before aliases, earlier before later."""
    aliases = {alias: plan.name for plan in reversed(plans) for alias in plan.aliases}
    return aliases | {plan.name: plan.name for plan in plans}


def ranking(measures: Mapping[str, ComparisonMeasure], by: str | None) -> ComparisonMeasure:
    """The measure that ranks the prompts. Raises ConfigError, and DataError where nothing could be compared."""
    computed = [measure for measure in measures.values() if measure.result is not None]
    if not computed:
        whys = [f"  {name}: {measure.why}." for name, measure in measures.items()]
        raise DataError("\n".join(["A and B have no score in common.", *whys]))
    if by is not None:
        if measures[by].result is None:
            raise ConfigError(f"--by {by}: {measures[by].why}. Name another measure.")
        return measures[by]
    return next((measures[name] for name in PREFERRED if name in measures and measures[name].result), computed[0])


def document(found: Comparison, number: int) -> dict[str, Any]:
    """The comparison as JSON holds it, with so many of the prompts on which A leads, and trails, most."""
    pairs = found.pairs
    ahead, behind = found.extremes(number)
    return {
        "a": described(pairs.side_a),
        "b": described(pairs.side_b),
        "pairs": len(pairs),
        "prompts": len(pairs.prompts),
        "differences": found.differences,
        "measures": {measure.name: numbers(measure) for measure in found.measures if measure.result is not None},
        "not_compared": {measure.name: measure.why for measure in found.measures if measure.result is None},
        "ranked_by": found.by.name,
        "wins": [example(found, *item) for item in ahead],
        "losses": [example(found, *item) for item in behind],
        "gates": [
            {"fail_if": c.gate.text, "value": c.value, "passed": not c.closed, "words": c.words} for c in found.gates
        ],
    }


def described(side: ComparedRun) -> dict[str, Any]:
    return {"run": str(side.run.root), "round": side.round, "samples": len(side.keys), "prompts": len(side.prompts)}


def numbers(measure: ComparisonMeasure) -> dict[str, Any]:
    """The measure's numbers; those it does not have are null."""
    assert measure.result is not None
    result = asdict(measure.result)
    method = "exact" if result.pop("flips") is None else "random"
    return {"kind": measure.kind, "title": measure.title.strip(), **result, "p_method": method, **measure.facts}


def example(found: Comparison, prompt: int, lead: float) -> dict[str, Any]:
    """A prompt, A's mean lead on it, and the pair that shows it most clearly."""
    row = found.telling(prompt, lead)
    a, b = found.pairs.answers
    name, k, seed = found.pairs.keys[row]
    scores = {m.name: [score(m.a, row), score(m.b, row)] for m in found.computed if m.a is not None}
    content = found.pairs.prompts[prompt].content
    return {
        "prompt_id": name,
        "prompt": content,
        "lead": lead,
        "k": k,
        "seed": seed,
        "a": readable(a[row]),
        "b": readable(b[row]),
        "scores": scores,
    }


def score(values: Any, row: int) -> float | None:
    return float(values[row]) if values is not None and np.isfinite(values[row]) else None

"""Two rounds or runs, compared on the same prompts and seeds, and gates such as `reward.win_rate < 0.5`."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.analysis.compare.measures import (
    ComparisonMeasure,
    JudgeSpec,
    ask_judge,
    compare_scores,
    planned,
    score_now,
)
from raftune.analysis.compare.pairs import SamplePairs, choose, differences, pair
from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, DataError
from raftune.evaluation.bootstrap import mean_by_prompt
from raftune.evaluation.judge import ProgressCallback, failure_of
from raftune.evaluation.paired import FEWEST, PairedEstimate
from raftune.results.samples import readable
from raftune.sanitize import counted
from raftune.starters.resolve import resolve_reward
from raftune.store.files import explaining, stage_file
from raftune.store.parquet import write_table

PREFERRED = ("held_out", "reward")  # what prompts are ranked by without --by: scores that were not trained on, first


OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
SHAPE = re.compile(r"(?P<left>[^<>=!]+?)\s*(?P<operator><=|>=|==|!=|<|>)\s*(?P<number>[^<>=!]+)")
ESTIMATES = ("win_rate", "difference", "a", "b")
FIELDS = (
    *(f"{name}{end}" for name in ESTIMATES for end in ("", ".low", ".high")),
    *("p", "wins", "ties", "losses", "pairs", "prompts", "left_out", "inconsistent", "failures"),
)
EXAMPLE = "Write it in quotes, such as 'reward.win_rate < 0.5'."


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate: `text` as given. It fails if the measure's field is in this relation to the number."""

    text: str
    measure: str
    field: str
    operator: str
    number: float


@dataclass(frozen=True, slots=True)
class GateResult:
    """A gate and its number, None where it could not be computed; the gate then fails."""

    gate: Gate
    value: float | None
    closed: bool
    words: str


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
        measured = [(index, float(lead)) for index, lead in enumerate(leads) if np.isfinite(lead)]
        ahead = sorted((item for item in measured if item[1] > 0), key=lambda item: -item[1])
        behind = sorted((item for item in measured if item[1] < 0), key=lambda item: item[1])
        return ahead[:number], behind[:number]

    def telling(self, prompt: int, lead: float) -> int:
        """Of the prompt's pairs the one that shows its lead most clearly."""
        rows = np.flatnonzero(self.pairs.groups == prompt)
        shown = np.nan_to_num(math.copysign(1.0, lead) * self.by.leads[rows], nan=-np.inf)
        return int(rows[np.argmax(shown)])

    @property
    def failure(self) -> str | None:
        """The closed gates, a line each; None where all are open."""
        closed = [result for result in self.gates if result.closed]
        return "\n".join(f"gate failed: {result.gate.text}: {result.words}." for result in closed) or None


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

    All arguments are checked before a reward or a judge is called. Raises RaftuneError; a closed gate is no error here:
    see `Comparison.failure`.
    """
    parsed_gates = [read_gate(text) for text in fail_if]
    if out is not None and Path(out).suffix != ".parquet":
        raise ConfigError(f"--out must end in .parquet; got {Path(out).name!r}. Rename it.")
    if out is not None and Path(out).exists():
        raise ConfigError(f"--out must not exist yet; {Path(out)} does. Choose another name.")
    if not (math.isfinite(tie_within) and tie_within >= 0):
        raise ConfigError(f"--tie-within must be at least 0; got {tie_within}. It is in units of the score.")
    side_a = choose(a, "A")
    side_b = choose(f"{side_a.run.root}@start" if b is None else b, "B")
    pairs = pair(side_a, side_b)
    if judge is not None and pairs.are_images:
        raise ConfigError(
            "--judge reads texts, and A and B hold images. Score them with --reward: the reward `http` asks an "
            "endpoint about images."
        )
    family = side_a.config["policy"]["family"]
    unresolved = [spec if isinstance(spec, RewardSpec) else RewardSpec(spec=spec) for spec in rewards]
    specs = [resolve_reward(spec, family) for spec in unresolved]
    plan = planned(pairs, specs, judge)
    # names come before aliases, earlier measures before later ones
    names = {alias: measure.name for measure in reversed(plan) for alias in measure.aliases}
    names |= {measure.name: measure.name for measure in plan}
    measure_of_gate = [find_measure("--fail-if", gate.measure, names) for gate in parsed_gates]
    ranked_by = None if by is None else find_measure("--by", by, names)

    measures = []
    for measure in plan:
        if measure.kind == "recorded" and not measure.why:
            scores_a, scores_b = side_a.scores[measure.name][pairs.a], side_b.scores[measure.name][pairs.b]
            measures.append(compare_scores(measure, pairs, scores_a, scores_b, tie_within))
        elif measure.kind == "recorded":
            measures.append(measure)
    if specs:
        measures += score_now(specs, [measure for measure in plan if measure.kind == "new"], pairs, tie_within)
    if judge is not None:
        measures.append(ask_judge(judge, plan[-1], pairs, tell))
    by_name = {measure.name: measure for measure in measures}
    results = [check(gate, by_name[name]) for gate, name in zip(parsed_gates, measure_of_gate, strict=True)]

    computed = {measure.name: measure for measure in measures if measure.result is not None}
    if not computed:
        lines = [f"  {measure.name}: {measure.why}." for measure in measures]
        raise DataError("\n".join(["A and B have no score in common.", *lines]))
    if ranked_by is None:
        ranked_by = next((name for name in PREFERRED if name in computed), next(iter(computed)))
    elif ranked_by not in computed:
        raise ConfigError(f"--by {ranked_by}: {by_name[ranked_by].why}. Name another measure.")
    if out is not None:
        _write_rows(Path(out), pairs, [*computed.values()])
    return Comparison(pairs, [*differences(pairs)], measures, results, computed[ranked_by])


def document(comparison: Comparison, number: int) -> dict[str, Any]:
    """The comparison as plain data, with so many of the prompts on which A leads, and trails, most."""
    pairs, measures = comparison.pairs, comparison.measures
    ahead, behind = comparison.extremes(number)
    sides = {
        letter: {
            "run": str(side.run.root),
            "round": side.round,
            "samples": len(side.keys),
            "prompts": len(side.prompts),
        }
        for letter, side in (("a", pairs.side_a), ("b", pairs.side_b))
    }
    numbers = {}
    for measure in comparison.computed:
        assert measure.result is not None
        result = asdict(measure.result)
        method = "exact" if result.pop("flips") is None else "random"
        numbers[measure.name] = {"kind": measure.kind, "title": measure.title.strip(), **result, "p_method": method}
        numbers[measure.name] |= measure.facts
    return {
        **sides,
        "pairs": len(pairs),
        "prompts": len(pairs.prompts),
        "differences": comparison.differences,
        "measures": numbers,
        "not_compared": {measure.name: measure.why for measure in measures if measure.result is None},
        "ranked_by": comparison.by.name,
        "wins": [_example(comparison, *item) for item in ahead],
        "losses": [_example(comparison, *item) for item in behind],
        "gates": [
            {"fail_if": result.gate.text, "value": result.value, "passed": not result.closed, "words": result.words}
            for result in comparison.gates
        ],
    }


def _example(comparison: Comparison, prompt: int, lead: float) -> dict[str, Any]:
    """A prompt, A's mean lead on it, and the pair that shows it most clearly."""
    row = comparison.telling(prompt, lead)
    a, b = comparison.pairs.answers
    name, k, seed = comparison.pairs.keys[row]
    scores = {
        measure.name: [float(values[row]) if np.isfinite(values[row]) else None for values in (measure.a, measure.b)]
        for measure in comparison.computed
        if measure.a is not None and measure.b is not None
    }
    return {
        "prompt_id": name,
        "prompt": comparison.pairs.prompts[prompt].content,
        "lead": lead,
        "k": k,
        "seed": seed,
        "a": readable(a[row]),
        "b": readable(b[row]),
        "scores": scores,
    }


def _write_rows(path: Path, pairs: SamplePairs, measures: Sequence[ComparisonMeasure]) -> None:
    """Writes one row a pair: prompt_id, prompt, k, seed, a, b; for each measure NAME/a, NAME/b and NAME/verdict (win,
    tie, loss: A's); of a judge also its reply in either order. The file appears whole or not at all."""
    ids, numbers, seeds = zip(*pairs.keys, strict=True)
    a, b = pairs.answers
    columns: dict[str, Any] = {
        "prompt_id": pa.array(ids),
        "prompt": pa.array([prompt.content for prompt in pairs.prompt_of_each]),
        "k": pa.array(numbers, pa.int32()),
        "seed": pa.array(seeds, pa.int64()),
        "a": pa.array(a),
        "b": pa.array(b),
    }
    words = {1.0: "win", 0.0: "tie", -1.0: "loss"}
    for measure in measures:
        name = measure.name
        for letter, values in (("a", measure.a), ("b", measure.b)):
            if values is not None:
                columns[f"{name}/{letter}"] = pa.array(values, from_pandas=True)
        columns[f"{name}/verdict"] = pa.array([words.get(float(value)) for value in measure.outcomes], pa.string())
        if measure.judgement is None:
            continue
        opinions = measure.judgement.opinions
        for order in ("a_first", "b_first"):
            replies = [getattr(opinion, order) for opinion in opinions]
            texts = {
                "verdict": [getattr(opinion, f"verdict_{order}") for opinion in opinions],
                "reply": [None if reply is None else reply.text for reply in replies],
                "failure": [None if reply is None else failure_of(reply) for reply in replies],
            }
            columns |= {f"{name}/{order}/{key}": pa.array(values, pa.string()) for key, values in texts.items()}
        columns[f"{name}/identical"] = pa.array([opinion.identical for opinion in opinions], pa.bool_())
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with stage_file(path.parent, path) as part:
            write_table(pa.table(columns), part)


# -- gates ------------------------------------------------------------------------------------------------------------


def read_gate(text: str) -> Gate:
    """Parses a gate. Raises ConfigError that says what is wrong with it."""
    match = SHAPE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"--fail-if must be MEASURE.FIELD, one of {' '.join(OPERATORS)}, NUMBER; got {text!r}. {EXAMPLE}"
        )
    left = match["left"]
    # a measure's name may hold dots: the longest field at the end counts
    fields = [field for field in FIELDS if left.endswith(f".{field}") and len(left) > len(field) + 1]
    if not fields:
        measure, dot, field = left.partition(".")
        if not dot:
            raise ConfigError(
                f"--fail-if must name a field of {measure}; got {text!r}. Write {measure}.win_rate, for example."
            )
        near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean {measure}.{near[0]}?" if near else f"there are {', '.join(FIELDS)}."
        raise ConfigError(f"--fail-if: {field!r} is not a field; {hint}")
    field = max(fields, key=len)
    try:
        number = float(match["number"])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        hint = "A rate is a fraction: write 0.5 for 50 %." if "%" in match["number"] else EXAMPLE
        raise ConfigError(f"--fail-if must compare with a finite number; got {match['number']!r} in {text!r}. {hint}")
    return Gate(text.strip(), left.removesuffix(f".{field}"), field, match["operator"], number)


def find_measure(flag: str, name: str, names: Mapping[str, str]) -> str:
    """The measure of this name or alias; `names` maps both to the measure. Raises ConfigError."""
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(dict.fromkeys(names.values())) or 'none'}."
    raise ConfigError(f"{flag}: there is no measure {name!r}; {hint}")


def check(gate: Gate, measure: ComparisonMeasure) -> GateResult:
    """Whether the gate is closed, and by what number."""
    result, value, why = measure.result, None, measure.why
    name, _, end = gate.field.partition(".")
    if name in ("inconsistent", "failures", "left_out"):
        value, why = measure.facts.get(name), "only a judge has it"
    elif result is not None and name in ESTIMATES:
        estimate: PairedEstimate | None = getattr(result, name)
        if estimate is None:
            why = "a judge gives verdicts, not scores; write win_rate"
        else:
            are = "is" if result.prompts == 1 else "are"
            why = f"{counted(result.prompts, 'prompt')} {are} too few for an interval, which needs {FEWEST}"
            value = getattr(estimate, end or "mean")
    elif result is not None:
        value = float(getattr(result, name))
    words = f"{measure.name}.{gate.field}"
    if value is None:
        return GateResult(gate, None, True, f"{words} could not be computed: {why}")
    return GateResult(gate, value, OPERATORS[gate.operator](value, gate.number), f"{words} is {value:.4g}")

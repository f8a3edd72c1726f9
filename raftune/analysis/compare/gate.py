"""Parses and evaluates gates such as `reward.win_rate < 0.5`."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raftune.analysis.compare.measures import ComparisonMeasure
from raftune.errors import ConfigError
from raftune.evaluation.paired import FEWEST, PairedEstimate
from raftune.sanitize import counted

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


def find(flag: str, name: str, names: Mapping[str, str]) -> str:
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

"""Parses and evaluates gates such as `reward.win_rate < 0.5`."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raftune.analysis.compare.measures import ComparisonMeasure
from raftune.errors import ConfigError
from raftune.evaluation.paired import FEWEST, PairedEstimate, PairedTest
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
LEVELS = ("difference", "a", "b")  # which verdicts alone do not give
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
    """The gate that the text means. Raises ConfigError that says what is wrong with it."""
    found = SHAPE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"--fail-if must be MEASURE.FIELD, one of {' '.join(OPERATORS)}, NUMBER; got {text!r}. {EXAMPLE}"
        )
    measure, field = read_name(found["left"], text)
    return Gate(text.strip(), measure, field, found["operator"], read_number(found["number"], text))


def read_name(name: str, text: str) -> tuple[str, str]:
    """The measure and its field: the measure's name may hold dots of its own."""
    for field in sorted(FIELDS, key=len, reverse=True):
        if name.endswith(f".{field}") and len(name) > len(field) + 1:
            return name.removesuffix(f".{field}"), field
    measure, dot, field = name.partition(".")
    if not dot:
        raise ConfigError(
            f"--fail-if must name a field of {measure}; got {text!r}. Write {measure}.win_rate, for example."
        )
    near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {measure}.{near[0]}?" if near else f"there are {', '.join(FIELDS)}."
    raise ConfigError(f"--fail-if: {field!r} is not a field; {hint}")


def read_number(number: str, text: str) -> float:
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        hint = "A rate is a fraction: write 0.5 for 50 %." if "%" in number else EXAMPLE
        raise ConfigError(f"--fail-if must compare with a finite number; got {number!r} in {text!r}. {hint}")
    return found


def find(flag: str, name: str, names: Mapping[str, str]) -> str:
    """The measure that is meant; `names` leads every name and alias to its measure. Raises ConfigError."""
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(dict.fromkeys(names.values())) or 'none'}."
    raise ConfigError(f"{flag}: there is no measure {name!r}; {hint}")


def check(gate: Gate, measure: ComparisonMeasure) -> GateResult:
    """Whether the gate is closed, and by what number."""
    name = f"{measure.name}.{gate.field}"
    value, why = value_of(gate.field, measure)
    if value is None:
        return GateResult(gate, None, True, f"{name} could not be computed: {why}")
    closed = OPERATORS[gate.operator](value, gate.number)
    return GateResult(gate, value, closed, f"{name} is {value:.4g}")


def value_of(field: str, measure: ComparisonMeasure) -> tuple[float | None, str]:
    """The number, or None and why there is none."""
    result = measure.result
    if field in ("inconsistent", "failures", "left_out"):
        return measure.facts.get(field), "only a judge has it"
    if result is None:
        return None, measure.why
    if field.split(".")[0] in ESTIMATES:
        return end_of(field, result)
    return float(getattr(result, field)), ""


def end_of(field: str, result: PairedTest) -> tuple[float | None, str]:
    name, _, end = field.partition(".")
    found: PairedEstimate | None = getattr(result, name)
    if found is None:
        return None, "a judge gives verdicts, not scores; write win_rate"
    are = "is" if result.prompts == 1 else "are"
    few = f"{counted(result.prompts, 'prompt')} {are} too few for an interval, which needs {FEWEST}"
    return getattr(found, end or "mean"), few


def failed(checked: Sequence[GateResult]) -> str | None:
    """What to say of the gates that are closed; None where all are open."""
    return "\n".join(f"gate failed: {found.gate.text}: {found.words}." for found in checked if found.closed) or None

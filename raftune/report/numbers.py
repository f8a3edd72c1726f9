"""The numbers of each round: evaluation, selection and guards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raftune.records import Row
from raftune.report.reading import RunReader
from raftune.report.samples import finite
from raftune.results.summary import ends_of, row_of, seconds_by_round


@dataclass(frozen=True, slots=True)
class ReportValue:
    """A number, with the ends of its 95 % interval where it has one, and the number of prompts that it is a mean of."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


def value_of(found: Any) -> ReportValue | None:
    """The number, or the interval, that stands in metrics.json; None for anything else."""
    if not isinstance(found, Mapping):
        number = finite(found)
        return None if number is None else ReportValue(number)
    mean = finite(found.get("mean"))
    if mean is None:
        return None
    low, high = map(finite, ends_of(found) or (None, None))
    n = found.get("n")
    return ReportValue(mean, low, high, n if isinstance(n, int) else None)


def rows(reader: RunReader) -> list[Row]:
    """One row for each round that was evaluated, or trained where evaluation is off: as `raftune runs` sees them."""
    seconds = seconds_by_round(of_stages(reader))
    found = []
    for round_ in sorted({*reader.rounds("evaluate"), *reader.rounds("model")}):
        metrics = reader.json(round_, "evaluate", "metrics.json")
        try:
            row = row_of(round_, metrics, reader.json(round_, "select", "summary.json"), seconds.get(round_))
        except (KeyError, TypeError, ValueError, AttributeError):
            reader.note(f"round {round_}, evaluate", "metrics.json holds something else than metrics")
            row = {"round": round_}
        if reader.has(round_, "evaluate") or round_ not in reader.rounds("evaluate"):
            found.append({name: number for name, number in row.items() if isinstance(number, int | float)})
    return found


def of_stages(reader: RunReader) -> Iterator[dict[str, Any]]:
    """The beginnings and ends of stages and their units, each with its round and, at an end, its seconds."""
    for event in reader.events:
        if not isinstance(event.get("round"), int) or "stage" not in event:
            continue
        if event.get("event") == "stage_begin" or finite(event.get("seconds")) is not None:
            yield event


def timed(reader: RunReader) -> Iterator[dict[str, Any]]:
    """The ends of stages, interrupted ones among them."""
    return (event for event in of_stages(reader) if event.get("event") in ("stage_end", "stage_stop"))


def by_round(reader: RunReader, name: str) -> dict[int, ReportValue]:
    """A number of metrics.json in every round that measured it."""
    found = {
        round_: value_of(reader.json(round_, "evaluate", "metrics.json").get(name))
        for round_ in reader.rounds("evaluate")
    }
    return {round_: value for round_, value in found.items() if value is not None}


def curve(reader: RunReader, round_: int, name: str) -> dict[int, ReportValue]:
    """A curve over k of metrics.json, such as best_of_k, by k ascending."""
    found = reader.json(round_, "evaluate", "metrics.json").get(name)
    values = {int(k): value_of(v) for k, v in found.items() if str(k).isdigit()} if isinstance(found, Mapping) else {}
    return {k: value for k, value in sorted(values.items()) if value is not None}


def best_of(reader: RunReader, name: str) -> tuple[int, dict[int, ReportValue]]:
    """The largest k of a curve over k that any round measured, and its number in each round."""
    curves = {round_: curve(reader, round_, name) for round_ in reader.rounds("evaluate")}
    most = max((max(found) for found in curves.values() if found), default=0)
    return most, {round_: found[most] for round_, found in curves.items() if most in found}


def guarded(reader: RunReader, which: str, name: str) -> dict[int, ReportValue]:
    """A number of what each round generated (which: generated) or learned from (selected), as its guards measured
    it.
    """
    found = {}
    for round_ in reader.rounds("guard"):
        measured = reader.json(round_, "guard", "metrics.json").get(which)
        value = value_of(measured.get(name)) if isinstance(measured, Mapping) else None
        if value is not None:
            found[round_] = value
    return found


def summarised(reader: RunReader, name: str) -> dict[int, ReportValue]:
    """A number of select/summary.json in every round."""
    found = {r: value_of(reader.json(r, "select", "summary.json").get(name)) for r in reader.rounds("select")}
    return {round_: value for round_, value in found.items() if value is not None}

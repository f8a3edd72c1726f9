"""Collects the contents of a report: one JSON document, the state of the run, and the numbers of each round.

Committed files are read chunk by chunk, so memory grows with the page and not with the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raftune.config.load import validate
from raftune.config.run import RunConfig, held_out_names
from raftune.errors import RaftuneError
from raftune.records import Row
from raftune.report.images import EmbeddedImage, ImageSet
from raftune.report.reading import RunReader
from raftune.report.samples import compared, finite, learned, prompts
from raftune.results.status import in_use
from raftune.results.summary import ends_of, row_of, seconds_by_stage
from raftune.sanitize import counted, first_line
from raftune.store.kinds import is_evaluation
from raftune.store.run import RunFolder

VERSION = 1


@dataclass(frozen=True)
class ReportData:
    """The document, and what else the page is made from; `config` is None where it is lost, or another version's."""

    document: dict[str, Any]
    reader: RunReader
    config: RunConfig | None

    @property
    def best(self) -> int:
        return int(self.document["run"]["best"])


def collect(
    root: Path | str, *, working: bool | None = None, images: dict[str, EmbeddedImage | None] | None = None
) -> ReportData:
    """All that a report shows of the run.

    `working` is what the process that holds the run says of itself: True while it goes on, False when it has ended it;
    None asks the run's lock. `images` holds images that the page before had at hand, and afterwards those of this one.
    What is missing or damaged is named in the document's `missing`. Raises StoreError where the folder holds no run.
    """
    run = RunFolder(root)
    if not run.rounds():
        run.read_config()  # says that there is no run
    reader = RunReader(run)
    image_set = ImageSet(reader, images if images is not None else {})
    rows = rows_of(reader)
    rounds = [int(row["round"]) for row in rows]
    config = None
    if reader.config:
        try:
            config = validate(reader.config)
        except RaftuneError as error:
            reader.note("the run", f"config.resolved.json is not of this version: {first_line(error)}")
    best, best_by = best_round(reader, config, rounds)
    status, status_words = status_of(reader, rounds, working)
    rewards = (config.rewards.names if config is not None else ()) or reward_names(reader, "rewards/")
    judges = (held_out_names(config) if config is not None else ()) or reward_names(reader, "held_out/rewards/")
    alarms = alarms_of(reader)
    named = {sample["sample_id"] for alarm in alarms for sample in alarm["samples"]}
    document: dict[str, Any] = {
        "version": VERSION,
        "run": {
            "name": str(reader.config.get("name", run.root.resolve().name)),
            "status": status,
            "status_words": status_words,
            "rounds": rounds,
            "best": best,
            "best_by": best_by,
        },
        "rewards": list(rewards),
        "judges": list(judges),
        "compare": compared(reader, named, best, image_set),
        "prompts": prompts(reader, named, image_set),
        "learned": learned(reader, named, image_set),
        "alarms": alarms,
        "guarded": reader.rounds("guard"),
        "by_round": rows,
    }
    document["run"]["evaluation"] = is_evaluation(reader.config)
    shown = [*document["prompts"]["items"], *document["compare"]["items"]]
    kinds = {str: "text", list: "messages", int: "category"}
    media = next((kinds.get(type(item["prompt"]), "text") for item in shown), "text")
    document["run"]["media"] = "image" if reader.pictured else media
    if reader.pictured:
        document["images"] = image_set.as_json()
    image_set.keep()
    document["missing"] = reader.missing
    return ReportData(document, reader, config)


def alarms_of(reader: RunReader) -> list[dict[str, Any]]:
    """The alarms of all rounds, as the guards wrote them."""
    alarms = []
    for round_ in reader.rounds("guard"):
        for alarm in reader.json(round_, "guard", "alarms.json", list):
            is_alarm = isinstance(alarm, Mapping) and {"alarm", "round", "title", "evidence"} <= alarm.keys()
            samples = alarm.get("samples") if is_alarm else None
            if isinstance(samples, list) and all(isinstance(s, Mapping) and "sample_id" in s for s in samples):
                alarms.append({**alarm, "round": round_})
            else:
                reader.note(f"round {round_}, guard", "alarms.json holds something that is no alarm")
    return alarms


# -- the state of the run ---------------------------------------------------------------------------------------------


def status_of(reader: RunReader, rounds: list[int], working: bool | None) -> tuple[str, str]:
    """A word for programs, and a sentence that stays true when the page is opened later."""
    done, planned = max(rounds, default=0), reader.config.get("num_rounds")
    so_far = f"{done} of {planned} rounds done" if planned else f"{counted(done, 'round')} done"
    if not reader.config:
        return "damaged", f"damaged: {so_far}; what can be read is shown"
    if working or (working is None and in_use(reader.run.root)):
        return "running", f"at work when this was written: {so_far}"
    if reader.ended():
        return "finished", f"finished: {reader.events[-1].get('reason') or so_far}"
    if isinstance(planned, int) and rounds and done >= planned:
        return "finished", f"finished: {so_far}"
    return "interrupted", f"interrupted: {so_far}; raftune resume goes on with it"


def best_round(reader: RunReader, config: RunConfig | None, rounds: list[int]) -> tuple[int, str]:
    """The published round, and what it was chosen by; before there is one, the one that would be published: the highest
    value, the earliest of equals."""
    published = reader.own_json("best.json")
    if isinstance(published.get("round"), int) and published["round"] in rounds:
        return int(published["round"]), str(published.get("by", ""))
    by = config.evaluation.best_by if config is not None else "reward"
    for name in (by, f"held_out/rewards/{by}/mean", f"rewards/{by}/mean"):
        if values := by_round(reader, name):
            return max(values, key=lambda round_: (values[round_].y or 0.0, -round_)), by
    return max(rounds, default=0), "last round"


def reward_names(reader: RunReader, prefix: str) -> tuple[str, ...]:
    """The names of rewards as the metrics have them: those given as objects stand in no configuration."""
    metrics = [reader.json(round_, "evaluate", "metrics.json") for round_ in reader.rounds("evaluate")]
    names = [name for metrics_ in metrics for name in metrics_ if name.startswith(prefix) and name.endswith("/mean")]
    return tuple(dict.fromkeys(name.removeprefix(prefix).removesuffix("/mean") for name in names))


# -- the numbers of each round ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChartPoint:
    """One place of a line; y is None where nothing was measured, low and high are the ends of its 95 % interval if
    known, n the number of prompts that it is a mean of."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        low, high = self.low, self.high
        return (low, high) if low is not None and high is not None and math.isfinite(low + high) else None

    @property
    def words(self) -> str:
        """The number, its interval and what it is a mean of, for who hovers over its mark or touches it."""
        ends = f" [{number(self.low)}, {number(self.high)}]" if self.interval else ""
        return number(self.y) + ends + ("" if self.n is None else f", n = {self.n:,}")


Points = Mapping[int, ChartPoint]  # by round, or by k


def number(value: float | None, digits: int = 3) -> str:
    """The number with so many decimals, few enough that a person reads it; a dash for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e5 or (value and size < 10**-digits / 2):
        written = f"{value:.2e}"
    elif size >= 1000:
        written = f"{value:,.0f}"
    else:
        written = f"{value:.{min(digits, 1 if size >= 100 else 2 if size >= 10 else digits)}f}"
    return written.replace("-", "−")


def point(x: int, value: Any) -> ChartPoint | None:
    """The number, or the interval, that stands in metrics.json; None for anything else."""
    if not isinstance(value, Mapping):
        mean = finite(value)
        return None if mean is None else ChartPoint(x, mean)
    mean, n = finite(value.get("mean")), value.get("n")
    if mean is None:
        return None
    low, high = map(finite, ends_of(value) or (None, None))
    return ChartPoint(x, mean, low, high, n if isinstance(n, int) else None)


def rows_of(reader: RunReader) -> list[Row]:
    """One row for each round that was evaluated, or trained where evaluation is off: as `raftune runs` sees them."""
    spent = seconds_by_stage(reader.events)
    rows = []
    for round_ in sorted({*reader.rounds("evaluate"), *reader.rounds("model")}):
        metrics = reader.json(round_, "evaluate", "metrics.json")
        seconds = sum(spent[round_].values()) if round_ in spent else None
        try:
            row = row_of(round_, metrics, reader.json(round_, "select", "summary.json"), seconds)
        except (KeyError, TypeError, ValueError, AttributeError):
            reader.note(f"round {round_}, evaluate", "metrics.json holds something else than metrics")
            row = {"round": round_}
        if reader.has(round_, "evaluate") or round_ not in reader.rounds("evaluate"):
            rows.append({name: number for name, number in row.items() if isinstance(number, int | float)})
    return rows


def by_round(
    reader: RunReader, name: str, stage: str = "evaluate", file: str = "metrics.json", part: str = ""
) -> Points:
    """A number of a stage's JSON file, or of a part of it, in every round that has it."""
    points = {}
    for round_ in reader.rounds(stage):
        content = reader.json(round_, stage, file)
        content = content.get(part) if part else content
        points[round_] = point(round_, content.get(name)) if isinstance(content, Mapping) else None
    return {round_: value for round_, value in points.items() if value is not None}


def curve(reader: RunReader, round_: int, name: str) -> Points:
    """A curve over k of metrics.json, such as best_of_k, by k ascending."""
    content = reader.json(round_, "evaluate", "metrics.json").get(name)
    ks = sorted(int(k) for k in content if str(k).isdigit()) if isinstance(content, Mapping) else []
    return {k: value for k in ks if (value := point(k, content[str(k)])) is not None}


def best_of(reader: RunReader, name: str) -> tuple[int, Points]:
    """The largest k of a curve over k that any round measured, and its number in each round."""
    curves = {round_: curve(reader, round_, name) for round_ in reader.rounds("evaluate")}
    most = max((max(points) for points in curves.values() if points), default=0)
    return most, {round_: replace(points[most], x=round_) for round_, points in curves.items() if most in points}

"""Collects the contents of a report as one JSON document.

Committed files are read chunk by chunk, so memory grows with the page and not with the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raftune.records import Row
from raftune.report import numbers
from raftune.report.learned import learned
from raftune.report.pairs import compared
from raftune.report.pictures import EmbeddedImage, ImageSet
from raftune.report.prompts import prompts
from raftune.report.reading import RunReader
from raftune.report.standing import RunState, standing_of
from raftune.store.kinds import is_evaluation
from raftune.store.run import RunFolder

VERSION = 1
ALARM = ("alarm", "round", "title", "evidence")


@dataclass(frozen=True)
class ReportData:
    """The document, and what the overview and the configuration are made from."""

    document: dict[str, Any]
    reader: RunReader
    standing: RunState
    rows: list[Row] = field(default_factory=list)


def collect(
    root: Path | str, *, working: bool | None = None, made: dict[str, EmbeddedImage | None] | None = None
) -> ReportData:
    """All that a report shows of the run.

    `working` is what the process that holds the run says of itself: True while it goes on, False when it has ended it;
    None asks the run's lock. `made` holds images that the page before had at hand, and afterwards those of this one.
    What is missing or damaged is named in the document's `missing`. Raises StoreError where the folder holds no run.
    """
    run = RunFolder(root)
    if not run.rounds():
        run.read_config()  # says that there is no run
    reader = RunReader(run)
    album = ImageSet(reader, made if made is not None else {})
    rows = numbers.rows(reader)
    standing = standing_of(reader, rows, working=working)
    alarms = alarms_of(reader)
    named = {sample["sample_id"] for alarm in alarms for sample in alarm["samples"]}
    document: dict[str, Any] = {
        "version": VERSION,
        "run": standing.as_json(),
        "rewards": list(standing.rewards),
        "judges": list(standing.judges),
        "compare": compared(reader, named, standing.best, album),
        "prompts": prompts(reader, named, album),
        "learned": learned(reader, named, album),
        "alarms": alarms,
        "guarded": reader.rounds("guard"),
        "by_round": rows,
    }
    document["run"]["evaluation"] = is_evaluation(reader.config)
    document["run"]["media"] = "image" if reader.pictured else media_of(document)
    if reader.pictured:
        document["images"] = album.as_json()
    album.keep()
    document["missing"] = reader.missing
    return ReportData(document, reader, standing, rows)


def alarms_of(reader: RunReader) -> list[dict[str, Any]]:
    """The alarms of all rounds, as the guards wrote them."""
    found = []
    for round_ in reader.rounds("guard"):
        for alarm in reader.json(round_, "guard", "alarms.json", list):
            if not is_alarm(alarm):
                reader.note(f"round {round_}, guard", "alarms.json holds something that is no alarm")
                continue
            found.append({**alarm, "round": round_})
    return found


def is_alarm(value: Any) -> bool:
    """Whether this has what every alarm has, of the right kinds."""
    if not isinstance(value, Mapping) or not all(name in value for name in ALARM):
        return False
    samples = value.get("samples")
    return isinstance(samples, list) and all(isinstance(s, Mapping) and "sample_id" in s for s in samples)


def media_of(document: Mapping[str, Any]) -> str:
    """text, messages or category, by the first prompt that is shown."""
    shown: Sequence[Mapping[str, Any]] = [*document["prompts"]["items"], *document["compare"]["items"]]
    kinds = {str: "text", list: "messages", int: "category"}
    return next((kinds.get(type(item["prompt"]), "text") for item in shown), "text")

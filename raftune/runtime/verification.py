"""Verifies the files of a run, committed ones and those at its top level."""

from __future__ import annotations

import json
from collections.abc import Iterator

from raftune.config.load import validate
from raftune.errors import ConfigError, RunDamaged
from raftune.evaluation.history import best, best_json
from raftune.results.summary import AGAIN, Metrics, best_round, read_json
from raftune.runtime import rescoring
from raftune.sanitize import first_line, shell_command
from raftune.store.commit import JOURNAL, NAME, SELF
from raftune.store.files import sha256_of
from raftune.store.layout import chunk_file
from raftune.store.run import CONFIG, YAML, RunFolder, difference_to_yaml, holds_files


def faults_of(run: RunFolder) -> list[str]:
    """Everything that is wrong with a run's files, a line each; none when all is as it was written.

    Raises StoreError where there is no run, RunTooNew.
    """
    try:
        run.read_config()
    except RunDamaged as error:
        return [first_line(error), *run.faults()]
    return [
        *_top_level(run),
        *_journals(run),
        *run.faults(),
        *_uncommitted(run),
        *_best(run),
        *rescoring.faults(run),
    ]


def check_config_file(run: RunFolder) -> None:
    """Raises RunDamaged where config.yaml differs from the configuration that the run is resumed under."""
    path = run.root / YAML
    recorded = run.config_record().get("files", {}).get(YAML)
    if recorded is None or not path.is_file() or sha256_of(path) == recorded:
        return
    changed = difference_to_yaml(path, json.loads((run.root / CONFIG).read_bytes()))
    fields = [f"{name} is {new!r} there and was {old!r}" for name, (old, new) in changed.items()]
    words = f": {', '.join(fields[:3])}" if fields else ""
    again = shell_command("raftune", "train", path, "--output-dir", run.root)
    raise RunDamaged(
        f"{path} has changed since the run was started{words}. To go on with it, run `{again}`; to go on as before, "
        "delete it: it is written again."
    )


def _top_level(run: RunFolder) -> Iterator[str]:
    """Faults of the files that were written with the configuration, and of the event log."""
    for name, sha256 in sorted(run.config_record().get("files", {}).items()):
        path = run.root / name
        if not path.is_file():
            yield f"{path} is missing"
        elif sha256_of(path) != sha256:
            yield f"{path} has changed since it was written (its SHA-256 differs)"
    path = run.events.path
    if not path.is_file():
        if run.rounds():
            yield f"{path} is missing"
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
        if is_event and isinstance(event.get("time"), int | float):
            continue
        if line and line.rstrip().endswith(b"}"):  # not the start of a line that a kill cut short
            yield f"{path} line {number} is not an event"


def _journals(run: RunFolder) -> Iterator[str]:
    """Chunks of interrupted stages that are not as they were written; `resume` runs them again."""
    for path in sorted(run.root.glob(f"round-*/**/{JOURNAL}")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                chunk = path.parent / chunk_file(entry["chunk"])
                unchanged = chunk.name == entry["file"] and sha256_of(chunk) == entry["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                yield f"{path} line {number} is no journal entry of a chunk; `raftune resume` runs that chunk again"
                continue
            if not unchanged:
                yield f"{chunk} has changed since it was written; `raftune resume` runs that chunk again"


def _uncommitted(run: RunFolder) -> Iterator[str]:
    """Stages without a manifest of rounds that are over, which have files or must have been run."""
    committed = {key for key in run.places() if run.is_committed(*key)}
    config = run.read_config()
    last = {"model", "rows"}  # the stages of a round that no other stage of it reads
    last |= {"evaluate"} if config.get("evaluation", {}).get("num_prompts") else set()
    last |= {"guard"} if config.get("guards", {}).get("enabled") else set()
    over = sorted({round_ for round_, _ in committed})
    if run.events.last().get("event") != "end":
        over = over[:-1]
    for round_ in over:
        present = {name for _, name in run.places([round_]) if holds_files(run.folder(round_, name))}
        for name in sorted(present | (last if round_ else last - {"rows", "guard"})):
            if (round_, name) not in committed and name != "train":
                yield f"{run.folder(round_, name) / NAME} is missing, and the round is over"


def _best(run: RunFolder) -> Iterator[str]:
    """What is wrong with best.json: it must follow from the rounds."""
    path = run.root / "best.json"
    try:
        named = best_round(run.root)
        config = validate(run.read_config())
        history: list[Metrics] = [read_json(run.folder(round_, "evaluate") / "metrics.json") for round_ in run.rounds()]
        done = [r for r in run.rounds() if run.is_committed(r, "evaluate" if history[r] else "model")]
        if named is None:
            if len(done) > 1:
                yield f"{path} is missing. {AGAIN}"
            return
        content = {name: value for name, value in read_json(path).items() if name != SELF}
        last = content["rounds"]  # the last round may have been committed and not yet compared
        outcome = best(config, history[: last + 1])
    except (RunDamaged, ConfigError, KeyError, IndexError, TypeError) as error:
        if path.name in str(error):
            yield first_line(error)
        return  # other unreadable files are among the faults already
    if content != best_json(config, outcome) or last not in range(max(done, default=0) - 1, len(history)):
        yield f"{path} names round {named} of {last}; by the rounds' own numbers it is {outcome.best}. {AGAIN}"

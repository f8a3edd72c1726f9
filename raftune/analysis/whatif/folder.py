"""The folder of a what-if run: `whatif/NAME/`, laid out like a run directory."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raftune.config.load import differences
from raftune.errors import ConfigChanged, ConfigError, RunDamaged, RunInUse, RunTooNew, StoreError
from raftune.runtime.staleness import change
from raftune.sanitize import shell_command
from raftune.store.files import json_bytes, write_json
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder

FOLDER, RECORD = "whatif", "whatif.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class OverlayRun(RunFolder):
    """A run with some stages replaced by those of another folder."""

    def __init__(self, root: Path, beneath: RunFolder, own: Collection[str]) -> None:
        super().__init__(root)
        self.beneath, self.own = beneath, frozenset(own)

    def folder(self, round_: int, name: str) -> Path:
        return super().folder(round_, name) if name in self.own else self.beneath.folder(round_, name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds this what-if for this process; the run itself may be at work. Raises RunInUse, StoreError."""
        holding = super().lock()
        try:
            holding.__enter__()
        except RunInUse as error:
            raise RunInUse(
                f"{self.root} is being made by another process. Wait for it, or choose another --name."
            ) from error
        with contextlib.ExitStack() as stack:
            stack.push(holding.__exit__)
            yield


def place_of(run: RunFolder, name: str) -> Path:
    """The folder of the what-if of this name. Raises ConfigError for what is no name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' and '-'; got {name!r}. Shorten or rename it.")
    return run.root / FOLDER / name


def scores_of(run: RunFolder, given: str) -> tuple[OverlayRun, dict[str, Any]]:
    """The run under the scores of a what-if, and the sections of the configuration that made these.

    Raises ConfigError where there are none under that name.
    """
    name = given.removeprefix(f"{FOLDER}/").rstrip("/")
    root = place_of(run, name) if _NAME.fullmatch(name) else Path(given)
    scored = sorted(
        path.parent.name for path in run.root.glob(f"{FOLDER}/*/{RECORD}") if any(path.parent.glob("*/score"))
    )
    if root.parent != run.root / FOLDER or root.name not in scored:
        known = f"it wrote {', '.join(scored)}" if scored else "it wrote none yet"
        command = shell_command("raftune", "rescore", run.root)
        raise ConfigError(f"--scores must name scores that `{command}` wrote; got {given!r}; {known}.")
    return OverlayRun(root, run, {"score"}), read_record(root)["configuration"]


def read_record(root: Path) -> dict[str, Any]:
    """What the what-if was asked. Raises RunDamaged."""
    path = root / RECORD
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("configuration"), dict):
        raise RunDamaged(f"{path} cannot be read. Delete {root}: it can be made again.")
    return found


def keep_record(place: RunFolder, record: Mapping[str, Any]) -> None:
    """Puts on record what is asked. Raises ConfigChanged where this name stands for something else already."""
    path = place.root / RECORD
    if not path.exists():
        write_json(place.tmp, path, record)
    elif path.read_bytes() != json_bytes(record):
        changes = differences(flat(read_record(place.root)), flat(record))
        raise ConfigChanged(
            f"{place.root} was made otherwise: {in_words(changes)}. Choose another --name, or delete that folder."
        )


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the sections of its configuration beside its other entries, as they are named elsewhere."""
    return {**{name: value for name, value in record.items() if name != "configuration"}, **record["configuration"]}


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Field: before → now, of every difference."""
    said = [change(name, *told_apart(*map(brief, pair))) for name, pair in sorted(changes.items())]
    return ", ".join(said) or "what it was made from has changed"


def told_apart(old: Any, new: Any, width: int = 40) -> tuple[Any, Any]:
    """Both values; of long ones that begin alike, the ends."""
    texts = str(old), str(new)
    if max(map(len, texts)) <= width or texts[0][: width - 3] != texts[1][: width - 3]:
        return old, new
    first, second = (text if len(text) <= width else f"…{text[1 - width :]}" for text in texts)
    return first, second


def brief(value: Any) -> Any:
    """The value; of rewards what tells them from others, a spec alone as its text."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, Mapping) for v in value):
        return value
    usual = {"weight": 1.0}
    told = [{k: v for k, v in spec.items() if v not in (None, {}, usual.get(k))} for spec in value]
    short = [spec["spec"] if spec.keys() == {"spec"} else spec for spec in told]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short


def faults(run: RunFolder, round_: int, names: Sequence[str]) -> list[str]:
    """What keeps these stages of the round from being read, a line each."""
    found: list[str] = []
    for name in names:
        folder = run.folder(round_, name)
        try:
            found += run.faults_of(round_, name) if run.is_committed(round_, name) else [f"{folder} is not finished"]
        except RunTooNew as error:
            found.append(str(error).split(". ")[0])
    return found


def rounds_of(run: RunFolder, which: str) -> list[int]:
    """The training rounds that `all` or a number stands for. Raises ConfigError, StoreError where there is none."""
    known = [round_ for round_ in run.rounds() if round_ > 0]
    if not known:
        raise StoreError(f"{run.root} has generated nothing to train on. {how_to_go_on(run.root, run.read_config())}")
    if which == "all":
        return known
    if not which.isdigit() or int(which) not in known:
        said = ", ".join(map(str, known)) if len(known) < 4 else f"{known[0]} … {known[-1]}"
        raise ConfigError(f"--round must be all or one of {said}; got {which!r}. Choose one of these.")
    return [int(which)]

"""The folder of a what-if run: `whatif/NAME/`, laid out like a run directory."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raftune.config.load import differences
from raftune.errors import ConfigChanged, ConfigError, RunDamaged, RunInUse
from raftune.runtime.staleness import change
from raftune.sanitize import shell_command
from raftune.store.files import json_bytes, write_json
from raftune.store.run import RunFolder

FOLDER, RECORD = "whatif", "whatif.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class OverlayRun(RunFolder):
    """A run with some stages replaced by those of another folder."""

    def __init__(self, root: Path, beneath: RunFolder, replaced: Collection[str]) -> None:
        super().__init__(root)
        self.beneath, self.replaced = beneath, frozenset(replaced)

    def folder(self, round_: int, name: str) -> Path:
        return super().folder(round_, name) if name in self.replaced else self.beneath.folder(round_, name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks this what-if for this process, not the run itself. Raises RunInUse, StoreError."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(super().lock())
            except RunInUse as error:
                raise RunInUse(
                    f"{self.root} is being made by another process. Wait for it, or choose another --name."
                ) from error
            yield


def place_of(run: RunFolder, name: str) -> Path:
    """The folder of the what-if of this name. Raises ConfigError for an unusable name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' and '-'; got {name!r}. Shorten or rename it.")
    return run.root / FOLDER / name


def scores_of(run: RunFolder, reference: str) -> tuple[OverlayRun, dict[str, Any]]:
    """The run under the scores of a what-if, and the sections of the configuration of these.

    Raises ConfigError where there are none under that name.
    """
    name = reference.removeprefix(f"{FOLDER}/").rstrip("/")
    root = run.root / FOLDER / name if _NAME.fullmatch(name) else Path(reference)
    scored = sorted(
        path.parent.name for path in run.root.glob(f"{FOLDER}/*/{RECORD}") if any(path.parent.glob("*/score"))
    )
    if root.parent != run.root / FOLDER or root.name not in scored:
        known = f"it wrote {', '.join(scored)}" if scored else "it wrote none yet"
        command = shell_command("raftune", "rescore", run.root)
        raise ConfigError(f"--scores must name scores that `{command}` wrote; got {reference!r}; {known}.")
    return OverlayRun(root, run, {"score"}), read_record(root)["configuration"]


def read_record(root: Path) -> dict[str, Any]:
    """The settings of the what-if. Raises RunDamaged."""
    path = root / RECORD
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and isinstance(record.get("configuration"), dict):
            return record
    raise RunDamaged(f"{path} cannot be read. Delete {root}: it can be made again.")


def keep_record(run: RunFolder, record: Mapping[str, Any]) -> None:
    """Stores the settings. Raises ConfigChanged where this name has others already."""
    path = run.root / RECORD
    if not path.exists():
        write_json(run.tmp, path, record)
    elif path.read_bytes() != json_bytes(record):
        old, new = (
            {**{name: value for name, value in entry.items() if name != "configuration"}, **entry["configuration"]}
            for entry in (read_record(run.root), record)
        )
        raise ConfigChanged(
            f"{run.root} was made otherwise: {in_words(differences(old, new))}. Choose another --name, or delete that "
            "folder."
        )


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Field: before → now, of every difference; of long values that begin alike, the ends."""
    width = 40
    lines = []
    for name, pair in sorted(changes.items()):
        old, new = map(brief, pair)
        texts = str(old), str(new)
        if max(map(len, texts)) > width and texts[0][: width - 3] == texts[1][: width - 3]:
            old, new = (text if len(text) <= width else f"…{text[1 - width :]}" for text in texts)
        lines.append(change(name, old, new))
    return ", ".join(lines) or "what it was made from has changed"


def brief(value: Any) -> Any:
    """The value; of rewards the options that are set, a spec alone as its text."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, Mapping) for v in value):
        return value
    usual = {"weight": 1.0}
    specs = [{k: v for k, v in spec.items() if v not in (None, {}, usual.get(k))} for spec in value]
    short = [spec["spec"] if spec.keys() == {"spec"} else spec for spec in specs]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short

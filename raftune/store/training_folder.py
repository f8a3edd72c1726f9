"""The directory of a training outside of runs: `raftune sft` and `raftune reward train`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from raftune.config.load import differences, validate_as
from raftune.errors import ConfigChanged, ConfigError, StoreError
from raftune.sanitize import first_line
from raftune.store.files import discard, stage_file
from raftune.store.run import RunFolder

CONFIG, DATA, REPORT = "config.yaml", "data.json", "report.json"
HELD_OUT, SKIPPED = "held_out.parquet", "skipped.jsonl"


@contextlib.contextmanager
def open_training(
    config: Any,
    command: str,
    *,
    has_work: Callable[[Path], bool],
    stale: Sequence[str] = (),
    without_effect: frozenset[str] = frozenset({"output_dir"}),
) -> Iterator[RunFolder]:
    """Locks the directory of a training and writes its config.yaml.

    has_work: whether there is work that another configuration would throw away; without it another one replaces the
    configuration and deletes what is `stale`. without_effect: fields, or fields of sections with a dot, on which no
    result depends. Raises StoreError
    where the directory holds something else, ConfigChanged where there is work of another configuration.
    """
    folder = RunFolder(Path(config.output_dir).expanduser())
    root, path = folder.root, folder.root / CONFIG
    must = f"output_dir must be empty or hold an earlier `{command}`;"
    excluded: dict[str, Any] = {}
    for name in without_effect:
        section, _, field = name.partition(".")
        excluded[section] = {*excluded.get(section, ()), field} if field else True
    options: Any = {"mode": "json", "exclude": excluded}
    current, earlier = config.model_dump(**options), {}
    if path.is_file():  # checked before anything in the directory is touched
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            earlier = validate_as(type(config), {**content, "output_dir": config.output_dir}).model_dump(**options)
        except (ConfigError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise StoreError(f"{must} {path} is not one's: {first_line(error)}. Choose another output_dir.") from error
    elif root.is_dir():
        names = {child.name for child in root.iterdir()}
        cleared = {"LOCK", "tmp"} if "LOCK" in names or not any((root / "tmp").glob("*")) else set()
        if foreign := sorted(names - cleared):
            raise StoreError(f"{must} {root} holds {', '.join(foreign[:3])}. Choose another output_dir.")
    with folder.lock():
        changed = {name: change for name, change in differences(earlier, current).items() if not _is_same_file(*change)}
        if earlier and changed and has_work(root):
            lines = [f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in sorted(changed.items())]
            head = f"{root} holds the work of another configuration:"
            raise ConfigChanged("\n".join([head, *lines, "Choose another output_dir, or delete this one."]))
        if changed:
            for name in stale:
                discard(root / name, folder.tmp)
            with stage_file(folder.tmp, path) as staged:
                staged.write_text(yaml.safe_dump(current, sort_keys=False, allow_unicode=True), encoding="utf-8")
        yield folder


def _is_same_file(old: object, new: object) -> bool:
    return (
        isinstance(old, str)
        and isinstance(new, str)
        and Path(new).exists()
        and Path(old).resolve() == Path(new).resolve()
    )

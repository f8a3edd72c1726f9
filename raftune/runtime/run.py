"""Starts or resumes a run, and locks its directory."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from raftune.config.load import declared, differences, validate
from raftune.config.paths import has_paths, moved
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, StoreError
from raftune.loop import RunOutcome, train
from raftune.protocols import Callback
from raftune.report.rewriting import rewriting
from raftune.runtime.assembly import PythonObjects, Runtime
from raftune.runtime.preflight import preflight
from raftune.runtime.rescoring import finished, statuses
from raftune.runtime.staleness import check
from raftune.runtime.trackers import reporting
from raftune.runtime.verification import ENVIRONMENT, faults_of, refuse_edited
from raftune.store.files import json_bytes, sha256_of, stage_file
from raftune.store.run import YAML, RunFolder

LIBRARIES = (
    "raftune",
    "torch",
    "transformers",
    "trl",
    "peft",
    "diffusers",
    "accelerate",
    "datasets",
    "pyarrow",
    "pillow",
    "numpy",
    "pydantic",
)


def run(
    config: RunConfig | Mapping[str, Any],
    objects: PythonObjects | None = None,
    *,
    observe: Callback = lambda kind, facts: None,
    redo: str | None = None,
    only: str | None = None,
    after: Callable[[Runtime, RunOutcome], None] | None = None,
) -> RunOutcome:
    """Runs the configuration in its directory: begins, continues, or finds everything done. Raises RaftuneError.

    The same directory and configuration continue what was interrupted. Another configuration is refused with the
    difference, unless `redo` names the stage from which on the work is done again. Where these are score stages, `only`
    names statuses, with commas: only samples with a part of such a status are scored again.
    """
    config = config if isinstance(config, RunConfig) else validate(config)
    folder = RunFolder(root_of(config))
    named = statuses(only, redo, folder)
    refuse_foreign(folder)
    if not folder.exists():
        check_writable(folder.root)
    with folder.lock():
        assembly = Runtime(folder, config, objects)
        try:
            preflight(assembly)
            aside = check(assembly, redo, named)
            with reporting(config, folder.root, observe) as inner, rewriting(config, folder.root, inner) as tell:
                tell("begin", {"root": str(folder.root), "set_aside": aside, "changed": note_changes(folder, config)})
                save_config(folder, config)
                outcome = train(assembly, tell)
            finished(folder)
            if after is not None:
                after(assembly, outcome)
            return outcome
        finally:
            assembly.close()


def resume(
    root: str | Path,
    objects: PythonObjects | None = None,
    *,
    observe: Callback = lambda kind, facts: None,
    redo: str | None = None,
    only: str | None = None,
) -> RunOutcome:
    """Continues the run in this directory under its own configuration. Raises StoreError where there is none."""
    folder = RunFolder(root)
    config = folder.configuration()
    refuse_edited(folder)
    return run(config.model_copy(update={"output_dir": str(root)}), objects, observe=observe, redo=redo, only=only)


def check_writable(root: Path) -> None:
    """Raises StoreError where a new run could not write its directory; leaves nothing there."""
    place = next(path for path in (root, *root.resolve().parents) if path.exists())
    if not place.is_dir():
        raise StoreError(f"output_dir must be a directory; {place} is a file. Choose another output_dir.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StoreError(
            f"output_dir must be in a folder that can be written; {root} cannot: {error.strerror or error}. Choose "
            "another output_dir."
        ) from error


def root_of(config: RunConfig) -> Path:
    return Path(config.output_dir) if config.output_dir is not None else Path("runs") / config.name


def refuse_foreign(folder: RunFolder) -> None:
    """Raises StoreError where the directory holds something that is no run, ConfigError where its name is no text."""
    try:
        os.fspath(folder.root).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"output_dir must be a path in UTF-8, as the files of a run are; got {os.fspath(folder.root)!a}. Rename it."
        ) from None
    if folder.root.exists() and not folder.root.is_dir():
        raise StoreError(f"output_dir must be a directory; {folder.root} is a file. Choose another output_dir.")
    if folder.exists() or folder.rounds() or not folder.root.is_dir():
        return
    ours = {"LOCK", "tmp", "config.yaml", "events.jsonl", "environment.json"}
    ours |= {"trainer_state.json", "all_results.json"}  # a script's, which may be written before it trains
    strangers = sorted(p.name for p in folder.root.iterdir() if p.name not in ours and "_results.json" not in p.name)
    if strangers:
        raise StoreError(
            f"output_dir must be empty or hold a run; {folder.root} holds {', '.join(strangers[:3])}. "
            "Choose another output_dir."
        )


def note_changes(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The fields that differ from the run's last start; those that shape anything committed were refused before."""
    before = recorded(folder)
    return {} if before is None else differences(completed(before), resolved_config(folder, config))


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """What an earlier version recorded, with the defaults of fields that it did not know: these are no changes."""
    try:
        return validate(recorded).model_dump(mode="json") | {"output_dir": None}
    except ConfigError:
        return recorded


def save_config(folder: RunFolder, config: RunConfig) -> None:
    """config.resolved.json for workers, config.yaml for people, environment.json for the record.

    All are the same wherever the directory lies.
    """
    import yaml

    resolved, base = resolved_config(folder, config), folder.base()
    chosen = moved(declared(validate(resolved)), base, folder.root)  # from anywhere, as paths in a file are
    place = Path(os.path.relpath(base, folder.root.resolve())).as_posix()
    named = {"folder": place} if has_paths(resolved, base) else {}
    unchanged = recorded(folder) == resolved
    known = folder.config_record().get("files", {}) if unchanged else {}
    files = {}
    for name, content in (
        (ENVIRONMENT, json_bytes(environment())),
        (YAML, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).encode()),
    ):
        path = folder.root / name
        files[name] = sha256_of(path) if path.is_file() else ""
        if not unchanged or not path.is_file() or files[name] != known.get(name, files[name]):
            files[name] = hashlib.sha256(content).hexdigest()
            with stage_file(folder.tmp, path) as staged:
                staged.write_bytes(content)
    record = {"files": files, **named}
    if not unchanged or record != folder.config_record():
        folder.write_config(resolved, record)


def recorded(folder: RunFolder) -> dict[str, Any] | None:
    """The configuration that the run was last started with; None if it is lost (the manifests still hold it)."""
    try:
        return folder.read_config()
    except StoreError:
        return None


def resolved_config(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The configuration as the run records it."""
    return folder.in_own_terms(config) | {"output_dir": None}


def environment() -> dict[str, Any]:
    """The versions of what shapes a run; recorded, not part of any key."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "libraries": versions}


def verify(root: str | Path) -> list[str]:
    """Everything that is wrong with a run's files, a line each; none when all is as it was committed."""
    return faults_of(RunFolder(root))


def all_runs(root: str | Path) -> list[Path]:
    """The runs in a folder, by name. Raises ConfigError where there is no such folder."""
    base = Path(root)
    if not base.is_dir():
        raise ConfigError(f"there is no folder {base}. Name the folder that holds your runs.")
    return sorted(path for path in base.iterdir() if may_look(path) and RunFolder(path).exists())


def may_look(folder: Path) -> bool:
    """Whether we may see what lies in the folder: a disk's lost+found must not hide the runs beside it."""
    return os.access(folder, os.X_OK)

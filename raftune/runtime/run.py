"""Starts or resumes a run, and locks its directory."""

from __future__ import annotations

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
from raftune.report import rewriting
from raftune.runtime.assembly import PythonObjects, Runtime
from raftune.runtime.preflight import preflight
from raftune.runtime.rescoring import statuses, unfinished
from raftune.runtime.staleness import check, named_stages
from raftune.runtime.trackers import reporting
from raftune.runtime.verification import check_config_file, faults_of
from raftune.store.files import json_bytes, sha256_hex, sha256_of, stage_file
from raftune.store.run import YAML, RunFolder

ENVIRONMENT = "environment.json"
LIBRARIES = (
    *("raftune", "torch", "transformers", "trl", "peft", "diffusers", "accelerate", "datasets"),
    *("pyarrow", "pillow", "numpy", "pydantic"),
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
    """Runs the configuration in its directory: starts, resumes, or finds everything done. Raises RaftuneError.

    The same directory and configuration resume what was interrupted. Another configuration is an error that lists the
    differences, unless `redo` names the stage from which on the work is redone. Where these are score stages, `only`
    names statuses, with commas: only samples with a part of such a status are scored again.
    """
    config = config if isinstance(config, RunConfig) else validate(config)
    folder = RunFolder(root_of(config))
    named = statuses(only, redo, folder)
    check_output_dir(folder)
    if not folder.exists():
        check_writable(folder.root)
    with folder.lock():
        runtime = Runtime(folder, config, objects)
        try:
            named_stages(runtime, redo)  # a wrong name is refused before a reward is loaded
            preflight(runtime)
            aside = check(runtime, redo, named)
            with reporting(config, folder.root, observe) as inner, rewriting(config, folder.root, inner) as emit:
                recorded, resolved = _recorded(folder), folder.as_recorded(config) | {"output_dir": None}
                changed = {} if recorded is None else differences(_completed(recorded), resolved)
                emit("begin", {"root": str(folder.root), "set_aside": aside, "changed": changed})
                _save_config(folder, recorded, resolved)
                outcome = train(runtime, emit)
            unfinished(folder)  # removes what `--only` left
            if after is not None:
                after(runtime, outcome)
            return outcome
        finally:
            runtime.close()


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
    check_config_file(folder)
    return run(config.model_copy(update={"output_dir": str(root)}), objects, observe=observe, redo=redo, only=only)


def root_of(config: RunConfig) -> Path:
    return Path(config.output_dir) if config.output_dir is not None else Path("runs") / config.name


def check_writable(root: Path) -> None:
    """Raises StoreError where a new run could not write its directory; leaves nothing there."""
    parent = next(path for path in (root, *root.resolve().parents) if path.exists())
    if not parent.is_dir():
        raise StoreError(f"output_dir must be a directory; {parent} is a file. Choose another output_dir.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise StoreError(
            f"output_dir must be in a folder that can be written; {root} cannot: {error.strerror or error}. Choose "
            "another output_dir."
        ) from error


def check_output_dir(folder: RunFolder) -> None:
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
    run_files = {"LOCK", "tmp", "config.yaml", "events.jsonl", ENVIRONMENT}
    run_files |= {"trainer_state.json", "all_results.json"}  # a script's, which may be written before it trains
    foreign = sorted(p.name for p in folder.root.iterdir() if p.name not in run_files and "_results.json" not in p.name)
    if foreign:
        raise StoreError(
            f"output_dir must be empty or hold a run; {folder.root} holds {', '.join(foreign[:3])}. "
            "Choose another output_dir."
        )


def _recorded(folder: RunFolder) -> dict[str, Any] | None:
    """The configuration of the run's last start; None if it is lost (the manifests still hold it)."""
    try:
        return folder.read_config()
    except StoreError:
        return None


def _completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the defaults of fields that an earlier version did not have."""
    try:
        return validate(recorded).model_dump(mode="json") | {"output_dir": None}
    except ConfigError:
        return recorded


def _save_config(folder: RunFolder, recorded: dict[str, Any] | None, resolved: dict[str, Any]) -> None:
    """Writes config.resolved.json for workers, config.yaml for people and environment.json, the same wherever the
    directory is."""
    import yaml

    base = folder.base()
    chosen = moved(declared(validate(resolved)), base, folder.root)  # relative to the file, as all paths in YAML
    relative_base = Path(os.path.relpath(base, folder.root.resolve())).as_posix()
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    environment = {"python": platform.python_version(), "platform": platform.platform(), "libraries": versions}
    recorded_files = folder.config_record().get("files", {}) if recorded == resolved else {}
    files = {}
    for name, content in (
        (ENVIRONMENT, json_bytes(environment)),
        (YAML, yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).encode()),
    ):
        path = folder.root / name
        files[name] = sha256_of(path) if path.is_file() else ""
        if recorded != resolved or not path.is_file() or files[name] != recorded_files.get(name, files[name]):
            files[name] = sha256_hex([content])
            with stage_file(folder.tmp, path) as staged:
                staged.write_bytes(content)
    record = {"files": files, **({"folder": relative_base} if has_paths(resolved, base) else {})}
    if recorded != resolved or record != folder.config_record():
        folder.write_config(resolved, record)


def verify(root: str | Path) -> list[str]:
    """Everything that is wrong with a run's files, a line each; none when all is as it was committed."""
    return faults_of(RunFolder(root))


def all_runs(root: str | Path) -> list[Path]:
    """The runs in a folder, by name, skipping folders that cannot be read. Raises ConfigError without the folder."""
    base = Path(root)
    if not base.is_dir():
        raise ConfigError(f"there is no folder {base}. Name the folder that holds your runs.")
    return sorted(path for path in base.iterdir() if os.access(path, os.X_OK) and RunFolder(path).exists())

"""Configuration, versions and timings of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from markupsafe import Markup
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raftune.config.secrets import redacted
from raftune.report.collect import ReportData, number
from raftune.report.page import render
from raftune.report.reading import RunReader
from raftune.results.summary import seconds_by_stage
from raftune.sanitize import duration
from raftune.stages.parity import generation_words


def configuration(data: ReportData) -> Markup:
    """HTML: what was asked for, every field against its default, versions, origins, times, keys."""
    reader = data.reader
    try:
        written = without_secrets((reader.run.root / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        written = "(config.yaml cannot be read)"
    recorded = reader.own_json("environment.json")
    libraries = recorded.get("libraries")
    versions = [(name, recorded[name]) for name in ("python", "platform") if name in recorded]
    versions += sorted(libraries.items()) if isinstance(libraries, Mapping) else []

    spent = seconds_by_stage(data.reader.events)
    order = list(dict.fromkeys(stage for seconds in spent.values() for stage in seconds))
    times = []
    for round_, seconds in sorted(spent.items()):
        cells = [number(seconds[stage]) if stage in seconds else "" for stage in order]
        times.append([round_ or "start", duration(sum(seconds.values())), *cells])
    stages = []
    for (round_, stage), manifest in sorted(reader.commits.items()):
        files = manifest.files.values()
        rows = sum(entry.rows or 0 for entry in files)
        counts = (f"{len(files):,}", f"{rows:,}" if rows else "", f"{sum(entry.bytes for entry in files):,}")
        stages.append((f"{round_} · {stage}", manifest.key, *counts))
    return render(
        "configuration.html",
        written=written,
        fields=[field_row(*row) for row in fields_of(data.config)] if data.config is not None else [],
        origin=origin(data),
        versions=versions,
        total=duration(sum(sum(seconds.values()) for seconds in spent.values())),
        order=order,
        times=times,
        stages=stages,
    )


def without_secrets(words: str) -> str:
    """The YAML with *** for what looks like a key or password."""
    try:
        content = yaml.safe_load(words)
    except yaml.YAMLError:
        return words
    hidden = redacted(content)
    return words if hidden == content else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def fields_of(section: BaseModel, prefix: str = "", usual: Any = None) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every dotted field of the configuration with its value; where it was put is left out.

    `usual` is the section that there is by default: of another class where a rule or an objective was chosen.
    """
    defaults = type(usual).model_fields if isinstance(usual, BaseModel) else {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from fields_of(value, f"{prefix}{name}.", info.get_default(call_default_factory=True))
        elif prefix or name != "output_dir":
            yield prefix + name, defaults.get(name, info), value


def field_row(name: str, info: FieldInfo, value: Any) -> dict[str, Any]:
    """Name, help and value of a field, and its default where it differs."""
    required = info.is_required()
    usual = None if required else info.get_default(call_default_factory=True)
    changed = required or usual != value
    default = "required" if required else plain(usual) if changed else ""
    return {
        "name": name,
        "help": info.description or "",
        "changed": changed,
        "value": plain(value, name),
        "default": default,
    }


def plain(value: Any, name: str = "") -> str:
    """The value as YAML would have it on a line, without keys and passwords."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple | list):
        value = [v.model_dump(mode="json", exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value]
    value = redacted(value, name.rsplit(".", 1)[-1])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def origin(data: ReportData) -> list[tuple[str, str, str]]:
    """What the run began with, each as (name, kind, value); a kind is name, hash or text."""
    reader, entries = data.reader, []
    start = reader.commits.get((0, "model"))
    by_name = start is not None and "reference.json" in start.files
    reference = reader.json(0, "model", "reference.json") if by_name else {}
    model = getattr(data.config.policy, "model", None) if data.config is not None else None
    for title, name in (("start model", model or reference.get("name")), ("revision", reference.get("revision"))):
        if name:
            entries.append((title, "name", name))
    if reference.get("fingerprint"):
        entries.append(("hash of its weights", "hash", str(reference["fingerprint"])))
    for stage, title in (("model", "start"), ("teacher", "teacher"), ("data", "data")):
        manifest = reader.commits.get((0, stage))
        for name, entry in manifest.files.items() if manifest is not None else ():
            if name != "reference.json":
                entries.append((f"{title}/{name}", "hash", entry.sha256))
    if words := generation(reader):
        entries.append(("samples generated by", "text", words))
    return entries


def generation(reader: RunReader) -> str:
    """How the run's models generate, in words; empty where nothing was recorded."""
    record = reader.json(0, "parity", "backend.json")
    models = {round_: reader.commits.get((round_, "model")) for round_ in reader.rounds("model")}
    adapted = [r for r, manifest in models.items() if manifest and "adapter_config.json" in manifest.files]
    probe = reader.json(adapted[-1], "model", "parity.json") if adapted else {}
    trained = [r for r, manifest in models.items() if manifest and "training.json" in manifest.files]
    try:
        mismatch = reader.json(trained[-1], "model", "training.json")["details"].get("mismatch") if trained else None
        return generation_words(record, probe or None, mismatch) if record else ""
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""

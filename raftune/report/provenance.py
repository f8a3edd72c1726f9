"""Configuration, versions and timings of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raftune.config.secrets import redacted
from raftune.report.collect import ReportData
from raftune.report.markup import block, facts, folded, number, scrolling, table, text
from raftune.report.numbers import timed
from raftune.report.reading import RunReader
from raftune.sanitize import duration
from raftune.stages.parity import generation_words

SHORT = 12  # letters of a hash that are shown; the whole hash appears on pointing


def configuration(found: ReportData) -> str:
    """HTML: what was asked for, every field against its default, versions, origins, times, keys."""
    parts = (written, every_field, start_model, environment, times, stages)
    return "".join(part(found) for part in parts)


def written(found: ReportData) -> str:
    """config.yaml, as people write it: what differs from the defaults."""
    path = found.reader.run.root / "config.yaml"
    try:
        words = without_secrets(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        words = "(config.yaml cannot be read)"
    lead = '<p class="note">config.yaml: what differs from the defaults. <code>raftune train</code> reads it again.</p>'
    return block("config", "Configuration", lead + scrolling("config.yaml", f"<pre><code>{text(words)}</code></pre>"))


def without_secrets(words: str) -> str:
    """The YAML with *** for what looks like a key or password."""
    try:
        given = yaml.safe_load(words)
    except yaml.YAMLError:
        return words
    hidden = redacted(given)
    return words if hidden == given else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def every_field(found: ReportData) -> str:
    """A table of the resolved configuration; fields that differ from their defaults are marked, with the default."""
    config = found.standing.config
    if config is None:
        return ""
    rows = "".join(field_row(name, info, value) for name, info, value in fields_of(config))
    inside = (
        f'<table class="fields"><thead><tr><th scope="col">field</th><th scope="col">value</th>'
        f'<th scope="col">default</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    summary = "Every field, with its default where it differs"
    return block("fields", "Resolved", folded(summary, scrolling("Every field", inside)))


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


def field_row(name: str, info: FieldInfo, value: Any) -> str:
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    changed = info.is_required() or default != value
    kind = ' class="changed"' if changed else ""
    was = "" if not changed else "required" if info.is_required() else plain(default)
    title = text(info.description or "")
    return (
        f'<tr{kind}><th scope="row" title="{title}"><code>{text(name)}</code></th>'
        f"<td>{text(plain(value, name))}</td><td>{text(was)}</td></tr>"
    )


def plain(value: Any, name: str = "") -> str:
    """The value as YAML would have it on a line, without keys and passwords."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple | list):
        value = [v.model_dump(mode="json", exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value]
    value = redacted(value, name.rsplit(".", 1)[-1])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def start_model(found: ReportData) -> str:
    """What the run began with: the model's name and hash, or the hashes of its files; the prompts' hashes."""
    pairs = []
    reference = found.reader.json(0, "model", "reference.json") if starts_by_name(found) else {}
    asked = getattr(found.standing.config.policy, "model", None) if found.standing.config is not None else None
    for title, name in (("start model", asked or reference.get("name")), ("revision", reference.get("revision"))):
        if name:
            pairs.append((title, f"<code>{text(name)}</code>"))
    if reference.get("fingerprint"):
        pairs.append(("hash of its weights", short(reference["fingerprint"])))
    for stage, title in (("model", "start"), ("teacher", "teacher"), ("data", "data")):
        commit = found.reader.commits.get((0, stage))
        files = commit.files.items() if commit is not None else ()
        pairs += [(f"{title}/{name}", short(e.sha256)) for name, e in files if name != "reference.json"]
    if words := generation(found.reader):
        pairs.append(("samples generated by", text(words)))
    rows = "".join(f'<tr><th scope="row">{text(k)}</th><td>{v}</td></tr>' for k, v in pairs)
    return block("origin", "Made from", f'<table class="fields">{rows}</table>') if pairs else ""


def generation(reader: RunReader) -> str:
    """How the run's models generate, in words; empty where nothing was recorded."""
    record = reader.json(0, "parity", "backend.json")
    adapted = [round_ for round_ in reader.rounds("model") if (round_, "model") in reader.commits]
    adapted = [round_ for round_ in adapted if "adapter_config.json" in reader.commits[round_, "model"].files]
    probe = reader.json(adapted[-1], "model", "parity.json") if adapted else {}
    try:
        return generation_words(record, probe or None) if record else ""
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def starts_by_name(found: ReportData) -> bool:
    commit = found.reader.commits.get((0, "model"))
    return commit is not None and "reference.json" in commit.files


def short(digest: Any) -> str:
    """The beginning of a hash, the whole of it on pointing."""
    return f'<code title="{text(digest)}">{text(str(digest)[:SHORT])}</code>'


def environment(found: ReportData) -> str:
    """The versions that the run was last started with."""
    recorded = found.reader.own_json("environment.json")
    libraries = recorded.get("libraries")
    pairs = [(name, recorded[name]) for name in ("python", "platform") if name in recorded]
    pairs += sorted(libraries.items()) if isinstance(libraries, Mapping) else []
    rows = "".join(f'<tr><th scope="row">{text(k)}</th><td>{text(v)}</td></tr>' for k, v in pairs)
    return block("environment", "Made with", f'<table class="fields">{rows}</table>') if pairs else ""


# -- times and keys ---------------------------------------------------------------------------------------------------


def times(found: ReportData) -> str:
    """Seconds by round and stage, over all the sessions that worked on it."""
    spent, order = seconds_by_stage(found)
    if not spent:
        return ""
    total = sum(sum(stages.values()) for stages in spent.values())
    rows = []
    for round_, stages in sorted(spent.items()):
        cells = [number(stages[stage]) if stage in stages else "" for stage in order]
        rows.append([text(round_ or "start"), duration(sum(stages.values())), *cells])
    head = facts([("time of all stages, over all sessions", duration(total))])
    titles = ["round", "in all", *map(text, order)]
    listed = table(titles, rows, label="Seconds by round and stage")
    return block("times", "Times", head + folded("Seconds by round and stage", listed))


def seconds_by_stage(found: ReportData) -> tuple[dict[int, dict[str, float]], list[str]]:
    """The seconds of each round's stages, and the stages in the order in which they came."""
    spent: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    order: dict[str, None] = {}
    for event in timed(found.reader):
        spent[event["round"]][str(event["stage"])] += event["seconds"]
        order.setdefault(str(event["stage"]))
    return {round_: dict(stages) for round_, stages in spent.items()}, list(order)


def stages(found: ReportData) -> str:
    """The manifest of every stage: its key, its files, its rows."""
    rows = []
    for (round_, stage), commit in sorted(found.reader.commits.items()):
        files = commit.files.values()
        counted = sum(entry.rows or 0 for entry in files)
        size = sum(entry.bytes for entry in files)
        place = f"{text(round_)} · {text(stage)}"
        rows.append([place, short(commit.key), f"{len(files):,}", f"{counted:,}" if counted else "", f"{size:,}"])
    titles = ["round · stage", "key", "files", "rows", "bytes"]
    note = (
        '<p class="note">A key is the hash of all that shaped a stage: its fields, and the COMMITs that it was made '
        "from. Equal keys mean equal work; no time enters it. <code>raftune verify</code> hashes the files again.</p>"
    )
    listed = folded(f"{len(rows)} committed stages", table(titles, rows, label="Committed stages"))
    return block("stages", "Stages and their keys", note + listed) if rows else ""

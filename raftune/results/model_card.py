"""Exports the best round's model with a model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from raftune.config.load import declared, validate
from raftune.config.run import RunConfig, held_out_names
from raftune.config.secrets import advice, plain_secrets
from raftune.errors import ConfigError, StoreError
from raftune.policies.model_files import ADAPTER, publish_files
from raftune.policies.registry import FAMILIES, family_of
from raftune.protocols import ModelUsage, SupportsPublishing
from raftune.results.summary import best_round, cell, columns_for, read_json, read_row, rows_of
from raftune.sanitize import counted, shell_command
from raftune.starters.resolve import resolve_model, resolve_starters
from raftune.store.committed import MANIFEST, check_folder, signatures, write_manifest
from raftune.store.files import explaining, set_usual_mode
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder

ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # owner/name, or the name alone of a model without an owner
PIPELINE = "model_index.json"
TAG = "reward-ranked-fine-tuning"


def publish_model(root: str | Path, out: str | Path, round_: int | None = None, merged: bool = False) -> Path:
    """Writes the model of the best round (or of the given one) into `out`, with README.md and what else it needs.

    The folder loads with plain transformers, peft or diffusers. Where the run holds an adapter's base itself, because
    the start was given as an object or merged, or is a pipeline of this package, the base goes into `out`/base. What an
    earlier call wrote there is replaced; nothing that the run committed is touched. `merged` adds a LoRA adapter to its
    base, for a plain model. Raises StoreError where the weights are gone or `out` cannot be written.
    """
    run, out = RunFolder(root), Path(out)
    round_ = best_of(run) if round_ is None else round_
    check_model(run, round_)
    refuse_secrets(validate(run.read_config()))
    with explaining(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_published(out)
        before = signatures(out)
        use = write_weights(run, round_, out, merged)
        (out / "README.md").write_text(card(root, round_, use), encoding="utf-8")
        write_manifest(out, before)
        set_usual_mode(*(out / name for name in signatures(out).keys() - before.keys()))
    return out


def write_weights(run: RunFolder, round_: int, out: Path, merged: bool) -> ModelUsage:
    """Writes the model as its family does; of a custom family, whose code is not run, copies the files."""
    config, folder, start = run.configuration(), run.folder(round_, "model"), run.folder(0, "model")
    family: Any = family_of(config) if config.policy.family in FAMILIES else None
    if isinstance(family, SupportsPublishing):
        base = None
        if not is_bundled(config):
            base = base_name(config) or f"PATH/TO/{Path(getattr(config.policy, 'model', None) or '').name}"
        return family.publish(resolve_starters(config), folder, start, out, base, merged)
    if merged:
        raise ConfigError(f"--merged is for language models with LoRA; {run.root} has another kind. Leave it out.")
    return publish_files(folder, start, out, getattr(config.policy, "tokenizer", None))


def remove_published(out: Path) -> None:
    """Removes the weights that an earlier call left: an adapter beside full weights would be a third model."""
    card_ = out / "README.md"
    if not card_.is_file() or TAG not in card_.read_text(encoding="utf-8", errors="replace"):
        return
    for name in read_json(out / PIPELINE):  # the parts of a pipeline, each in a folder of its own
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    weights = [*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")]
    for path in [*weights, out / ADAPTER, out / PIPELINE, out / MANIFEST]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "base", ignore_errors=True)


def best_of(run: RunFolder) -> int:
    """The best round so far. Raises StoreError where no round is done."""
    config = run.read_config()
    best = best_round(run.root)
    if best is None:
        raise StoreError(f"{run.root} has no finished round yet. {how_to_go_on(run.root, config)}")
    return best


def check_model(run: RunFolder, round_: int) -> None:
    """Raises StoreError where a round has no model any more, RunDamaged where it or the start is not as committed."""
    if not run.was_made(round_, "model"):
        raise StoreError(f"round {round_} of {run.root} has no model. `raftune runs` says how far the run is.")
    if run.is_dropped(round_, "model"):
        flags = ("--from", f"{round_}/train", "--keep-models", "all")
        raise StoreError(
            f"the weights of round {round_} of {run.root} were dropped, as keep_models says. Choose the best round, or "
            f"make them again with `{shell_command('raftune', 'resume', run.root, *flags)}`."
        )
    start = run.folder(0, "model")
    for folder in {run.folder(round_, "model"), start}:
        check_folder(folder)
    config = run.configuration()
    if config.policy.family in FAMILIES:  # what a start refers to; a family of your own guards its own
        family_of(config).verify(start)


def card(root: str | Path, round_: int, use: ModelUsage) -> str:
    """The model card: what the model is, where it comes from, how it did by round, and how to load it."""
    run = RunFolder(root)
    config = run.configuration()
    base = base_name(config)
    hub: dict[str, Any] = {"library_name": use.library, **({} if base is None else {"base_model": base})}
    hub |= {"tags": ["raft", TAG, "raftune"], "model_name": config.name}
    hub |= {"pipeline_tag": use.task} if use.task else {}
    front_matter = f"---\n{yaml.safe_dump(hub, sort_keys=False, allow_unicode=True)}---"
    parts = [front_matter, summary(run, config, round_, use.generated), table(run, config, round_)]
    if use.note:
        parts.append(use.note)
    if use.code:
        parts.append(f"## How to load it\n\n```python\n{use.code}\n```")
    stored = validate(run.read_config())
    refuse_secrets(stored)
    versions = read_json(run.recorded("environment.json")).get("libraries", {})
    settings = yaml.safe_dump(without_paths(declared(stored)), sort_keys=False, allow_unicode=True)
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    parts.append(
        "## Settings\n\nEverything that is not at its default, as a configuration of raftune:\n\n```yaml\n"
        f"{settings}```\n\nMade with {libraries}."
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def base_name(config: RunConfig) -> str | None:
    """The base model's name on the hub; None for a folder, whose path would say something about this machine."""
    name = getattr(config.policy, "model", None)
    if not isinstance(name, str) or not ON_HUB.fullmatch(name) or is_bundled(config):
        return None
    return None if Path(name).expanduser().is_dir() else name


def is_bundled(config: RunConfig) -> bool:
    name = getattr(config.policy, "model", None)
    return resolve_model(name, config.policy.family) != name


def summary(run: RunFolder, config: RunConfig, round_: int, generated: str = "completions to") -> str:
    rewards = ", ".join(f"`{name}`" for name in config.rewards.names) or "Python objects"
    start, name = base_name(config) or "the start model", getattr(config.policy, "model", None)
    if isinstance(name, str) and is_bundled(config):
        start = f"raftune's bundled `{name}`"
    elif isinstance(name, str) and Path(name).expanduser().is_dir():
        start = f"the model in the folder `{Path(name).name}`"
    if round_ == 0:
        return f"# {config.name}\n\nThe start of this run ({start}): no round of reward-ranked fine-tuning was better."
    prompts = read_row(run, round_).get("prompts", config.prompts_per_round)  # fewer where the data has fewer
    return (
        f"# {config.name}\n\nRound {round_} of reward-ranked fine-tuning (RAFT) of {start}. Each round generated "
        f"{config.sampling.num_generations} {generated} each of {counted(prompts, 'prompt')}, scored them with "
        f"{rewards}, selected by `{config.selection.rule}`, and fine-tuned on what was kept."
    )


def table(run: RunFolder, config: RunConfig, round_: int) -> str:
    """The table by round, in Markdown, and what its columns mean."""
    rows = rows_of(run.root)
    columns = columns_for(rows, held_out_names(config))
    titles = [column.title for column in columns]
    lines = [f"| {' | '.join(titles)} |", f"|{'---:|' * len(titles)}"]
    for row in rows:
        cells = [cell(column, row) for column in columns]
        marked = [f"**{text}**" for text in cells] if row["round"] == round_ else cells
        lines.append(f"| {' | '.join(marked)} |")
    meanings = [f"- *{column.title}*: {column.meaning}" for column in columns[1:]]
    return "\n".join(["## By round", "", *lines, "", *meanings])


def refuse_secrets(config: RunConfig) -> None:
    """Raises ConfigError where the settings that a card shows hold a key or password in plain."""
    if fields := list(plain_secrets(declared(config))):
        raise ConfigError(f"a model card must hold no secret; {advice(fields)} Then resume the run, and export again.")


def without_paths(value: Any) -> Any:
    """The value with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..")) else value

"""Exports the best round's model with a model card."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raftune.config.load import declared, validate
from raftune.config.run import RunConfig, held_out_names
from raftune.config.secrets import advice, plain_secrets
from raftune.errors import ConfigError, StoreError
from raftune.policies.registry import FAMILIES, family_of
from raftune.results.summary import best_round, cell, columns_for, read_json, read_row, rows_of
from raftune.sanitize import counted, shell_command
from raftune.starters.resolve import resolve_model, resolve_starters
from raftune.store.commit import NAME as COMMIT
from raftune.store.committed import MANIFEST, check_folder, signatures, write_manifest
from raftune.store.files import explaining, set_usual_mode
from raftune.store.kinds import how_to_go_on
from raftune.store.run import DROPPED, RunFolder

# What a committed model folder holds besides the model.
OURS = frozenset({COMMIT, DROPPED, "training.json", "reference.json", "optimizer.safetensors", "parity.json", MANIFEST})
ADAPTER = "adapter_config.json"
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # owner/name, or the name alone of a model without an owner
PIPELINE, LORA = "model_index.json", "pytorch_lora_weights.safetensors"
DIALS = ("height", "width", "num_inference_steps", "guidance_scale")
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
        if run.read_config()["policy"].get("family") == "diffusion":
            use = publish_pipeline(run, round_, out)
        elif merged:
            use = publish_merged(run, round_, out)
        else:
            use = publish_language_model(run, round_, out)
        (out / "README.md").write_text(card(root, round_, use), encoding="utf-8")
        write_manifest(out, before)
        set_usual_mode(*(out / name for name in signatures(out).keys() - before.keys()))
    return out


@dataclass(frozen=True)
class ModelUsage:
    """What a card says of the model's use: for the hub its library and task, for people how it is loaded."""

    library: str = ""
    task: str = ""
    code: str = ""
    note: str = ""


def publish_language_model(run: RunFolder, round_: int, out: Path) -> ModelUsage:
    """Copies a committed model's files, with tokenizer, and with its base where only the run has that."""
    copy_files(weights_of(run.folder(round_, "model")), out)
    adapter = (out / ADAPTER).is_file()
    if adapter:
        ground_adapter(run, out)
    if round_ == 0:  # the start's own files may be another tokenizer's
        copy_tokenizer(run, out)
    if run.read_config()["policy"].get("family", "causal_lm") != "causal_lm":
        return ModelUsage("peft" if adapter else "transformers")
    return ModelUsage("peft" if adapter else "transformers", "text-generation", language_model_code(adapter))


def publish_merged(run: RunFolder, round_: int, out: Path) -> ModelUsage:
    """Writes a language model with its adapter added in. Raises ConfigError where there is none to add."""
    config = resolve_starters(run.configuration())
    policy: Any = family_of(config).load(config, run.folder(round_, "model"), run.folder(0, "model"))
    if not hasattr(policy, "export_merged"):
        raise ConfigError(f"--merged is for language models with LoRA; {run.root} has another kind. Leave it out.")
    note = policy.export_merged(out)
    return ModelUsage("transformers", "text-generation", language_model_code(False), note)


def publish_pipeline(run: RunFolder, round_: int, out: Path) -> ModelUsage:
    """Writes a whole pipeline, or a LoRA alone; with a LoRA its base, where only the run or this package has that."""
    config = run.configuration()
    resolved = resolve_starters(config)
    family = family_of(resolved)
    start = run.folder(0, "model")
    policy: Any = family.load(resolved, run.folder(round_, "model"), start)
    policy.export(out)
    task = {"text": "text-to-image", "nothing": "unconditional-image-generation"}.get(policy.blank.takes, "")
    base = base_name(config) or f"PATH/TO/{Path(policy.config.policy.model).name}"
    elsewhere = read_json(start / "raftune.json").get("kind") == "reference" and not is_bundled(config)
    if not (out / PIPELINE).is_file() and not elsewhere:
        base = "FOLDER/base"
        family.load(resolved, start, start).export(out / "base")  # type: ignore[attr-defined]
    code = pipeline_code(out, base, policy.blank.denoiser_name)
    return ModelUsage("diffusers", task, f"{code}\n{drawing_code(policy)}")


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


def refuse_missing(run: RunFolder, round_: int) -> None:
    if not run.was_made(round_, "model"):
        raise StoreError(f"round {round_} of {run.root} has no model. `raftune runs` says how far the run is.")
    if run.is_dropped(round_, "model"):
        flags = ("--from", f"{round_}/train", "--keep-models", "all")
        raise StoreError(
            f"the weights of round {round_} of {run.root} were dropped, as keep_models says. Choose the best round, or "
            f"make them again with `{shell_command('raftune', 'resume', run.root, *flags)}`."
        )


def check_model(run: RunFolder, round_: int) -> None:
    """Raises StoreError where a round has no model any more, RunDamaged where it or the start is not as committed."""
    refuse_missing(run, round_)
    start = run.folder(0, "model")
    for folder in {run.folder(round_, "model"), start}:
        check_folder(folder)
    config = run.configuration()
    if config.policy.family in FAMILIES:  # what a start refers to; a family of your own guards its own
        family_of(config).verify(start)


def weights_of(folder: Path) -> Path:
    """Where the files of a committed model lie: in its folder, or where the start's reference points to."""
    reference = read_json(folder / "reference.json")
    if not reference or (folder / ADAPTER).is_file():
        return folder
    place = (folder / reference["name"]).resolve() if reference["name"].startswith("..") else Path(reference["name"])
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference["name"], revision=reference["revision"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StoreError(
            f"the start model {reference['name']!r} is neither here nor on the hub now. Check the network."
        ) from error


def copy_files(source: Path, out: Path) -> None:
    """Copies a model's own files, and those of folders in it; hidden ones and ours stay behind.

    Raises StoreError for a link that leads out of the folder, unless to the hub's cache: what it points to is no part
    of a model, and must not be sent along with it.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or path.is_dir() or name.as_posix() in (*OURS, "README.md"):
            continue
        copy_file(path, out / name, source)


def copy_file(path: Path, out: Path, source: Path) -> None:
    """Copies one file of a model folder, made of regular files alone. Raises StoreError as `copy_files` does."""
    home = source.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    target = path.resolve()
    if not target.is_file() or not any(target.is_relative_to(place) for place in allowed):
        raise StoreError(
            f"{path} is a link out of the model's folder, to {target}, and is not copied. Put the file itself there."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, out)


def ground_adapter(run: RunFolder, out: Path) -> None:
    """Gives an adapter its tokenizer, and a base that can be found from anywhere."""
    start = run.folder(0, "model")
    if not (start / "reference.json").is_file():
        base = out / "base"
        base.mkdir(exist_ok=True)
        copy_files(start, base)
        path = out / ADAPTER
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base.resolve()), "revision": None}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    elif not read_json(start / "reference.json")["fingerprint"].startswith("hub:"):
        base = weights_of(start)
        path = out / ADAPTER
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(run, out)


def copy_tokenizer(run: RunFolder, out: Path) -> None:
    for path in tokenizer_files(run, run.folder(0, "model")):
        copy_file(path, out / path.name, path.parent)


def tokenizer_files(run: RunFolder, start: Path) -> Iterator[Path]:
    """The files of the run's tokenizer: the configured one where it is a folder, else what lies beside the start."""
    configured = getattr(run.configuration().policy, "tokenizer", None)
    place = Path(configured) if configured and Path(configured).is_dir() else weights_of(start)
    place = start if (start / "tokenizer_config.json").is_file() else place  # one given as an object lies there
    for path in sorted(place.iterdir()):
        named = path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece"))
        if path.is_file() and (named or path.name.startswith("chat_template")):
            yield path


def card(root: str | Path, round_: int, use: ModelUsage) -> str:
    """The model card: what the model is, where it comes from, how it did by round, and how to load it."""
    run = RunFolder(root)
    config = run.configuration()
    versions = read_json(run.recorded("environment.json")).get("libraries", {})
    parts = [front_matter(config, use), summary(run, config, round_), table(run, config, round_)]
    if use.note:
        parts.append(use.note)
    if use.code:
        parts.append(f"## How to load it\n\n```python\n{use.code}\n```")
    parts.append(settings(validate(run.read_config()), versions))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def front_matter(config: RunConfig, use: ModelUsage) -> str:
    """What the hub reads: library, base model, tags."""
    base = base_name(config)
    data: dict[str, Any] = {"library_name": use.library}
    if base is not None:
        data["base_model"] = base
    data |= {"tags": ["raft", TAG, "raftune"], "model_name": config.name}
    if use.task:
        data["pipeline_tag"] = use.task
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def base_name(config: RunConfig) -> str | None:
    """The base model's name on the hub; None for a folder, whose path would say something about this machine."""
    name = getattr(config.policy, "model", None)
    if not isinstance(name, str) or not ON_HUB.fullmatch(name) or is_bundled(config):
        return None
    return None if Path(name).expanduser().is_dir() else name


def local_name(config: RunConfig) -> str | None:
    """A bundled model's word, or the last part of the folder that the run began from; None of anything else."""
    name = getattr(config.policy, "model", None)
    if not isinstance(name, str):
        return None
    if is_bundled(config):
        return f"raftune's bundled `{name}`"
    return f"the model in the folder `{Path(name).name}`" if Path(name).expanduser().is_dir() else None


def is_bundled(config: RunConfig) -> bool:
    name = getattr(config.policy, "model", None)
    return resolve_model(name, config.policy.family) != name


def summary(run: RunFolder, config: RunConfig, round_: int) -> str:
    rewards = ", ".join(f"`{name}`" for name in config.rewards.names) or "Python objects"
    start = base_name(config) or local_name(config) or "the start model"
    drawn = "images for" if config.policy.family == "diffusion" else "answers to"
    if round_ == 0:
        return f"# {config.name}\n\nThe start of this run ({start}): no round of reward-ranked fine-tuning was better."
    asked = read_row(run, round_).get("prompts", config.prompts_per_round)  # fewer where the data has fewer
    return (
        f"# {config.name}\n\nRound {round_} of reward-ranked fine-tuning (RAFT) of {start}. Each round generated "
        f"{config.sampling.num_generations} {drawn} each of {counted(asked, 'prompt')}, scored them with "
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


def language_model_code(adapter: bool) -> str:
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if adapter:
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer\n"
    return f'{imports}\nmodel = {kind}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'


def pipeline_code(out: Path, base: str, denoiser: str) -> str:
    """How plain diffusers loads what lies in `out`."""
    imports, whole = "from diffusers import DiffusionPipeline\n", (out / PIPELINE).is_file()
    code = f'pipe = DiffusionPipeline.from_pretrained("{"FOLDER" if whole else base}")'
    if (out / LORA).is_file():
        code += '\npipe.load_lora_weights("FOLDER")'
    elif not whole:
        imports += "from peft import PeftModel\n"
        code += f'\npipe.{denoiser} = PeftModel.from_pretrained(pipe.{denoiser}, "FOLDER")'
    return f"{imports}\n{code}"


def drawing_code(policy: Any) -> str:
    """The call by which the run generated: with other options, the guidance above all, the pipeline draws something
    else.
    """
    asked = {"text": ['"what it shall show"'], "label": ["class_labels=[0]"]}.get(policy.blank.takes, [])
    known = inspect.signature(policy.blank.pipe.__call__).parameters
    dials = {name: getattr(policy.call, name) for name in DIALS if name in known}
    negative = policy.config.sampling.diffusion.negative_prompt
    given = dials | dict(policy.call.kwargs) | ({} if negative is None else {"negative_prompt": negative})
    return f"image = pipe({', '.join([*asked, *(f'{name}={value!r}' for name, value in given.items())])}).images[0]"


def refuse_secrets(config: RunConfig) -> None:
    """Raises ConfigError where the settings that a card shows hold a key or password in plain."""
    if fields := list(plain_secrets(declared(config))):
        raise ConfigError(f"a model card must hold no secret; {advice(fields)} Then resume the run, and export again.")


def settings(config: RunConfig, versions: dict[str, str]) -> str:
    """What differs from the defaults, without paths of the machine that it ran on; and the versions."""
    refuse_secrets(config)
    shown = without_paths(declared(config))
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        "## Settings\n\nEverything that is not at its default, as a configuration of raftune:\n\n```yaml\n"
        f"{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```\n\nMade with {libraries}."
    )


def without_paths(value: Any) -> Any:
    """The value with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "..")) else value

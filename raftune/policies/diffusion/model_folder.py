"""Model folders of the diffusion family: pipelines, and what a run writes.

raftune.json in a run's folder (`ModelRecord`) has one of these kinds:

    reference  the pipeline is elsewhere, at `model`, and had this fingerprint
    pipeline   the folder itself is a whole pipeline
    full       the folder holds a denoiser (unet/ or transformer/) that replaces the one at `model`
    adapter    the folder holds a LoRA on the denoiser of the start
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
from huggingface_hub.constants import HF_HUB_OFFLINE

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ModelError
from raftune.policies.model_files import check_unchanged
from raftune.sanitize import first_line
from raftune.store.files import dump_json, fingerprint_of
from raftune.training.quiet import quiet

INDEX, RECORD, LORA = "model_index.json", "raftune.json", "pytorch_lora_weights.safetensors"
PASSED_ON = frozenset({"cache_dir", "force_download", "local_files_only", "token", "proxies"})
VARIANT = re.compile(r"model(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?\.safetensors$")
# By the beginning of a part's name: files that describe it, any one of which will do. Others have weights.
DESCRIBED_BY = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer_config.json"),
    "feature_extractor": ("preprocessor_config.json",),
}


@dataclass(frozen=True)
class PipelineComponent:
    """One entry of a pipeline's index: its folder's name, and the class that reads it."""

    name: str
    kind: str

    @property
    def described_by(self) -> tuple[str, ...]:
        """Names of the files that describe this part."""
        return next((files for begin, files in DESCRIBED_BY.items() if self.name.startswith(begin)), ("config.json",))

    @property
    def has_weights(self) -> bool:
        return self.described_by == ("config.json",)


# -- a pipeline's own files --------------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's index. Raises ModelError where the folder is no pipeline, saying what it is instead."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        assert isinstance(index, dict)
        name = index["_class_name"]
    except FileNotFoundError:
        if (folder / "model" / INDEX).is_file():
            fix = f"Did you mean {folder / 'model'}?"
        elif (folder / LORA).is_file():
            fix = "It holds a LoRA alone: load it onto its pipeline, fuse it, and save that with save_pretrained."
        elif (folder / "config.json").is_file():
            fix = "It holds a single model: name the folder of the whole pipeline."
        elif any(folder.glob("*.safetensors")) or any(folder.glob("*.ckpt")):
            fix = "Turn the single file into a folder: Pipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        else:
            fix = "Name a folder that save_pretrained wrote."
        raise ModelError(f"policy.model must be a pipeline; {folder} has no {INDEX}. {fix}") from None
    except (ValueError, KeyError, AssertionError) as error:
        raise ModelError(
            f"policy.model must be a pipeline; {folder / INDEX} is damaged ({error}). Fetch the model again."
        ) from error
    if not isinstance(name, str):
        raise ModelError(
            f"policy.model must be a pipeline of diffusers itself; {folder} brings code of its own ({name}), which is "
            "never run. Use a pipeline whose class comes with diffusers."
        )
    return index


def parts_of(index: dict[str, Any]) -> list[PipelineComponent]:
    """The parts that the index names, without those that are left out on purpose (null)."""
    entries = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return [PipelineComponent(name, str(value[1])) for name, value in sorted(entries.items()) if value[0]]


def denoiser_of(folder: Path) -> PipelineComponent:
    """The part that is trained. Raises ModelError for a pipeline without one."""
    index = read_index(folder)
    parts = [part for part in parts_of(index) if part.name in ("unet", "transformer")]
    if len(parts) != 1:
        names = ", ".join(part.name for part in parts) or "none"
        raise ModelError(
            f"policy.model must be a pipeline with one denoiser, unet or transformer; {index['_class_name']} has "
            f"{names}. Use another pipeline."
        )
    return parts[0]


def check_parts(folder: Path, left_out: frozenset[str] = frozenset(), variant: str | None = None) -> None:
    """Raises ModelError where a part that the index names is missing or incomplete, or has another variant only."""
    parts = [part for part in parts_of(read_index(folder)) if part.name not in left_out]
    if absent := [fault for part in parts for fault in _faults(folder / part.name, part)]:
        raise ModelError(
            f"policy.model must be a whole pipeline; {folder} lacks {'; '.join(absent)}. Fetch the model again, or "
            "save it anew with save_pretrained; a part that is not needed (a safety_checker) can be left out with "
            "policy.pipeline_init_kwargs: {NAME: null}."
        )
    variants: dict[Path, set[str | None]] = {}  # None is the plain one
    for part in parts:
        if part.has_weights:
            files = (VARIANT.search(path.name) for path in (folder / part.name).glob("*.safetensors"))
            variants[folder / part.name] = {match["variant"] for match in files if match}
    available = sorted({name for names in variants.values() for name in names if name is not None})
    if variant is None and (without := [path for path, names in variants.items() if names and None not in names]):
        raise ModelError(
            f"policy.variant must name the weights to read; {without[0]} has them as {', '.join(available)} alone. "
            f"Write policy.variant: {available[0]}."
        )
    if variant is not None and variant not in available:
        choice = f"there is {', '.join(available)}" if available else "its weights have none"
        raise ModelError(
            f"policy.variant must be one that the pipeline has; got {variant!r}, and {choice}. "
            f"{f'Write policy.variant: {available[0]}' if available else 'Leave it out'}."
        )


def _faults(path: Path, part: PipelineComponent) -> list[str]:
    """What a part lacks: its folder, its description, or weights (none, pickled ones alone, or missing shards)."""
    if not path.is_dir():
        return [f"the folder {part.name}/ ({part.kind})"]
    faults = []
    if not any((path / name).is_file() for name in part.described_by):
        faults.append(f"{part.name}/{part.described_by[0]} ({part.kind})")
    if not part.has_weights:
        return faults
    if not any(path.glob("*.safetensors")):
        pickled = "; there are only pickled, and only safetensors are read: load and save it once where you trust it"
        faults.append(
            f"the weights {part.name}/*.safetensors ({part.kind}{pickled if any(path.glob('*.bin')) else ''})"
        )
    for index in sorted(path.glob("*.safetensors.index*.json")):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if absent := [name for name in shards if not (path / name).is_file()]:
            faults.append(f"{len(absent)} of {len(shards)} shards of {part.name}/ ({absent[0]}, …)")
    return faults


def fingerprint(folder: Path) -> str:
    """SHA-256 over the paths, sizes and contents of the pipeline's own files: its index, and those of each part."""
    names = {part.name for part in parts_of(read_index(folder))}
    return fingerprint_of(folder, [folder / INDEX, *(path for name in names for path in (folder / name).rglob("*"))])


# -- a run's folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRecord:
    """What a model folder is. `model` is a folder (relative to this one where it begins with ..) or a hub name.

    fingerprint: SHA-256 of the files of the pipeline at `model`, or hub:COMMIT; empty where it lies in the run itself.
    """

    kind: Literal["reference", "pipeline", "full", "adapter"]
    model: str = ""
    revision: str | None = None
    fingerprint: str = ""

    def write(self, folder: Path) -> None:
        dump_json(folder / RECORD, asdict(self))

    def target(self, folder: Path) -> Path:
        """The folder that `model` names, from the folder of this record."""
        return (folder / self.model).resolve() if self.model.startswith("..") else Path(self.model)


def read_record(folder: Path) -> ModelRecord:
    """The folder's record. Raises ModelError where it has none."""
    try:
        return ModelRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} must say in {RECORD} what it holds: {error}. Restore the folder.") from error


@dataclass(frozen=True)
class PipelineSource:
    """A whole pipeline: its name as from_pretrained takes it, its revision, and the folder of its files."""

    name: str
    revision: str | None
    folder: Path
    variant: str | None = None


def source_of(folder: Path, config: DiffusionPolicy) -> PipelineSource:
    """The pipeline on which a model folder rests. Raises ModelError where it is gone."""
    record = read_record(folder)
    if record.kind == "pipeline":
        return PipelineSource(str(folder), None, folder)
    if record.fingerprint.startswith("hub:"):
        path = snapshot(record.model, record.revision, config)
        return PipelineSource(record.model, record.revision, path, config.variant)
    path = record.target(folder)
    check_unchanged(path, "", fingerprint)
    if (path / RECORD).is_file():
        return source_of(path, config)
    return PipelineSource(str(path), None, path, config.variant)


def base_record(start: Path) -> dict[str, Any]:
    """The base pipeline in a round's record: `model`, `revision`, `fingerprint`."""
    record = read_record(start)
    if record.kind == "reference":
        return {"model": record.model, "revision": record.revision, "fingerprint": record.fingerprint}
    return {"model": f"../../{start.parent.name}/{start.name}", "revision": None, "fingerprint": ""}


def snapshot(name: str, revision: str | None, config: DiffusionPolicy) -> Path:
    """The folder of the pipeline in the hub's cache, downloaded where it is not there yet."""
    try:
        with quiet():
            options = {"revision": revision, "variant": config.variant, "use_safetensors": True}
            options |= {key: value for key, value in config.pipeline_init_kwargs.items() if key in PASSED_ON}
            return Path(diffusers.DiffusionPipeline.download(name, **options))
    except Exception as error:  # the hub's client raises many kinds
        at = f" at revision {revision!r}" if revision else ""
        reason = f"on the hub or in its cache ({first_line(error)[:200]}). Check name and network."
        if HF_HUB_OFFLINE:  # the client's own message is a page long
            reason = "in the hub's cache. HF_HUB_OFFLINE is set: unset it, or download the pipeline first."
        raise ModelError(
            f"policy.model must be the folder or hub name of a pipeline; got {name!r}{at}, and there is no folder "
            f"{Path(name).resolve()} and no whole pipeline of that name {reason}"
        ) from error


def verify(start: Path) -> None:
    """Raises ModelError if the pipeline that the start folder refers to is gone or has changed."""
    record = read_record(start)
    if record.fingerprint and not record.fingerprint.startswith("hub:"):
        check_unchanged(record.target(start), record.fingerprint, fingerprint)

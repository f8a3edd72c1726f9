"""Model folders of the diffusion family, and the base pipeline that they refer to.

raftune.json in the folder (`Record`) has one of these kinds:

    reference  the pipeline is elsewhere, at `model`, and had this fingerprint
    pipeline   the folder itself is a whole pipeline
    full       the folder holds a denoiser (unet/ or transformer/) that replaces the one at `model`
    adapter    the folder holds a LoRA on the denoiser of the start
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
from huggingface_hub.constants import HF_HUB_OFFLINE

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ModelError
from raftune.policies.diffusion.components import INDEX, parts_of, read_index
from raftune.sanitize import first_line
from raftune.store.files import dump_json, fingerprint_of
from raftune.training.quiet import quiet

RECORD = "raftune.json"
PASSED_ON = frozenset({"cache_dir", "force_download", "local_files_only", "token", "proxies"})


@dataclass(frozen=True)
class ModelRecord:
    """What a model folder is. `model` is a folder (one beginning with .. starts from this folder) or a hub name.

    fingerprint: SHA-256 of the files of the pipeline at `model`, or hub:COMMIT; empty where it lies in the run itself.
    """

    kind: Literal["reference", "pipeline", "full", "adapter"]
    model: str = ""
    revision: str | None = None
    fingerprint: str = ""

    def write(self, folder: Path) -> None:
        dump_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> ModelRecord:
    """What the folder is. Raises ModelError where it does not say."""
    try:
        return ModelRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} must say in {RECORD} what it holds: {error}. Restore the folder.") from error


@dataclass(frozen=True)
class PipelineSource:
    """A whole pipeline: its name as from_pretrained takes it, its revision, and the folder where its files are."""

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
        place = snapshot(record.model, record.revision, config)
        return PipelineSource(record.model, record.revision, place, config.variant)
    place = (folder / record.model).resolve() if record.model.startswith("..") else Path(record.model)
    if not place.is_dir():
        raise ModelError(f"policy.model must still be where the run began; {place} is gone. Put it back.")
    if (place / RECORD).is_file():
        return source_of(place, config)
    return PipelineSource(str(place), None, place, config.variant)


def base_record(start: Path) -> dict[str, Any]:
    """What a round's record says of the pipeline beneath it: `model`, `revision`, `fingerprint`."""
    record = read_record(start)
    if record.kind == "reference":
        return {"model": record.model, "revision": record.revision, "fingerprint": record.fingerprint}
    return {"model": f"../../{start.parent.name}/{start.name}", "revision": None, "fingerprint": ""}


def snapshot(name: str, revision: str | None, config: DiffusionPolicy) -> Path:
    """The folder in the hub's cache that holds the pipeline, fetched where it is not there yet."""
    try:
        with quiet():
            options = {"revision": revision, "variant": config.variant, "use_safetensors": True}
            passed = {key: value for key, value in config.pipeline_init_kwargs.items() if key in PASSED_ON}
            return Path(diffusers.DiffusionPipeline.download(name, **options, **passed))
    except Exception as error:  # the hub's client has many ways to say that there is nothing
        at = f" at revision {revision!r}" if revision else ""
        begin = (
            f"policy.model must be the folder or hub name of a pipeline; got {name!r}{at}, and there is no folder "
            f"{Path(name).resolve()}"
        )
        if HF_HUB_OFFLINE:  # what the client says then is a page, and that it was told to be offline
            raise ModelError(
                f"{begin} and no whole pipeline of that name in the hub's cache. HF_HUB_OFFLINE is set: unset it, or "
                "download the pipeline first."
            ) from error
        raise ModelError(
            f"{begin} and no pipeline of that name on the hub or in its cache ({first_line(error)[:200]}). Check name "
            "and network."
        ) from error


def fingerprint(folder: Path) -> str:
    """SHA-256 over the paths, sizes and contents of the pipeline's own files: its index, and those of each part."""
    names = {part.name for part in parts_of(read_index(folder))}
    return fingerprint_of(folder, [folder / INDEX, *(path for name in names for path in (folder / name).rglob("*"))])


def verify(start: Path) -> None:
    """Raises ModelError if the pipeline that the start folder refers to is gone or has changed."""
    record = read_record(start)
    if not record.fingerprint or record.fingerprint.startswith("hub:"):
        return
    place = (start / record.model).resolve() if record.model.startswith("..") else Path(record.model)
    if not place.is_dir():
        raise ModelError(f"policy.model must still be where the run began; {place} is gone. Put it back.")
    if (now := fingerprint(place)) != record.fingerprint:
        raise ModelError(
            f"policy.model must not change during a run; {place} was {record.fingerprint[:12]} and is "
            f"{now[:12]}. Put the files back, or start a new run."
        )

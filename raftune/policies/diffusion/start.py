"""Resolves, checks and records the initial pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ModelError
from raftune.policies.diffusion.components import INDEX, LORA, denoiser_of, read_index
from raftune.policies.diffusion.loading import load_denoiser, refuse_unmerged
from raftune.policies.diffusion.lora import PEFT_CONFIG, PEFT_WEIGHTS
from raftune.policies.diffusion.pipelines import adapter_class
from raftune.policies.diffusion.references import RECORD, ModelRecord, fingerprint, read_record, snapshot, source_of
from raftune.training.quiet import quiet

ADAPTER_FILES = (LORA, PEFT_WEIGHTS, PEFT_CONFIG)


def begin(config: DiffusionPolicy, out: Path, model: Any = None, *, tunes: bool = True) -> None:
    """Writes the start into `out`. Raises ModelError where there is no pipeline.

    A folder or a hub name becomes a reference with a hash; a pipeline given as an object is written whole. A round's
    folder of another run becomes its denoiser on a reference to the pipeline beneath: a LoRA merged, so that the next
    one begins from zero; a run that trains nothing leaves it as it is.
    """
    if model is not None:
        _begin_with_object(out, model)
        return
    folder = Path(config.model).expanduser()
    if (folder / RECORD).is_file():
        _begin_with_round(config, out, folder.resolve(), tunes)
    elif folder.is_dir():
        _refuse_unknown(folder)
        ModelRecord("reference", str(folder.resolve()), None, fingerprint(folder)).write(out)
    elif folder.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise ModelError(
            f"policy.model must be the folder or hub name of a pipeline; got {config.model!r}, and {folder.resolve()} "
            "is no folder."
        )
    else:
        place = snapshot(config.model, config.revision, config)
        _refuse_unknown(place)
        ModelRecord("reference", config.model, place.name, f"hub:{place.name}").write(out)


def _refuse_unknown(folder: Path) -> None:
    """Raises ModelError for what is no pipeline, or none that a binding drives, before its weights are read."""
    adapter_class(str(read_index(folder)["_class_name"]))


def _begin_with_object(out: Path, model: Any) -> None:
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ModelError(
            f"a model of the diffusion family must be a pipeline of diffusers; got a {type(model).__name__}. Give "
            "DiffusionPipeline.from_pretrained(…), not its denoiser alone."
        )
    adapter_class(type(model).__name__)
    refuse_unmerged(model)
    with quiet():
        model.save_pretrained(out)
    ModelRecord("pipeline").write(out)


def _begin_with_round(config: DiffusionPolicy, out: Path, folder: Path, tunes: bool) -> None:
    record, source = read_record(folder), source_of(folder, config)
    if record.kind == "reference":
        relative = record.model.startswith("..")
        (replace(record, model=str(source.folder)) if relative else record).write(out)
        return
    if record.kind == "pipeline":
        ModelRecord("reference", str(folder), None, fingerprint(folder)).write(out)
        return
    hub = record.fingerprint.startswith("hub:")
    base = (source.name, source.revision, record.fingerprint if hub else fingerprint(source.folder))
    part = denoiser_of(read_index(source.folder)).name
    if record.kind == "full":
        shutil.copytree(folder / part, out / part)
        ModelRecord("full", *base).write(out)
    elif tunes:
        exact = config.model_copy(update={"dtype": "float32", "device": "cpu"})
        merged = load_denoiser(exact, folder, folder, train=False).to(getattr(torch, config.dtype))
        with quiet():
            merged.save_pretrained(out / part)
        ModelRecord("full", *base).write(out)
    else:
        for path in sorted(folder / name for name in ADAPTER_FILES):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
        beneath = (folder / record.model).resolve() if record.model.startswith("..") else None
        place = (str(beneath), None, "") if beneath is not None and not (beneath / INDEX).is_file() else base
        ModelRecord("adapter", *place).write(out)

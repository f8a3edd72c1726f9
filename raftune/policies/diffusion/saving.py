"""Writes model folders and exports of the diffusion family. Equal models give equal bytes.

A round's folder holds raftune.json, which names the kind of folder and its base pipeline, and either

    unet/ or transformer/                  the whole denoiser, as its save_pretrained writes it
    pytorch_lora_weights.safetensors       a LoRA, for a plain pipeline's load_lora_weights
    adapter_model.safetensors, adapter_config.json     a LoRA, for peft, where diffusers' pipeline loads none

and optimizer.safetensors if the optimizer state is kept across rounds. `export` writes the LoRA, or a whole pipeline
that DiffusionPipeline.from_pretrained loads.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ModelError
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.loading import load_denoiser
from raftune.policies.diffusion.model_folder import (
    INDEX,
    LORA,
    RECORD,
    ModelRecord,
    denoiser_of,
    fingerprint,
    read_index,
    read_record,
    snapshot,
    source_of,
)
from raftune.policies.diffusion.pipelines import adapter_class
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.protocols import ModelUsage
from raftune.store.files import dump_json
from raftune.training.quiet import quiet

OPTIMIZER = "optimizer.safetensors"


# -- the initial model -------------------------------------------------------------------------------------------------


def write_start(config: DiffusionPolicy, out: Path, model: Any = None, *, trains: bool = True) -> None:
    """Writes the start into `out`. Raises ModelError where there is no pipeline.

    A folder or a hub name becomes a reference with a hash; a pipeline given as an object is written whole. A round's
    folder of another run becomes its denoiser on a reference to the base pipeline: a LoRA merged, so that the next one
    starts from zero; a run that trains nothing leaves it as it is.
    """
    folder = Path(config.model).expanduser()
    if model is not None:
        _write_object(out, model)
    elif (folder / RECORD).is_file():
        _write_round(config, out, folder.resolve(), trains)
    elif folder.is_dir():
        adapter_class(str(read_index(folder)["_class_name"]))  # refuses other architectures before weights are read
        ModelRecord("reference", str(folder.resolve()), None, fingerprint(folder)).write(out)
    elif folder.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise ModelError(
            f"policy.model must be the folder or hub name of a pipeline; got {config.model!r}, and {folder.resolve()} "
            "is no folder."
        )
    else:
        place = snapshot(config.model, config.revision, config)
        adapter_class(str(read_index(place)["_class_name"]))
        ModelRecord("reference", config.model, place.name, f"hub:{place.name}").write(out)


def _write_object(out: Path, model: Any) -> None:
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ModelError(
            f"a model of the diffusion family must be a pipeline of diffusers; got a {type(model).__name__}. Give "
            "DiffusionPipeline.from_pretrained(…), not its denoiser alone."
        )
    adapter_class(type(model).__name__)
    if loaded := [name for name, part in model.components.items() if getattr(part, "peft_config", None)]:
        raise ModelError(
            f"a pipeline given as an object must have no LoRA on it; its {loaded[0]} has one. Merge it first: "
            "pipe.fuse_lora(); pipe.unload_lora_weights()."
        )
    with quiet():
        model.save_pretrained(out)
    ModelRecord("pipeline").write(out)


def _write_round(config: DiffusionPolicy, out: Path, folder: Path, trains: bool) -> None:
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
    part = denoiser_of(source.folder).name
    if record.kind == "full":
        shutil.copytree(folder / part, out / part)
        ModelRecord("full", *base).write(out)
    elif trains:
        exact = config.model_copy(update={"dtype": "float32", "device": "cpu"})
        merged = load_denoiser(exact, folder, folder, train=False).to(getattr(torch, config.dtype))
        with quiet():
            merged.save_pretrained(out / part)
        ModelRecord("full", *base).write(out)
    else:
        for path in (folder / name for name in (LORA, lora.PEFT_WEIGHTS, lora.PEFT_CONFIG)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
        if record.model.startswith("..") and not ((place := record.place(folder)) / INDEX).is_file():
            base = (str(place), None, "")
        ModelRecord("adapter", *base).write(out)


# -- rounds ------------------------------------------------------------------------------------------------------------


def write_model(
    adapter: PipelineAdapter, out: Path, base: Mapping[str, Any], optimizer: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the denoiser of the adapter's pipeline into `out`: its LoRA alone if it has one.

    `base` is what model_folder.base_record returns; `optimizer` (`parameter/entry` → tensor) is the state with which
    the next round's training continues.
    """
    out.mkdir(parents=True, exist_ok=True)
    kind: Any = "adapter" if lora.is_adapted(adapter.denoiser) else "full"
    _write_weights(adapter, out, out / adapter.denoiser_name, adapter.denoiser)
    ModelRecord(kind, **base).write(out)
    if optimizer:
        save_file(dict(sorted(optimizer.items())), out / OPTIMIZER, metadata={"format": "pt"})


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state that a round left in its model folder; empty where it left none."""
    path = folder / OPTIMIZER
    return load_file(path) if path.is_file() else {}


def export(adapter: PipelineAdapter, out: Path) -> None:
    """Writes a whole pipeline, or the LoRA alone where the denoiser has one, so that diffusers or peft loads it."""
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(adapter, out, out, adapter.pipe)


def _write_weights(adapter: PipelineAdapter, out: Path, place: Path, whole: Any) -> None:
    """The LoRA, for the pipeline's load_lora_weights or for peft where it has none; without a LoRA, `whole`."""
    if lora.is_adapted(adapter.denoiser):
        lora.write(adapter.denoiser, out, adapter.denoiser_name if adapter.lora_layers else None)
        return
    with quiet():
        whole.save_pretrained(place)
    for path in sorted(out.rglob("*.json")):  # diffusers notes from which path of this machine a part was loaded
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            dump_json(path, content)


def model_usage(
    adapter: PipelineAdapter, call: PipelineCall, negative: str | None, out: Path, base: str | None
) -> ModelUsage:
    """The model card's code for the pipeline in `out`: how plain diffusers loads it, and the call by which the run
    generated; with other options, above all the guidance, the images differ."""
    imports = "from diffusers import DiffusionPipeline\n"
    whole, denoiser = (out / INDEX).is_file(), adapter.denoiser_name
    code = f'pipe = DiffusionPipeline.from_pretrained("{"FOLDER" if whole else base}")'
    if (out / LORA).is_file():
        code += '\npipe.load_lora_weights("FOLDER")'
    elif not whole:
        imports += "from peft import PeftModel\n"
        code += f'\npipe.{denoiser} = PeftModel.from_pretrained(pipe.{denoiser}, "FOLDER")'
    prompt = {"text": ['"what it shall show"'], "label": ["class_labels=[0]"]}.get(adapter.takes, [])
    known = inspect.signature(adapter.pipe.__call__).parameters
    shown = ("height", "width", "num_inference_steps", "guidance_scale")
    options = {name: getattr(call, name) for name in shown if name in known} | dict(call.kwargs)
    options |= {} if negative is None else {"negative_prompt": negative}
    arguments = ", ".join([*prompt, *(f"{name}={value!r}" for name, value in options.items())])
    task = {"text": "text-to-image", "nothing": "unconditional-image-generation"}.get(adapter.takes, "")
    code = f"{imports}\n{code}\nimage = pipe({arguments}).images[0]"
    return ModelUsage("diffusers", task, code, generated="images for")

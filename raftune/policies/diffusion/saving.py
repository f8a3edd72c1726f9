"""Saves diffusion models. Equal models give equal bytes.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raftune.policies.diffusion import lora
from raftune.policies.diffusion.components import INDEX, LORA
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.policies.diffusion.references import ModelRecord
from raftune.protocols import ModelUsage
from raftune.store.files import dump_json
from raftune.training.quiet import quiet

OPTIMIZER = "optimizer.safetensors"
SHOWN = ("height", "width", "num_inference_steps", "guidance_scale")  # of a call, in a model card
PLACE = "_name_or_path"  # diffusers notes where a part was loaded from: a path of the machine that ran


def write_model(
    binding: PipelineAdapter, out: Path, base: Mapping[str, Any], optimizer: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the denoiser of the binding's pipeline into `out`: the adapter alone if it has one.

    `base` is the pipeline on which it rests, as places.base_record says it; `optimizer` (`parameter/entry` → tensor)
    is the state that the next round's fit carries on.
    """
    out.mkdir(parents=True, exist_ok=True)
    adapted = lora.is_adapted(binding.denoiser)
    if adapted:
        write_adapter(binding, out)
    else:
        with quiet():
            binding.denoiser.save_pretrained(out / binding.denoiser_name)
        forget_places(out)
    ModelRecord(kind="adapter" if adapted else "full", **base).write(out)
    if optimizer:
        save_file(dict(sorted(optimizer.items())), out / OPTIMIZER, metadata={"format": "pt"})


def export(pipe: Any, binding: PipelineAdapter, out: Path) -> None:
    """Writes a whole pipeline, or the LoRA alone where the denoiser has one, so that diffusers or peft loads it."""
    out.mkdir(parents=True, exist_ok=True)
    if lora.is_adapted(binding.denoiser):
        write_adapter(binding, out)
        return
    with quiet():
        pipe.save_pretrained(out)
    forget_places(out)


def model_usage(
    binding: PipelineAdapter, call: PipelineCall, negative: str | None, out: Path, base: str | None
) -> ModelUsage:
    """What a card says of the pipeline in `out`: how plain diffusers loads it, and the call by which the run generated:
    with other options, the guidance above all, the pipeline generates something else.
    """
    imports, whole, denoiser = (
        "from diffusers import DiffusionPipeline\n",
        (out / INDEX).is_file(),
        binding.denoiser_name,
    )
    code = f'pipe = DiffusionPipeline.from_pretrained("{"FOLDER" if whole else base}")'
    if (out / LORA).is_file():
        code += '\npipe.load_lora_weights("FOLDER")'
    elif not whole:
        imports += "from peft import PeftModel\n"
        code += f'\npipe.{denoiser} = PeftModel.from_pretrained(pipe.{denoiser}, "FOLDER")'
    prompt = {"text": ['"what it shall show"'], "label": ["class_labels=[0]"]}.get(binding.takes, [])
    known = inspect.signature(binding.pipe.__call__).parameters
    given = {name: getattr(call, name) for name in SHOWN if name in known} | dict(call.kwargs)
    given |= {} if negative is None else {"negative_prompt": negative}
    arguments = ", ".join([*prompt, *(f"{name}={value!r}" for name, value in given.items())])
    task = {"text": "text-to-image", "nothing": "unconditional-image-generation"}.get(binding.takes, "")
    code = f"{imports}\n{code}\nimage = pipe({arguments}).images[0]"
    return ModelUsage("diffusers", task, code, generated="images for")


def write_adapter(binding: PipelineAdapter, out: Path) -> None:
    """Writes the LoRA for the pipeline's load_lora_weights, or for peft where the pipeline has none."""
    lora.write(binding.denoiser, out, binding.denoiser_name if binding.lora_layers else None)


def forget_places(folder: Path) -> None:
    """Takes out of every JSON file under the folder the path from which its part was loaded."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop(PLACE, None) is not None:
            dump_json(path, content)


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state that a round left in its model folder; empty where it left none."""
    path = folder / OPTIMIZER
    return load_file(path) if path.is_file() else {}

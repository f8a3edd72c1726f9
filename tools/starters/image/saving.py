"""The starter's parts as files: half-precision weights, and configurations that say float32. Needs torch.

Half the bytes, and whoever loads them computes in full precision.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from raftune.starters.image.classifier import SceneClassifier
from raftune.starters.image.images import ATTRIBUTES, SIZE
from raftune.store.files import dump_json
from tools.starters.image.captions import tokenizer


def save_part(model: Any, folder: Path) -> None:
    """A model of diffusers or transformers as `save_pretrained` writes it."""
    model.half().save_pretrained(folder)
    cleanup(folder / "config.json")


def cleanup(path: Path) -> None:
    """Writes a configuration anew: full precision for whoever loads it, and no word of where it was read from."""
    config = json.loads(path.read_text())
    config |= {"dtype": "float32"} if "dtype" in config else {}
    config.pop("_name_or_path", None)
    dump_json(path, config)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """The whole pipeline as its own `save_pretrained` writes it, all weights in half precision."""
    pipe.save_pretrained(folder)
    cleanup(folder / "model_index.json")
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            save_part(part, folder / name)


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """The CLIPModel with its tokenizer, and an image processor that brings images to its size."""
    save_part(clip, folder)
    tokenizer().save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessor(**sizes, image_mean=half, image_std=half).save_pretrained(folder)


def save_judge(judge: SceneClassifier, folder: Path) -> None:
    """`model.safetensors` in float16, and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in judge.state_dict().items()}, folder / "model.safetensors")
    config = {"width": judge.heads.in_features // 32, "attributes": ATTRIBUTES}
    dump_json(folder / "config.json", config, sort_keys=False)


def load_clip(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


def save_head(head: nn.Sequential, folder: Path, *, clip: str) -> None:
    """The linear layers and the name of the CLIPModel, as the reward `aesthetic` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    named = {f"layers.{i}.{name}": value for i, layer in enumerate(linear) for name, value in layer.named_parameters()}
    save_file({name: value.detach().contiguous() for name, value in named.items()}, folder / "model.safetensors")
    config = {"model_type": "aesthetic", "activation": "relu", "clip": clip}
    dump_json(folder / "config.json", config)


def load_head(folder: Path) -> nn.Sequential:
    weights = load_file(folder / "model.safetensors")
    layers: list[nn.Module] = []
    for i in range(len(weights) // 2):
        weight, bias = weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [nn.ReLU(), layer] if layers else [layer]
    return nn.Sequential(*layers).eval()


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

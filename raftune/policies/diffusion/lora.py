"""LoRA on a denoiser: create, save, load and remove.

On disk a LoRA has its architecture's usual format: `pytorch_lora_weights.safetensors`, which a plain pipeline's
load_lora_weights reads, or, where diffusers has no such method (PixArt, DiT, DDPM), as peft's PeftModel.from_pretrained
reads it onto the plain denoiser. Both carry the scale (alpha) and the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from raftune.config.policy import AdapterConfig
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion.model_folder import LORA
from raftune.policies.model_files import ADAPTER, METADATA, sorted_sets
from raftune.sanitize import first_line
from raftune.store.files import dump_json
from raftune.training.quiet import quiet

NAME = "default"
HEADER = "lora_adapter_metadata"  # diffusers' key in the file's header
PEFT_WEIGHTS, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."


def is_adapted(model: Any) -> bool:
    """True if the denoiser carries an adapter."""
    return bool(getattr(model, "peft_config", None))


def attach_fresh(model: Any, config: AdapterConfig, seed: int) -> None:
    """Gives the denoiser a trainable LoRA whose product is zero; its random half depends on the seed alone."""
    modules = targets(model, config)
    lora = LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=modules)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, model, NAME)
        except ValueError as error:
            raise ConfigError(f"policy.adapter must fit the denoiser: {first_line(error)}.") from error
    cast_training_params(model)  # bfloat16 would round the small steps of small matrices away


def targets(model: Any, config: AdapterConfig) -> list[str] | str:
    """The modules of an adapter. Raises ConfigError where a name or a regular expression matches none.

    all-linear: every linear layer of the denoiser's blocks, without the embeddings of time and latent.
    """
    if config.modules_to_save:
        raise ConfigError(
            "policy.adapter.modules_to_save must be empty for a diffusion model; got "
            f"{', '.join(config.modules_to_save)}. A LoRA file of diffusers cannot hold whole modules: leave it out, "
            "or train without an adapter."
        )
    spec, names = config.target_modules, [name for name, _ in model.named_modules() if name]
    linear = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "block" in name.split(".", 1)[0]
    )
    if spec == "all-linear":
        return linear
    ends = [spec] if isinstance(spec, str) else list(spec)
    unmatched = [end for end in ends if not any(name == end or name.endswith(f".{end}") for name in names)]
    if isinstance(spec, str):
        try:
            if any(re.fullmatch(spec, name) for name in names):
                return spec
        except re.error as error:
            raise ConfigError(
                "policy.adapter.target_modules must be a list of names, or one regular expression over whole names; "
                f"got {spec!r}, which is none ({error}). Write a list: [to_q, to_v]."
            ) from error
        if not unmatched:
            raise ConfigError(
                f"policy.adapter.target_modules must be a list where it holds ends of names; got {spec!r}: one text "
                f"is a regular expression over whole names. Write [{spec}]."
            )
    if unmatched:
        last = dict.fromkeys(re.sub(r".*\.(?=[^.]*[^.\d][^.]*)", "", name) for name in linear)
        raise ConfigError(
            f"policy.adapter.target_modules must name modules of the {type(model).__name__}; {unmatched[0]!r} matches "
            f"none. It has, among others, {', '.join(list(last)[:8])}; 'all-linear' takes every linear layer of its "
            "blocks."
        )
    return ends


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Within, the denoiser is the one without its adapter: the start of the run."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def merge(model: Any) -> None:
    """Adds the adapter to the weights, and removes it."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config


# -- on disk ---------------------------------------------------------------------------------------------------------


def write(model: Any, out: Path, prefix: str | None) -> None:
    """Writes the adapter: under the prefix (unet, transformer) for a pipeline to load, without one for peft."""
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    config = sorted_sets(model.peft_config[NAME].to_dict())
    if prefix is None:
        named = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
        save_file(named, out / PEFT_WEIGHTS, METADATA)
        dump_json(out / ADAPTER, config | {"inference_mode": True})
        return
    header = json.dumps({f"{prefix}.{key}": value for key, value in config.items()}, sort_keys=True)
    save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, out / LORA, {HEADER: header})


def attach(model: Any, folder: Path) -> None:
    """Puts the folder's LoRA onto the denoiser, trainable. Raises ModelError where it is not whole or does not fit."""
    path = folder / (LORA if (folder / LORA).is_file() else PEFT_WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if path.name == PEFT_WEIGHTS:
            prefix, config = PEFT_PREFIX, json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        else:
            prefix, config = next(iter(tensors)).split(".", 1)[0] + ".", json.loads(header[HEADER])
        config = {key.removeprefix(prefix): value for key, value in config.items()}
        config.pop("inference_mode", None)
        with quiet():
            inject_adapter_in_model(LoraConfig(**config), model, NAME)
            weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            result = set_peft_model_state_dict(model, weights, NAME)
        missing = {name for name in result.missing_keys if "lora_" in name}
        if surplus := sorted({*result.unexpected_keys, *missing}):
            raise ModelError(
                f"{path} must be a LoRA of this denoiser: {len(surplus)} of its tensors have no place or are missing "
                f"({surplus[0]}). Restore the file."
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path} must be a LoRA of this denoiser: {first_line(error)}. Restore the file.") from error
    cast_training_params(model)

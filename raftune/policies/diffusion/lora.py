"""LoRA on a denoiser: create, save, load and remove.

On disk a LoRA has its architecture's usual format: `pytorch_lora_weights.safetensors`, which a plain pipeline's
load_lora_weights reads, or, where diffusers has no such method (PixArt, DiT, DDPM), as peft's PeftModel.from_pretrained
reads it onto the plain denoiser. Both carry the scale (alpha) and the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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
from raftune.policies.diffusion.components import LORA
from raftune.sanitize import first_line
from raftune.store.files import dump_json
from raftune.training.quiet import quiet

NAME = "default"
METADATA = "lora_adapter_metadata"  # diffusers' key in the file's header
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def is_adapted(model: Any) -> bool:
    """True if the denoiser carries an adapter."""
    return bool(getattr(model, "peft_config", None))


def attach_fresh(model: Any, config: AdapterConfig, seed: int) -> None:
    """Gives the denoiser a trainable LoRA whose product is zero; its random half depends on the seed alone."""
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets(model, config),
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora, model, NAME)
        except ValueError as error:
            raise ConfigError(f"policy.adapter must fit the denoiser: {first_line(error)}.") from error
    cast_training_params(model)  # bfloat16 would round the small steps of small matrices away


def targets(model: Any, config: AdapterConfig) -> list[str] | str:
    """The modules that an adapter is put on. Raises ConfigError where one is named that is not there.

    all-linear: every linear layer of the denoiser's blocks; what embeds the time and the latent stays as it is.
    """
    if config.modules_to_save:
        raise ConfigError(
            "policy.adapter.modules_to_save must be empty for a diffusion model; got "
            f"{', '.join(config.modules_to_save)}. A LoRA file of diffusers cannot hold whole modules: leave it out, "
            "or train without an adapter."
        )
    wanted = config.target_modules
    if wanted == "all-linear":
        return linear_layers(model)
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        _refuse_expression(wanted, names, model)
        return wanted
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            raise ConfigError(_no_such_module(one, model))
    return list(wanted)


def _refuse_expression(wanted: str, names: list[str], model: Any) -> None:
    """Raises ConfigError for a text that is no regular expression, or that fits the whole of no module's name."""
    try:
        if any(re.fullmatch(wanted, name) for name in names):
            return
    except re.error as error:
        raise ConfigError(
            "policy.adapter.target_modules must be a list of names, or one regular expression over whole names; got "
            f"{wanted!r}, which is none ({error}). Write a list: [to_q, to_v]."
        ) from error
    if any(name.endswith(f".{wanted}") for name in names):
        raise ConfigError(
            f"policy.adapter.target_modules must be a list where it holds ends of names; got {wanted!r}: one text is a "
            f"regular expression over whole names. Write [{wanted}]."
        )
    raise ConfigError(_no_such_module(wanted, model))


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers that lie in the denoiser's blocks, sorted."""
    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted(name for name in linear if "block" in name.split(".", 1)[0])


def _no_such_module(wanted: str, model: Any) -> str:
    last = dict.fromkeys(re.sub(r".*\.(?=[^.]*[^.\d][^.]*)", "", name) for name in linear_layers(model))
    return (
        f"policy.adapter.target_modules must name modules of the {type(model).__name__}; {wanted!r} matches none. It "
        f"has, among others, {', '.join(list(last)[:8])}; 'all-linear' takes every linear layer of its blocks."
    )


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Within, the denoiser is the one beneath its adapter: the start of the run."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def merge(model: Any) -> None:
    """Adds the adapter to the weights beneath it, and takes it away."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config


# -- on disk ---------------------------------------------------------------------------------------------------------


def write(model: Any, out: Path, prefix: str | None) -> None:
    """Writes the adapter: under the prefix (unet, transformer) for a pipeline to load, without one for peft."""
    found = get_peft_model_state_dict(model, adapter_name=NAME)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(found.items())}
    config = {key: _ordered(value) for key, value in sorted(model.peft_config[NAME].to_dict().items())}
    if prefix is None:
        save_file(
            {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}, out / PEFT_WEIGHTS, {"format": "pt"}
        )
        dump_json(out / PEFT_CONFIG, config | {"inference_mode": True})
        return
    header = json.dumps({f"{prefix}.{key}": value for key, value in config.items()}, sort_keys=True)
    # One key only: with two or more, safetensors writes them in an order that varies from process to process.
    save_file({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, out / LORA, {METADATA: header})


def _ordered(value: Any) -> Any:
    """The value as JSON has it; a set's own order depends on the process."""
    if isinstance(value, Mapping):
        return {str(key): _ordered(item) for key, item in sorted(value.items())}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


def attach(model: Any, folder: Path) -> None:
    """Puts the folder's LoRA onto the denoiser, trainable. Raises ModelError where it is not whole or does not fit."""
    path = folder / (LORA if (folder / LORA).is_file() else PEFT_WEIGHTS)
    try:
        tensors, config = _read(path)
        config.pop("inference_mode", None)
        with quiet():
            inject_adapter_in_model(LoraConfig(**config), model, NAME)
            result = set_peft_model_state_dict(model, tensors, NAME)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _no_lora(path, first_line(error)) from error
    lacking = {name for name in result.missing_keys if "lora_" in name}
    if surplus := sorted({*result.unexpected_keys, *lacking}):
        raise _no_lora(path, f"{len(surplus)} of its tensors have no place or are missing ({surplus[0]})")
    cast_training_params(model)


def _no_lora(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} must be a LoRA of this denoiser: {what}. Restore the file.")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors by the denoiser's own names, and what LoraConfig was told."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if path.name == PEFT_WEIGHTS:
        config = json.loads((path.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
        return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, config
    prefix = next(iter(tensors)).split(".", 1)[0] + "."
    config = {key.removeprefix(prefix): value for key, value in json.loads(header[METADATA]).items()}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, config

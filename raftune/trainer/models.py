"""Converts a trainer's model argument to the section `policy`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raftune.errors import ConfigError, ModelError
from raftune.policies.causal_lm.loading import base_at, refuse_untrusted_code
from raftune.sanitize import first_line
from raftune.starters.resolve import resolve_model
from raftune.store.files import sha256_hex
from raftune.training.quiet import quiet

logger = logging.getLogger("raftune")

# Keys that may differ between a model or tokenizer and its own copy on disk, and change nothing that it computes.
_PROVENANCE = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "is_local"),
    *("local_files_only", "tokenizer_file", "special_tokens_map_file", "_from_model_config"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
# A tokenizer keeps padding and truncation of earlier calls; raftune sets both itself.
_CALLS = {
    *("truncation", "padding", "max_length", "stride", "pad_to_multiple_of", "pad_token_type_id"),
    *("truncation_side", "truncation_strategy", "padding_side"),
}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Fields of LoraConfig under their names in `policy.adapter`.
_LORA_FIELDS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "modules_to_save": "modules_to_save"}
# Fields of LoraConfig that are read, or do not change the trained model; fan_in_fan_out is set by peft itself.
_LORA_ALLOWED = {
    *(*_LORA_FIELDS, "target_modules", "use_rslora", "task_type", "peft_type", "auto_mapping", "peft_version"),
    *("base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "runtime_config"),
}
_NF4_OPTIONS = {
    *("load_in_4bit", "_load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"),
    "quant_method",
}


@dataclass(frozen=True)
class ModelInputs:
    """The section `policy`, and the objects behind it."""

    policy: dict[str, Any]
    model: Any = None
    tokenizer: Any = None


def model_inputs(
    model: Any,
    tokenizer: Any,
    peft_config: Any,
    init: dict[str, Any],
    trust: bool,
    quantization: Any = None,
    strict: bool = True,
) -> ModelInputs:
    """The model as the run refers to it. Raises ConfigError for unusable arguments, ModelError without a tokenizer.

    An object is identified by the hash of its weights and configuration, and so is a tokenizer: the same cell run again
    in a new process continues the same run.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"processing_class must be a tokenizer; got {type(tokenizer).__name__}. Use AutoTokenizer.")
    if isinstance(model, (str, Path)):
        name, policy = str(model), {"model": str(model), **_init_section(init)}
        if quantization is not None:
            policy["load_in_4bit"] = _check_nf4(quantization, "quantization_config")
        trust, model = policy.get("trust_remote_code", trust), None
        refuse_untrusted_code(name, policy.get("revision"), trust, "model")
    elif isinstance(model, (PreTrainedModel, PeftModel)):
        if quantization is not None:
            raise ConfigError(
                f"quantization_config must be left out where the model is an object; got {type(model).__name__}. Give "
                "the model by name."
            )
        if init:
            logger.warning(
                "model_init_kwargs (%s) have no part where the model is an object, which is loaded already.",
                ", ".join(init),
            )
        name, policy = "", _section_of_object(model)
        tokenizer = tokenizer or load_tokenizer(str(_base_config(model)._name_or_path or ""), trust)
    else:
        raise ConfigError(
            f"model must be a name, a folder, or a model of transformers or peft; got {type(model).__name__}. A "
            "pipeline of diffusers is aligned by raftune.run, with policy.family: diffusion."
        )
    if isinstance(model, PeftModel) and peft_config is None:
        peft_config = model.peft_config[model.active_adapter]
    if peft_config is not None:

        def config() -> Any:
            return _config_of(name, policy.get("revision"), trust) if model is None else _base_config(model)

        policy["adapter"] = adapter_section(peft_config, config, strict)
    if tokenizer is not None:
        policy["tokenizer"] = f"object:{tokenizer_hash(tokenizer)}"
    return ModelInputs({"family": "causal_lm", **policy}, model, tokenizer)


def _section_of_object(model: Any) -> dict[str, Any]:
    config = _base_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "model must not be quantised where it is an object: its weights are written to the run, and merged with "
            "adapters. Give its name, and model_init_kwargs={'quantization_config': …}."
        )
    if model.dtype not in _DTYPES:
        raise ConfigError(
            f"model must be of {', '.join(_DTYPES.values())}; got {model.dtype}. Convert it with model.float()."
        )
    section: dict[str, Any] = {"model": f"object:{model_hash(model)}", "dtype": _DTYPES[model.dtype]}
    attention = getattr(config, "_attn_implementation", None)
    return section if attention in (None, "sdpa") else {**section, "attn_implementation": attention}


def _init_section(init: dict[str, Any]) -> dict[str, Any]:
    """model_init_kwargs as fields of the policy; others go on to from_pretrained, and must be plain data."""
    section: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in init.items():
        if value is None or name in ("use_cache", "low_cpu_mem_usage"):  # generation uses a cache, training does not
            continue
        if name in ("dtype", "torch_dtype"):
            if name == "torch_dtype" and init.get("dtype") is not None:
                continue
            section["dtype"] = _DTYPES.get(value, str(value).removeprefix("torch."))
        elif name in ("revision", "attn_implementation", "trust_remote_code"):
            section[name] = value
        elif name == "quantization_config":
            section["load_in_4bit"] = _check_nf4(value, "model_init_kwargs.quantization_config")
        elif name == "device_map":
            if value not in ("auto", {"": 0}):
                logger.warning(
                    "model_init_kwargs: device_map has no part in a run: the model goes to one device, the first GPU, "
                    "or the CPU with use_cpu=True."
                )
        elif not _is_plain(value):
            raise ConfigError(f"model_init_kwargs.{name} must be plain data, as the run records it; got {value!r}.")
        else:
            others[name] = value
    return section | ({"model_init_kwargs": others} if others else {})


def _check_nf4(quantization: Any, name: str) -> bool:
    """True of the one quantisation that raftune trains on; raises ConfigError for every other."""
    options = quantization if isinstance(quantization, dict) else quantization.to_diff_dict()
    used = {name for name, value in options.items() if value not in (None, False, [])}
    if not options.get("load_in_4bit") or options.get("bnb_4bit_quant_type") != "nf4" or used - _NF4_OPTIONS:
        raise ConfigError(
            f"{name} must be 4-bit NF4 (QLoRA); got {options}. Write "
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'), or leave it out."
        )
    return True


def adapter_section(peft_config: Any, model_config: Callable[[], Any] | None, strict: bool = True) -> dict[str, Any]:
    """The section `policy.adapter` of a LoraConfig. Raises ConfigError for options that raftune does not support;
    warns of them instead if not `strict`.

    `model_config` loads the model's configuration, which gives the default target modules.
    """
    if not isinstance(peft_config, LoraConfig):
        kind = type(peft_config).__name__
        raise ConfigError(f"peft_config must be a LoraConfig; got {kind}. Give LoraConfig(r=16), or leave it out.")
    default = LoraConfig()
    lines = [
        f"peft_config.{name} must stay at {getattr(default, name)!r}; got {value!r}. Adapters here are plain "
        "LoRA: r, lora_alpha, lora_dropout, target_modules, modules_to_save and use_rslora. Remove it."
        for name in (option.name for option in dataclasses.fields(LoraConfig) if option.name not in _LORA_ALLOWED)
        if (value := getattr(peft_config, name)) not in (getattr(default, name), None, False, {}, [])
    ]
    if lines and strict:
        raise ConfigError("\n".join(lines))
    for line in lines:
        logger.warning("strict=False, so the run goes on without it: %s", line)
    section = {field: getattr(peft_config, name) for name, field in _LORA_FIELDS.items()}
    if peft_config.use_rslora:  # alpha / sqrt(r) in place of alpha / r
        section["alpha"] *= math.sqrt(section["r"])
    section["modules_to_save"] = sorted(section["modules_to_save"] or ())
    targets = peft_config.target_modules
    if targets is None:
        assert model_config is not None
        kind = model_config().model_type
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if targets is None:
            raise ConfigError(
                f"peft_config.target_modules must be given for a model of type {kind!r}. Write 'all-linear'."
            )
    return section | {"target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _config_of(name: str, revision: Any, trust: bool) -> Any:
    """The configuration of a named model, or of the base of a named adapter."""
    path = str(resolve_model(name, "causal_lm"))
    try:
        with quiet():
            if (Path(path) / "adapter_config.json").is_file():
                path = base_at(PeftConfig.from_pretrained(path), path)
            return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model must be a folder or a name on the hub; {name!r} did not load: {first_line(error)}."
        ) from error


def _base_config(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).config


def load_tokenizer(name: str, trust: bool = False) -> Any:
    """The tokenizer of this name or folder, of an adapter its base's. Raises ModelError where there is none."""
    try:
        if name:
            with quiet():
                return AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        reason = "the model has no name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
    raise ModelError(f"processing_class must be given where the model has no tokenizer of its own ({reason}).")


def model_hash(model: Any) -> str:
    """16 hex digits over weights and configuration: the same for a copy, whatever device it is on."""
    base, adapters = model, {}
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        adapters = {name: config.to_dict() for name, config in model.peft_config.items()}
    generation = getattr(base, "generation_config", None)
    configs = [base.config.to_dict(), generation.to_dict() if generation else {}, adapters]

    def parts() -> Iterator[str | bytes | memoryview]:
        yield _canonical_json(configs, _PROVENANCE)
        for name, tensor in sorted(model.state_dict().items()):
            plain = tensor.detach().cpu().contiguous()
            yield f"{name} {plain.dtype} {tuple(plain.shape)}"
            yield plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b""

    return sha256_hex(parts())[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits over the files that the tokenizer saves, without where it came from."""
    parts: list[str | bytes] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            content = path.read_bytes()
            is_json = path.suffix == ".json"
            content = _canonical_json(json.loads(content), _PROVENANCE | _CALLS) if is_json else content
            parts += path.name, content
    return sha256_hex(parts)[:16]


def _canonical_json(value: Any, ignored: set[str]) -> bytes:
    """JSON of the value without the ignored keys, with keys and sets in sorted order."""

    def stripped(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {str(key): stripped(item) for key, item in inner.items() if key not in ignored}
        if isinstance(inner, (list, tuple)):
            return [stripped(item) for item in inner]
        return sorted(map(str, inner)) if isinstance(inner, (set, frozenset)) else inner

    return json.dumps(stripped(value), sort_keys=True, default=str).encode()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))

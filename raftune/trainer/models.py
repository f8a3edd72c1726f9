"""Converts a trainer's model argument to the section `policy`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raftune.errors import ConfigError, ModelError
from raftune.policies.causal_lm.loading import refuse_untrusted_code
from raftune.policies.causal_lm.start import base_at
from raftune.sanitize import first_line
from raftune.training.quiet import quiet

logger = logging.getLogger("raftune")

# What differs between a model or tokenizer and its own copy on disk, and changes nothing that it computes.
_PROVENANCE = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_PROVENANCE |= {"is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file", "_from_model_config"}
_PROVENANCE |= {"base_model_name_or_path", "revision", "inference_mode"}
# What a tokenizer remembers of the calls before: padding and truncation, which raftune does by itself.
_CALLS = {"truncation", "padding", "max_length", "stride", "pad_to_multiple_of", "pad_token_type_id"}
_CALLS |= {"truncation_side", "truncation_strategy", "padding_side"}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Fields of LoraConfig that say nothing about what is trained; fan_in_fan_out is set by peft itself.
_LORA_FREE = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_LORA_FREE |= {"inference_mode", "fan_in_fan_out", "runtime_config", "use_rslora"}
_LORA_READ = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "modules_to_save": "modules_to_save"}
_FOUR_BITS = {"load_in_4bit", "_load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"}
_FOUR_BITS |= {"bnb_4bit_use_double_quant", "quant_method"}


@dataclass(frozen=True)
class ModelInputs:
    """The section `policy`, and the objects behind it; `name` is what a person calls the model."""

    name: str
    policy: dict[str, Any]
    model: Any = None
    tokenizer: Any = field(default=None)


def given_model(
    model: Any,
    tokenizer: Any,
    peft_config: Any,
    init: dict[str, Any],
    trust: bool,
    quantization: Any = None,
    strict: bool = True,
) -> ModelInputs:
    """The model as the run will know it. Raises ConfigError for what cannot be meant, ModelError without a tokenizer.

    An object enters by the hash of its weights and configuration, and so does a tokenizer: the same cell run again in a
    new process continues the same run.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"processing_class must be a tokenizer; got {type(tokenizer).__name__}. Use AutoTokenizer.")
    if isinstance(model, (str, Path)):
        policy = {"model": str(model), **_init(init)}
        if quantization is not None:
            policy["load_in_4bit"] = _is_nf4(quantization, "quantization_config")
        trust = policy.get("trust_remote_code", trust)
        refuse_untrusted_code(str(model), policy.get("revision"), trust, "model")
        config = lambda: _config_of(str(model), policy, trust)  # noqa: E731
        name = str(model).rstrip("/").rsplit("/", 1)[-1]
    elif isinstance(model, (PreTrainedModel, PeftModel)):
        if quantization is not None:
            raise ConfigError(
                f"quantization_config must be left out where the model is an object; got {type(model).__name__}. Give "
                "the model by name."
            )
        policy, tokenizer = _policy_of_object(model, init), tokenizer or _tokenizer_of(model, trust)
        config = lambda: _base_config(model)  # noqa: E731
        name = str(_base_config(model)._name_or_path or type(model).__name__).rsplit("/", 1)[-1]
    else:
        raise ConfigError(
            f"model must be a name, a folder, or a model of transformers or peft; got {type(model).__name__}. A "
            "pipeline of diffusers is aligned by raftune.run, with policy.family: diffusion."
        )
    if isinstance(model, PeftModel) and peft_config is None:
        peft_config = model.peft_config[model.active_adapter]
    if peft_config is not None:
        policy["adapter"] = adapter_section(peft_config, config, strict)
    if tokenizer is not None:
        policy["tokenizer"] = f"object:{tokenizer_hash(tokenizer)}"
    return ModelInputs(
        name, {"family": "causal_lm", **policy}, None if isinstance(model, (str, Path)) else model, tokenizer
    )


def _policy_of_object(model: Any, init: dict[str, Any]) -> dict[str, Any]:
    if init:
        logger.warning(
            "model_init_kwargs (%s) have no part where the model is an object, which is loaded already.",
            ", ".join(init),
        )
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
    policy: dict[str, Any] = {"model": f"object:{model_hash(model)}", "dtype": _DTYPES[model.dtype]}
    attention = getattr(config, "_attn_implementation", None)
    return policy | ({"attn_implementation": attention} if attention not in (None, "sdpa") else {})


def _init(given: dict[str, Any]) -> dict[str, Any]:
    """model_init_kwargs as fields of the policy; what is left goes on to from_pretrained, and must be plain data."""
    left = {name: value for name, value in given.items() if value is not None}
    policy: dict[str, Any] = {}
    for name in ("torch_dtype", "dtype"):
        if name in left:
            dtype = left.pop(name)
            policy["dtype"] = _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
    for name in ("revision", "attn_implementation", "trust_remote_code"):
        if name in left:
            policy[name] = left.pop(name)
    if "quantization_config" in left:
        policy["load_in_4bit"] = _is_nf4(left.pop("quantization_config"), "model_init_kwargs.quantization_config")
    if left.pop("device_map", None) not in (None, "auto", {"": 0}):
        logger.warning(
            "model_init_kwargs: device_map has no part in a run: the model goes to one device, the first GPU, or the "
            "CPU with use_cpu=True."
        )
    for name in ("use_cache", "low_cpu_mem_usage"):  # generating uses a cache in any case, training never does
        left.pop(name, None)
    for name, value in left.items():
        if not _plain(value):
            raise ConfigError(f"model_init_kwargs.{name} must be plain data, as the run records it; got {value!r}.")
    return policy | ({"model_init_kwargs": left} if left else {})


def _is_nf4(quantization: Any, name: str) -> bool:
    """True of the one quantisation that raftune trains on; ConfigError for every other."""
    given = quantization if isinstance(quantization, dict) else quantization.to_diff_dict()
    used = {name for name, value in given.items() if value not in (None, False, [])}
    if not given.get("load_in_4bit") or given.get("bnb_4bit_quant_type") != "nf4" or used - _FOUR_BITS:
        raise ConfigError(
            f"{name} must be 4-bit NF4 (QLoRA); got {given}. Write "
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'), or leave it out."
        )
    return True


def adapter_section(given: Any, config: Any, strict: bool = True) -> dict[str, Any]:
    """The section `policy.adapter` of a LoraConfig. Raises ConfigError for what raftune does not carry, unless `strict`
    is off: then it warns.

    `config` gives the model's configuration, by which peft knows the modules that a LoraConfig without any means.
    """
    if not isinstance(given, LoraConfig):
        kind = type(given).__name__
        raise ConfigError(f"peft_config must be a LoraConfig; got {kind}. Give LoraConfig(r=16), or leave it out.")
    default, lines = LoraConfig(), []
    for option in dataclasses.fields(LoraConfig):
        name, value = option.name, getattr(given, option.name)
        free = name in _LORA_FREE or name in _LORA_READ or name == "target_modules"
        if not free and value not in (getattr(default, name), None, False, {}, []):
            lines.append(
                f"peft_config.{name} must stay at {getattr(default, name)!r}; got {value!r}. Adapters here are plain "
                "LoRA: r, lora_alpha, lora_dropout, target_modules, modules_to_save and use_rslora. Remove it."
            )
    if lines and strict:
        raise ConfigError("\n".join(lines))
    for line in lines:
        logger.warning("strict=False, so the run goes on without it: %s", line)
    section = {ours: getattr(given, theirs) for theirs, ours in _LORA_READ.items()}
    if given.use_rslora:  # alpha / sqrt(r) in place of alpha / r
        section["alpha"] = section["alpha"] * math.sqrt(section["r"])
    section["modules_to_save"] = sorted(section["modules_to_save"] or ())
    return section | {"target_modules": _targets(given.target_modules, config)}


def _targets(given: Any, config: Any) -> str | list[str]:
    if given is not None:
        return given if isinstance(given, str) else sorted(given)
    kind = config().model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if known is None:
        raise ConfigError(f"peft_config.target_modules must be given for a model of type {kind!r}. Write 'all-linear'.")
    return sorted(known)


def _config_of(name: str, policy: dict[str, Any], trust: bool) -> Any:
    """The configuration of a named model, or of the base of a named adapter."""
    from raftune.starters.resolve import WORD
    from raftune.starters.text import policy_path

    place, revision = str(policy_path()) if name == WORD else name, policy.get("revision")
    try:
        with quiet():
            if (Path(place) / "adapter_config.json").is_file():
                place = base_at(PeftConfig.from_pretrained(place), place)
            return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model must be a folder or a name on the hub; {name!r} did not load: {first_line(error)}."
        ) from error


def _base_config(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).config


def _tokenizer_of(model: Any, trust: bool) -> Any:
    """The tokenizer that lies where the model was loaded from. Raises ModelError where there is none."""
    return load_tokenizer(str(_base_config(model)._name_or_path or ""), trust)


def load_tokenizer(name: str, trust: bool = False) -> Any:
    """The tokenizer of this name or folder, an adapter's being its base's. Raises ModelError where there is none."""
    try:
        if name:
            with quiet():
                return AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        reason = "the model bears no name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
    raise ModelError(f"processing_class must be given where the model has no tokenizer of its own ({reason}).")


def model_hash(model: Any) -> str:
    """16 hex digits over weights and configuration: the same for a copy, whatever device it is on."""
    total = hashlib.sha256()
    config = _base_config(model).to_dict()
    generation = getattr(model.get_base_model() if isinstance(model, PeftModel) else model, "generation_config", None)
    adapters = {n: c.to_dict() for n, c in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    total.update(_canonical([config, generation.to_dict() if generation else {}, adapters], _PROVENANCE))
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        total.update(plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b"")
    return total.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits over what the tokenizer writes when it is saved, without where it came from."""
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            content = path.read_bytes()
            total.update(path.name.encode())
            plain = path.suffix == ".json"
            total.update(_canonical(json.loads(content), _PROVENANCE | _CALLS) if plain else content)
    return total.hexdigest()[:16]


def _canonical(value: Any, forgotten: set[str]) -> bytes:
    return json.dumps(_stripped(value, forgotten), sort_keys=True, default=str).encode()


def _stripped(value: Any, forgotten: set[str]) -> Any:
    """The value without these keys, and with sets in an order of their own."""
    if isinstance(value, dict):
        return {str(k): _stripped(v, forgotten) for k, v in value.items() if k not in forgotten}
    if isinstance(value, (list, tuple)):
        return [_stripped(item, forgotten) for item in value]
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))

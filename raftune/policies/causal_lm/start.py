"""Resolves, checks and records the initial language model."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from raftune.config.policy import CausalLMPolicy
from raftune.errors import ModelError
from raftune.policies.causal_lm.loading import (
    ADAPTER,
    at,
    base_of,
    context,
    eos_ids,
    fill_pad_token,
    load_tokenizer,
    load_weights,
    merged,
    model_config,
    read_reference,
    resolve,
    with_adapter,
    write_model,
)
from raftune.training.devices import choose_device
from raftune.training.quiet import quiet


def write_start(
    config: CausalLMPolicy, out: Path, model: Any = None, tokenizer: Any = None, merge: bool = True
) -> dict[str, Any]:
    """Writes the initial model into `out` and returns its facts for the record. Raises ModelError where it is unfit.

    A named model is written as a reference; weights are written where an object was given, or where the name is a LoRA
    adapter's, merged: switching an adapter off must give the start, and not its base. Without `merge`, for a run that
    trains nothing, the adapter is written beside a reference to its base, so that it generates as it was trained. A
    tokenizer other than the model's own, given as an object or by name, is always written, and used by the run.
    """
    device = choose_device(config.device)
    loaded_on = device if config.load_in_4bit else torch.device("cpu")
    if model is not None:
        tokenizer = tokenizer or _find_tokenizer(config, [str(getattr(base_of(model), "name_or_path", ""))])
        plain = merged(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
        write_model(plain, tokenizer, out, ("", None))
        return _facts(config, out, plain) | {"model": None}

    reference = resolve(config.model, config.revision, config.trust_remote_code)
    name, revision = reference.name, reference.revision
    adapter: PeftConfig | None = None
    if not Path(name).is_dir() or (Path(name) / ADAPTER).is_file():
        with contextlib.suppress(OSError, ValueError), quiet():
            adapter = PeftConfig.from_pretrained(name, **at(revision))
    if adapter is None:
        reference.write(out)
        if tokenizer is None and config.tokenizer:
            tokenizer = load_tokenizer(config, out)
        if tokenizer is not None:  # it stays with the run, whatever becomes of its name
            tokenizer.save_pretrained(out)
        weights = load_weights(config, name, revision, loaded_on)
        return _facts(config, out, weights) | {"model": name, "revision": revision}

    base = base_at(adapter, name)
    if not merge:
        reference = resolve(base, adapter.revision, config.trust_remote_code)
        reference.write(out)
        adapted = with_adapter(load_weights(config, reference.name, reference.revision, loaded_on), name, revision)
        tokenizer = tokenizer or _find_tokenizer(config, [name, base])
        write_model(adapted, tokenizer, out, (reference.name, reference.revision))
        tokenizer.save_pretrained(out)
        return _facts(config, out, adapted) | {"model": name, "merged": False}

    # Base and adapter are added in float32 and rounded once.
    exact = config.model_copy(update={"dtype": "float32", "load_in_4bit": False})
    adapted = with_adapter(load_weights(exact, base, adapter.revision, torch.device("cpu")), name, revision)
    if adapter.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(
            f"policy.model must be a model, or an adapter that can be merged into its base; {name!r} is "
            f"{adapter.peft_type}, which adds to the prompt and not to weights. Name its base, {base!r}, or a LoRA."
        )
    whole = merged(adapted)
    if config.dtype not in ("float32", "auto"):
        whole = whole.to(getattr(torch, config.dtype))
    write_model(whole, tokenizer or _find_tokenizer(config, [name, base]), out, ("", None))
    return _facts(config, out, whole) | {"model": name, "merged": True}


def base_at(adapter: PeftConfig, name: str) -> str:
    """The name of an adapter's base; a relative path in it starts from the adapter's folder, as our runs write it."""
    base: str | None = adapter.base_model_name_or_path
    if not base:
        raise ModelError(
            f"policy.model may be an adapter whose {ADAPTER} names its base; {name!r} names none. Write the base's "
            "folder or hub name there as base_model_name_or_path."
        )
    beside = (Path(name) / base).resolve()
    if not base.startswith("..") or not beside.is_dir():
        return base
    reference = read_reference(beside)
    return reference.name if reference is not None else str(beside)


def _find_tokenizer(config: CausalLMPolicy, names: list[str]) -> Any:
    """The configured tokenizer, else the first that lies at one of the names. Raises ModelError."""
    names = [config.tokenizer] if config.tokenizer else names
    for name in filter(None, names):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    raise ModelError(
        f"A model needs its tokenizer; found none at {', '.join(map(repr, names))}. Set policy.tokenizer, or give "
        "it as processing_class."
    )


def _facts(config: CausalLMPolicy, out: Path, model: Any) -> dict[str, Any]:
    """What the initial model is; ModelError where its weights are not finite or do not fit its tokenizer."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"policy.model must have finite weights; {name} has a NaN or an infinity. Use another model."
            )
    tokenizer = load_tokenizer(config, out)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"policy.model must have an embedding for every token; the tokenizer has {len(tokenizer)}, the model "
            f"{rows}. Call model.resize_token_embeddings(len(tokenizer)) and save, or take its own tokenizer."
        )
    ends = eos_ids(config, out, tokenizer)
    return {
        "architecture": type(base_of(model)).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": rows,
        "context": context(model_config(config, out)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "eos_ids": list(ends),
        "notes": fill_pad_token(tokenizer, ends),
    }

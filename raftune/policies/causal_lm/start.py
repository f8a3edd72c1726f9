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
    StartReference,
    at,
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
)
from raftune.policies.causal_lm.model_utils import base_of
from raftune.policies.causal_lm.saving import write_model
from raftune.training.devices import choose_device
from raftune.training.quiet import quiet


def begin(
    config: CausalLMPolicy, out: Path, model: Any = None, tokenizer: Any = None, merge: bool = True
) -> dict[str, Any]:
    """Writes the start into `out` and returns what it is, for the record. Raises ModelError where it is unfit.

    A named model is written as a reference; weights are written where an object was given, or where the name is a LoRA
    adapter's, merged: switching an adapter off must give the start, and not its base. Without `merge`, for a run that
    trains nothing, the adapter is written beside a reference to its base, so that it generates the same as
    where it was trained. A tokenizer other than the model's own, given as an object or by name, is always written, and
    is used by the run.
    """
    device = choose_device(config.device)
    if model is not None:
        return _begin_with_object(config, out, model, tokenizer)
    reference = resolve(config.model, config.revision, config.trust_remote_code)
    adapter = _adapter_at(reference.name, reference.revision)
    if adapter and not merge:
        return _begin_on_base(config, out, reference, adapter, tokenizer)
    if adapter:
        whole = _merged(config, reference.name, reference.revision, adapter)
        write_model(whole, tokenizer or _tokenizer_of(config, reference.name, adapter), out, ("", None))
        return _facts(config, out, whole) | {"model": reference.name, "merged": True}
    reference.write(out)
    if tokenizer is None and config.tokenizer:
        tokenizer = load_tokenizer(config, out)
    if tokenizer is not None:  # one of its own stays with the run, whatever becomes of its name
        tokenizer.save_pretrained(out)
    checked = device if config.load_in_4bit else torch.device("cpu")
    weights = load_weights(config, reference.name, reference.revision, checked)
    facts = _facts(config, out, weights)
    return facts | {"model": reference.name, "revision": reference.revision}


def _begin_with_object(config: CausalLMPolicy, out: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    if tokenizer is None:
        tokenizer = _tokenizer_of(config, str(getattr(base_of(model), "name_or_path", "")), None)
    plain = merged(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
    write_model(plain, tokenizer, out, ("", None))
    return _facts(config, out, plain) | {"model": None}


def _adapter_at(name: str, revision: str | None) -> PeftConfig | None:
    """The peft configuration at a name; None where a whole model is."""
    if Path(name).is_dir() and not (Path(name) / ADAPTER).is_file():
        return None
    with contextlib.suppress(OSError, ValueError), quiet():
        return PeftConfig.from_pretrained(name, **at(revision))
    return None


def _begin_on_base(
    config: CausalLMPolicy, out: Path, reference: StartReference, adapter: PeftConfig, tokenizer: Any
) -> dict[str, Any]:
    base = resolve(base_at(adapter, reference.name), adapter.revision, config.trust_remote_code)
    base.write(out)
    device = choose_device(config.device) if config.load_in_4bit else torch.device("cpu")
    weights = load_weights(config, base.name, base.revision, device)
    adapted = with_adapter(weights, reference.name, reference.revision)
    tokenizer = tokenizer or _tokenizer_of(config, reference.name, adapter)
    write_model(adapted, tokenizer, out, (base.name, base.revision))
    tokenizer.save_pretrained(out)
    return _facts(config, out, adapted) | {"model": reference.name, "merged": False}


def base_at(adapter: PeftConfig, name: str) -> str:
    """The name of an adapter's base; a path in it starts from the adapter's folder, as in the runs that we write."""
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


def _merged(config: CausalLMPolicy, name: str, revision: str | None, adapter: PeftConfig) -> Any:
    """Base and adapter as one model, added in float32 and rounded once."""
    base = base_at(adapter, name)
    exact = config.model_copy(update={"dtype": "float32", "load_in_4bit": False})
    model = load_weights(exact, base, adapter.revision, torch.device("cpu"))
    adapted = with_adapter(model, name, revision)
    if adapter.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(
            f"policy.model must be a model, or an adapter that can be merged into its base; {name!r} is "
            f"{adapter.peft_type}, which adds to the prompt and not to weights. Name its base, {base!r}, or a LoRA."
        )
    whole = merged(adapted)
    return whole if config.dtype in ("float32", "auto") else whole.to(getattr(torch, config.dtype))


def _tokenizer_of(config: CausalLMPolicy, name: str, adapter: PeftConfig | None) -> Any:
    """The configured tokenizer, else the one beside the model, else the one of an adapter's base."""
    bases = [base_at(adapter, name)] if adapter else []
    tried = [config.tokenizer] if config.tokenizer else [name, *bases]
    for place in filter(None, tried):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), quiet():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code)
    raise ModelError(
        f"A model needs its tokenizer; found none at {', '.join(map(repr, tried))}. Set policy.tokenizer, or give "
        "it as processing_class."
    )


def _facts(config: CausalLMPolicy, out: Path, model: Any) -> dict[str, Any]:
    """What the start is; ModelError where its weights are not finite or do not fit its tokenizer."""
    if broken := not_finite(model):
        raise ModelError(
            f"policy.model must have finite weights; {broken} has a NaN or an infinity. Use another model."
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


def not_finite(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds a NaN or an infinity; None where all are finite."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return name
    return None

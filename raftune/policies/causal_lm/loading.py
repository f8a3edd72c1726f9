"""Resolves, checks, loads and saves models and tokenizers. Equal models give equal bytes.

A round's weights are loaded in two phases: the initial model, and on it the round's adapter. The adapter
is merged, if at all, into that fresh copy and never into one that was merged before, so rounding does not add up.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from raftune.config.policy import AdapterConfig, CausalLMPolicy
from raftune.data.classifier_inputs import is_hollow
from raftune.errors import ConfigError, ModelError
from raftune.policies.model_files import (
    ADAPTER,
    METADATA,
    REFERENCE,
    StartReference,
    check_finite,
    check_unchanged,
    is_path,
    read_reference,
    sorted_sets,
    write_optimizer,
)
from raftune.protocols import ModelUsage
from raftune.sanitize import first_line
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import dump_json, fingerprint_of
from raftune.training.devices import choose_device
from raftune.training.load_errors import UNTRUSTED, why_not_loaded
from raftune.training.quiet import quiet

PROBE = "parity.json"  # of a round that was trained: see weight_probe.py
MAMBA = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: Any) -> torch.device:
    """Where token ids go."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def resolve(name: str, revision: str | None = None, trust: bool = False) -> StartReference:
    """The reference of a folder or a hub name, at the commit that it has now. Raises ModelError where there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return StartReference(str(folder.resolve()), None, fingerprint(folder))
    if is_path(name):
        raise ModelError(
            f"policy.model must be a folder or a hub name; got {name!r}, and {folder.resolve()} is no folder."
        )
    refuse_untrusted_code(name, revision, trust)
    for file in ("config.json", ADAPTER):  # a folder on the hub may hold a model, or an adapter alone
        with contextlib.suppress(OSError, ValueError), quiet():
            commit = extract_commit_hash(cached_file(name, file, **at(revision)), None)
            return StartReference(name, commit or revision, f"hub:{commit}")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    hint = "HF_HUB_OFFLINE is set: unset it, or download the model first." if offline else "Check name and network."
    raise ModelError(
        f"policy.model must be a folder or a hub name; got {name!r}{f' at revision {revision!r}' if revision else ''}, "
        f"and there is no folder {Path(name).resolve()} and nothing of that name on the hub or in its cache. {hint}"
    )


def check_model_folder(folder: Path) -> None:
    """Raises ModelError for a folder without a model, which names the one in its model/, where sft leaves it."""
    if any((folder / name).is_file() for name in ("config.json", ADAPTER)):
        return
    inner = folder / "model"
    fix = f"Did you mean {inner}?" if inner.is_dir() else "Name one that save_pretrained wrote."
    if (folder / "model_index.json").is_file():
        fix = "It is a pipeline of diffusers: write policy.family: diffusion."
    raise ModelError(f"policy.model must be a causal language model; {folder} has no config.json. {fix}")


def refuse_untrusted_code(name: str, revision: str | None, trust: bool, field: str = "policy.model") -> None:
    """Raises ModelError for a model that needs code of its own, where that is not trusted. Other faults pass."""
    if trust:
        return
    try:
        with quiet():  # with False, transformers does not ask at the terminal
            AutoConfig.from_pretrained(name, trust_remote_code=False, **at(revision))
    except Exception as error:
        if UNTRUSTED in str(error):
            raise ModelError(f"{field} {name!r} does not load: {why_not_loaded(error, name)}") from error


def at(revision: str | None) -> dict[str, str]:
    """The revision as options of from_pretrained."""
    return {"revision": revision} if revision else {}


def fingerprint(folder: Path) -> str:
    """The hash of the names, sizes and contents of the folder's files."""
    return fingerprint_of(folder, folder.iterdir())


def verify(start: Path) -> None:
    """Raises ModelError if the model that the start folder refers to is gone or has changed."""
    reference = read_reference(start)
    if reference is not None and not reference.on_hub:
        check_unchanged(Path(reference.name), reference.fingerprint, fingerprint)


def source(start: Path) -> tuple[str, str | None]:
    """Name and revision of the initial model for from_pretrained."""
    reference = read_reference(start)
    return (reference.name, reference.revision) if reference else (str(start), None)


def load_tokenizer(config: CausalLMPolicy, start: Path) -> Any:
    """The tokenizer in the start folder, else the configured one, else the initial model's. Raises ModelError."""
    name, revision = (config.tokenizer, None) if config.tokenizer else source(start)
    if (start / "tokenizer_config.json").is_file():  # given as an object, or written beside the weights
        name, revision = str(start), None
    cause: Exception | None = None
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **at(revision))
        if not is_hollow(tokenizer):
            return tokenizer
        problem = f"the one at {name!r} knows no words: its files are missing."
    except Exception as error:
        cause, problem = error, f"found none at {name!r}: {why_not_loaded(error, name)}"
    raise ModelError(
        f"policy.tokenizer must name a tokenizer where the model has none; {problem} Save one there, or set "
        "policy.tokenizer."
    ) from cause


@dataclass(frozen=True)
class StartFacts:
    """What all rounds have of the initial model beside its weights: tokenizer, ends of text, configurations."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    notes: tuple[str, ...]  # about the tokenizer
    config: Any
    generation: Mapping[str, Any]  # of the generation config, what differs from transformers' defaults


_starts: dict[tuple[str, Path, int, int], StartFacts] = {}  # of the policy and of its teacher


def start_facts(policy: CausalLMPolicy, start: Path) -> StartFacts:
    """Read once for a committed folder, which does not change: reading it takes as long as loading a small model."""
    try:
        commit = (start / COMMIT).stat()
    except FileNotFoundError:
        return _read_facts(policy, start)
    key = (policy.model_dump_json(), start.absolute(), commit.st_mtime_ns, commit.st_ino)
    if key not in _starts:
        facts = _read_facts(policy, start)
        while len(_starts) >= 2:
            del _starts[next(iter(_starts))]
        _starts[key] = facts
    return _starts[key]


def _read_facts(policy: CausalLMPolicy, start: Path) -> StartFacts:
    tokenizer = load_tokenizer(policy, start)
    ends = eos_ids(policy, start, tokenizer)
    notes = tuple(fill_pad_token(tokenizer, ends))
    return StartFacts(
        tokenizer, ends, notes, model_config(policy, start), generation_config(policy, start).to_diff_dict()
    )


def generation_config(config: CausalLMPolicy, start: Path) -> GenerationConfig:
    """The initial model's generation config; made from its model config where it has none."""
    name, revision = source(start)
    with quiet():
        try:
            return GenerationConfig.from_pretrained(name, **at(revision))
        except OSError:
            return GenerationConfig.from_model_config(model_config(config, start))


def model_config(config: CausalLMPolicy, start: Path) -> Any:
    """The initial model's transformers configuration."""
    name, revision = source(start)
    return AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code, **at(revision))


def context(config: Any) -> int | None:
    """The most tokens, prompt and completion together, that such a model reads; None without a limit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def eos_ids(config: CausalLMPolicy, start: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion, the tokenizer's own first. ModelError where there is none.

    An id that the tokenizer does not know is left out: a model's configuration keeps the id of its kind's first model.
    """
    configured = generation_config(config, start).eos_token_id
    vocabulary = set(tokenizer.get_vocab().values())
    several = configured if isinstance(configured, list) else [configured]
    ids = dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i in vocabulary)
    if not ids:
        raise ModelError(
            "policy.model must have an end-of-sequence token; neither tokenizer nor generation config has one "
            "that the tokenizer knows, so no completion could learn to end. Set tokenizer.eos_token and save it."
        )
    return tuple(ids)


def fill_pad_token(tokenizer: Any, ends: tuple[int, ...]) -> list[str]:
    """Gives a tokenizer without a pad token EOS in its place; returns the notes for the user, if any."""
    if tokenizer.pad_token_id is not None:
        return []
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    return [f"the tokenizer has no pad token: EOS ({tokenizer.pad_token}) fills up batches, behind the mask"]


def base_of_adapters(start: Path) -> tuple[str, str | None]:
    """Name and revision of the base in an adapter's configuration, with which plain peft loads a round: the run's
    initial model, or the run's own start folder relative to a round's."""
    reference = read_reference(start)
    return (reference.name, reference.revision) if reference else (f"../../{start.parent.name}/{start.name}", None)


def load_weights(config: CausalLMPolicy, name: str, revision: str | None, device: torch.device) -> Any:
    """A causal language model in eval mode on the device; ModelError where weights are missing or do not fit."""
    options: dict[str, Any] = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code, **at(revision)}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                "policy.load_in_4bit needs the package bitsandbytes, which is not installed. Install raftune[qlora], "
                "or leave it out."
            )
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    must = "policy.model must be a causal language model;"
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **{**options, **config.model_init_kwargs}
            )
    except Exception as error:
        raise ModelError(f"{must} {name!r} did not load: {why_not_loaded(error, name)}") from error
    # With tied embeddings, no weight of a model that was trained as something else would be missing.
    kinds = ["SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering", "MultipleChoice"]
    for architecture in getattr(model.config, "architectures", None) or []:
        if architecture.endswith(tuple(f"For{kind}" for kind in kinds)):
            fix = "Name a model that generates."
            if architecture.endswith("ForSequenceClassification"):
                fix = "A reward model goes into rewards.reward_funcs: name here the model that is to be aligned."
            raise ModelError(f"{must} {name!r} is a {architecture}. {fix}")
    if absent := sorted(info["missing_keys"]):
        raise ModelError(
            f"policy.model must hold all weights of a causal language model; {name!r} lacks {len(absent)} "
            f"({', '.join(absent[:3])}), which would be random. Is it another kind of model?"
        )
    if device.type == "cpu" and getattr(model, "is_loaded_in_4bit", False):
        _leave_unpacked(model)
    return (model if config.load_in_4bit else model.to(device)).eval()


def _leave_unpacked(model: Any) -> None:
    """Keeps bitsandbytes from its second layout of 4-bit weights, for inference on CPUs with AVX512-BF16.

    It fails for inputs that are no multiple of 64 wide, gives other numbers than training does, and is slower from 32
    rows on (docs/log.md).
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def arithmetic_of(model: Any) -> str:
    """The dtype of the model's matrix products: bfloat16 where its weights are in 4 bits, else that of its weights."""
    quantised = getattr(base_of(model), "is_loaded_in_4bit", False)
    return "bfloat16" if quantised else str(model.dtype).removeprefix("torch.")


def load_start(config: CausalLMPolicy, start: Path, device: torch.device) -> Any:
    """The initial model itself, without any adapter of ours."""
    return load_weights(config, *source(start), device)


def load_round(
    config: CausalLMPolicy, folder: Path, start: Path, device: torch.device, seed: int | None = None, merge: bool = True
) -> Any:
    """The model of a round's folder, ready to be trained if a seed is given and to generate if not.

    For generation, an adapter is merged: always into float32 weights, and into 16-bit ones where the probe of its
    training says that they can hold it. For training, `seed` initialises the adapter of a round that has none yet.
    """
    adapted, probe = (folder / ADAPTER).is_file(), folder / PROBE
    if not adapted and folder.resolve() != start.resolve() and not (folder / REFERENCE).is_file():
        return load_weights(config, str(folder), None, device)
    model = load_start(config, start, device)
    if adapted:
        model = with_adapter(model, str(folder), None, trainable=seed is not None)
    elif config.adapter is not None and seed is not None:
        model = fresh_adapter(model, config.adapter, seed)
    if merge and seed is None and isinstance(model, PeftModel) and not config.load_in_4bit:
        exact = model.dtype == torch.float32
        if exact or (probe.is_file() and json.loads(probe.read_text())["merge"]):
            model = merged(model)
    return model.eval()


def with_adapter(model: Any, name: str, revision: str | None, *, trainable: bool = False) -> PeftModel:
    """The model under the adapter of this name. ModelError where the adapter does not load or does not fit."""
    try:
        with quiet():
            return PeftModel.from_pretrained(model, name, is_trainable=trainable, **at(revision))
    except Exception as error:
        base = base_of(model).name_or_path or "its base"
        raise ModelError(
            f"policy.model may be an adapter that fits its base; the one at {name!r} does not load onto {base!r}: "
            f"{why_not_loaded(error, name)}"
        ) from error


def merged(model: PeftModel) -> Any:
    """The base with its adapter added in: the same function as the adapter beside its base, also once it is saved."""
    untie_targets(model)
    with quiet():
        return model.merge_and_unload()


def untie_targets(model: PeftModel) -> None:
    """Gives every adapted layer whose weight another layer shares a copy of its own: merging would change both."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(module)
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        weight = getattr(layer, "_parameters", {}).get("weight")
        if weight is not None and len(owners.get(id(weight), ())) > 1:
            owners[id(weight)].remove(layer)
            layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            base = model.get_base_model()
            base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def fresh_adapter(model: Any, config: AdapterConfig, seed: int) -> PeftModel:
    """The model with a new LoRA adapter, whose product is zero; its random half depends on the seed alone.

    `all-linear` leaves out layers of the architecture's own class, such as the routers of a mixture of experts, which
    return more than one tensor, and in Mamba out_proj and dt_proj, whose weights are read past their layers.
    """
    targets: Any = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    excluded = []
    if targets == "all-linear":
        bypassed = ("out_proj", "dt_proj") if model.config.model_type in MAMBA else ()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                of_model = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
                custom = of_model and type(module).forward is not torch.nn.Linear.forward
                if custom or name.rpartition(".")[2] in bypassed:
                    excluded.append(name)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=list(config.modules_to_save) or None,
        exclude_modules=excluded or None,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"policy.adapter must fit the model: {first_line(error)}.") from error


# -- the initial model -------------------------------------------------------------------------------------------------


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
        tokenizer = tokenizer or find_tokenizer(config, [str(getattr(base_of(model), "name_or_path", ""))])
        plain = merged(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
        write_model(plain, tokenizer, out, ("", None))
        return facts_of(config, out, plain) | {"model": None}

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
        return facts_of(config, out, weights) | {"model": name, "revision": revision}

    base = base_at(adapter, name)
    if not merge:
        reference = resolve(base, adapter.revision, config.trust_remote_code)
        reference.write(out)
        adapted = with_adapter(load_weights(config, reference.name, reference.revision, loaded_on), name, revision)
        tokenizer = tokenizer or find_tokenizer(config, [name, base])
        write_model(adapted, tokenizer, out, (reference.name, reference.revision))
        tokenizer.save_pretrained(out)
        return facts_of(config, out, adapted) | {"model": name, "merged": False}

    # Base and adapter are added in float32 and rounded once.
    exact = config.model_copy(update={"dtype": "float32", "load_in_4bit": False})
    adapted = with_adapter(load_weights(exact, base, adapter.revision, torch.device("cpu")), name, revision)
    if adapter.is_prompt_learning or not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(
            f"policy.model must be a model, or an adapter that can be merged into its base; {name!r} is "
            f"{adapter.peft_type}, which adds to the prompt and not to weights. Name its base, {base!r}, or a LoRA."
        )
    merged_model = merged(adapted)
    if config.dtype not in ("float32", "auto"):
        merged_model = merged_model.to(getattr(torch, config.dtype))
    write_model(merged_model, tokenizer or find_tokenizer(config, [name, base]), out, ("", None))
    return facts_of(config, out, merged_model) | {"model": name, "merged": True}


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


def find_tokenizer(config: CausalLMPolicy, names: list[str]) -> Any:
    """The configured tokenizer, else the first that lies at one of the names. Raises ModelError."""
    names = [config.tokenizer] if config.tokenizer else names
    for name in filter(None, names):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    raise ModelError(
        f"A model needs its tokenizer; found none at {', '.join(map(repr, names))}. Set policy.tokenizer, or give "
        "it as processing_class."
    )


def facts_of(config: CausalLMPolicy, out: Path, model: Any) -> dict[str, Any]:
    """What the initial model is; ModelError where its weights are not finite or do not fit its tokenizer."""
    check_finite(model)
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
        "parameters": model.num_parameters(),  # two of 4 bits lie in a byte
        "vocabulary": rows,
        "context": context(model_config(config, out)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "eos_ids": list(ends),
        "notes": fill_pad_token(tokenizer, ends),
    }


# -- saving ------------------------------------------------------------------------------------------------------------


def write_model(
    model: Any,
    tokenizer: Any,
    out: Path,
    base: tuple[str, str | None],
    optimizer: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the model into `out`: the adapter alone if it has one, whose base is `base` (name, revision)."""
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        save_file(plain, out / "adapter_model.safetensors", metadata=METADATA)
        config = model.peft_config["default"].to_dict()
        config |= {"base_model_name_or_path": base[0], "revision": base[1], "inference_mode": True}
        dump_json(out / ADAPTER, sorted_sets(config))
    else:
        with quiet():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    write_optimizer(out, optimizer)


def model_usage(adapter: bool, note: str = "") -> ModelUsage:
    """Use of a published language model, for its card."""
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if adapter:
        imports = f"from peft import {kind}\nfrom transformers import AutoTokenizer\n"
    code = f'{imports}\nmodel = {kind}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return ModelUsage("peft" if adapter else "transformers", "text-generation", code, note)

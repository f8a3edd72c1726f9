"""Loads the frozen parts of a pipeline and its denoiser, and encodes prompts.

The frozen parts (text encoders, tokenizers, VAE, scheduler) are loaded once and shared by all rounds. The denoiser is
loaded each time from a committed folder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import diffusers
import torch
from accelerate import init_empty_weights

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ConfigError, DataError, ModelError
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.model_folder import (
    PASSED_ON,
    RECORD,
    PipelineComponent,
    PipelineSource,
    check_parts,
    denoiser_of,
    read_index,
    read_record,
    source_of,
)
from raftune.policies.diffusion.pipelines import adapter_class
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter
from raftune.records import Prompt
from raftune.training.devices import choose_device
from raftune.training.load_errors import why_not_loaded
from raftune.training.quiet import quiet

LIMIT = 2**30  # bytes of cached conditions, on the CPU
LARGE = 64 * 2**20  # bytes: a frozen part above this leaves the accelerator after use
# Arguments of from_pretrained that raftune sets, with the field to use.
OURS = {
    "torch_dtype": "policy.dtype",
    "dtype": "policy.dtype",
    "revision": "policy.revision",
    "variant": "policy.variant",
    "device_map": "policy.device",
    **dict.fromkeys(("use_safetensors", "trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx"), ""),
}


# -- the frozen parts --------------------------------------------------------------------------------------------------


class FrozenComponents:
    """The parts of a pipeline that no round changes, read on first use.

    `pipe` has a denoiser without weights, for everything that its configuration answers.
    """

    def __init__(self, config: DiffusionPolicy, start: Path) -> None:
        self._config, self._start = config, start
        self.encoded: dict[Any, Conditions] = {}  # encoded prompts: filled and bounded by PromptEncoder

    @cached_property
    def source(self) -> PipelineSource:
        return source_of(self._start, self._config)

    @cached_property
    def denoiser(self) -> PipelineComponent:
        """Name and class of the part that is trained."""
        return denoiser_of(self.source.folder)

    @cached_property
    def pipe(self) -> Any:
        return read_pipeline(self._config, self.source, self.denoiser)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The frozen networks by name."""
        parts = self.pipe.components.items()
        return {n: part for n, part in parts if isinstance(part, torch.nn.Module) and n != self.denoiser.name}

    @property
    def nbytes(self) -> int:
        """Bytes of the frozen networks; 0 before they are read."""
        return sum(map(nbytes_of, self.modules.values())) if "pipe" in vars(self) else 0

    def with_denoiser(self, denoiser: Any) -> Any:
        """The whole pipeline with this denoiser and a scheduler of its own; the frozen parts are shared."""
        pipe = copy.copy(self.pipe)
        pipe._internal_dict = copy.copy(pipe._internal_dict)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        pipe.register_modules(**{self.denoiser.name: denoiser, "scheduler": scheduler})
        return pipe

    @contextmanager
    def on(self, device: torch.device, *beginnings: str) -> Iterator[None]:
        """Within, the networks whose names begin so are on the device; large ones leave an accelerator afterwards."""
        used = [module for name, module in self.modules.items() if name.startswith(beginnings)]
        for module in used:
            if module.device != device:
                module.to(device)
        try:
            yield
        finally:
            for module in used:
                if device.type != "cpu" and nbytes_of(module) > LARGE:
                    module.to("cpu")


# One entry for each start that some policy holds: gone with the last of them.
_SHARED: WeakValueDictionary[tuple[str, ...], FrozenComponents] = WeakValueDictionary()


def load_pipeline(config: DiffusionPolicy, start: Path) -> FrozenComponents:
    """The frozen parts of the start's pipeline, on the CPU; the same object for as long as anyone holds it."""
    key = (str(start.resolve()), repr(read_record(start)), config.model_dump_json())
    frozen = _SHARED.get(key)
    if frozen is None:
        frozen = _SHARED[key] = FrozenComponents(config, start)
    return frozen


def read_pipeline(config: DiffusionPolicy, source: PipelineSource, part: PipelineComponent) -> Any:
    """The pipeline without its denoiser's weights. Raises ModelError where a part is missing or does not load."""
    name = str(read_index(source.folder)["_class_name"])
    assert adapter_class(name).denoiser_name == part.name
    left_out = frozenset(part for part, value in config.pipeline_init_kwargs.items() if value is None)
    check_parts(source.folder, left_out, source.variant)
    with quiet():  # the pipeline's module is imported here, and may warn
        pipeline = getattr(diffusers, name)
    check_init_kwargs(config.pipeline_init_kwargs, pipeline)
    kind = getattr(diffusers, part.kind)
    with init_empty_weights():
        hollow = kind.from_config(kind.load_config(str(source.folder / part.name)))
    options = {"dtype": getattr(torch, config.dtype), "use_safetensors": True, "trust_remote_code": False}
    options |= {key: value for key, value in config.pipeline_init_kwargs.items() if key not in PASSED_ON}
    try:
        with quiet():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(source.folder), variant=source.variant, **{part.name: hollow, **options}
            )
    except Exception as error:
        raise ModelError(
            f"policy.model must be a pipeline that diffusers loads; {source.name!r} did not: "
            f"{why_not_loaded(error, source.folder)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and component != part.name:
            module.requires_grad_(False).eval()
    return pipe


def check_init_kwargs(options: Mapping[str, Any], pipeline: Any) -> None:
    """Raises ConfigError for options that raftune sets itself, and for those that the pipeline does not know."""
    modules, optional = pipeline._get_signature_keys(pipeline)
    known = {*modules, *optional, *PASSED_ON} - {"unet", "transformer"}
    for name, value in options.items():
        if name in OURS:
            fix = f" Use {OURS[name]}." if OURS[name] else " Remove it."
            raise ConfigError(f"policy.pipeline_init_kwargs must not hold {name!r}: raftune sets it.{fix}")
        if name not in known:
            raise ConfigError(
                f"policy.pipeline_init_kwargs must be what {pipeline.__name__} takes; got {name!r}. It takes "
                f"{', '.join(sorted(known))}."
            )
        if name in modules and value is not None:
            raise ConfigError(
                f"policy.pipeline_init_kwargs may leave a part out; got {name}: {value!r}. Write {name}: null, or put "
                "the part into the pipeline's folder."
            )


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders, one at a time, so that no prompt depends on its neighbours.

    The conditions are cached with the frozen parts; beyond `limit` bytes the least recently used are dropped.
    """

    def __init__(
        self, frozen: FrozenComponents, adapter: PipelineAdapter, device: torch.device, limit: int = LIMIT
    ) -> None:
        self.frozen, self.adapter, self.device, self.limit = frozen, adapter, device, limit
        self._options = tuple(sorted((name, repr(value)) for name, value in adapter.reading().items()))

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """The conditions of the prompts, a row each, on the CPU. Raises DataError for a prompt that cannot be used."""
        cache = self.frozen.encoded
        keys = [(type(prompt.content).__name__, repr(prompt.content), *self._options) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in cache}
        if missing:
            with self._text_encoders():
                for key, prompt in missing.items():
                    try:
                        cache[key] = self.adapter.encode([prompt.content]).to("cpu")
                    except DataError as error:
                        reason = str(error).replace(" at place 0", "")  # the prompt's id says which it is
                        raise DataError(f"prompt {prompt.id}: {reason}") from error
        conditions = Conditions.joined([cache[key] for key in keys])
        for key in keys:  # the latest stand last
            cache[key] = cache.pop(key)
        held = sum(entry.nbytes for entry in cache.values())
        for key in list(cache):
            if held <= self.limit:
                break
            held -= cache.pop(key).nbytes
        return conditions

    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt, or the negative one."""
        key = ("empty", repr(negative), *self._options)
        if key not in self.frozen.encoded:
            with self._text_encoders():
                self.frozen.encoded[key] = self.adapter.empty(negative).to("cpu")
        return self.frozen.encoded[key]

    @contextmanager
    def _text_encoders(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.no_grad(), quiet(), self.frozen.on(self.device, "text_encoder"):
            yield

    @cached_property
    def _limits(self) -> dict[str, int]:
        return self.adapter.text_limits()

    def unseen(self, text: str) -> str | None:
        """The end of a prompt that no text encoder reads; None where one reads it to the end."""
        if not self._limits:
            return None
        name, limit = max(self._limits.items(), key=lambda entry: entry[1])
        tokenizer = getattr(self.adapter.pipe, name)
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return None
        kept = limit - tokenizer.num_special_tokens_to_add()  # the text is cut: its end token stays
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(tokenizer.decode(bare[kept:]))


# -- the denoiser ------------------------------------------------------------------------------------------------------


def load_denoiser(config: DiffusionPolicy, folder: Path, start: Path, *, train: bool) -> Any:
    """A fresh denoiser on the device, in eval mode, with the weights or the adapter of a committed folder.

    For training, a round's adapter is attached under the name "default" and trainable; where the folder has none, none
    is made. For generating it is merged where that is exact enough (float32), else attached.
    """
    record = read_record(folder)
    if record.kind == "adapter":
        base = record.place(folder) if folder.resolve() == start.resolve() else start
        if (base / RECORD).is_file():
            model = load_denoiser(config, base, base, train=False)
        else:
            model = _pipeline_denoiser(config, folder)
        lora.attach(model, folder)
        if not train and model.dtype == torch.float32:
            lora.merge(model)
    elif record.kind == "full":
        model = read_denoiser(config, folder, denoiser_of(source_of(folder, config).folder), variant=None)
    else:
        model = _pipeline_denoiser(config, folder)
    return model.to(choose_device(config.device)).eval()


def _pipeline_denoiser(config: DiffusionPolicy, folder: Path) -> Any:
    """The denoiser of the pipeline on which a folder rests."""
    source = source_of(folder, config)
    return read_denoiser(config, source.folder, denoiser_of(source.folder), source.variant)


def read_denoiser(config: DiffusionPolicy, folder: Path, part: PipelineComponent, variant: str | None) -> Any:
    """The denoiser in a subfolder. Raises ModelError where weights are missing or do not fit."""
    place = folder / part.name
    has_variant = variant is not None and any(place.glob(f"*.{variant}*.safetensors"))
    try:
        with quiet():
            model, info = getattr(diffusers, part.kind).from_pretrained(
                str(folder),
                subfolder=part.name,
                torch_dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **({"variant": variant} if has_variant else {}),
            )
    except Exception as error:
        raise ModelError(
            f"policy.model must hold its denoiser; {place} did not load: {why_not_loaded(error, place)}"
        ) from error
    if any(".lora_" in name for name in info["unexpected_keys"]):
        raise ModelError(
            f"policy.model must have no LoRA on its denoiser; {place} was saved with one. Load the pipeline without "
            "it, load the LoRA, and save that merged: pipe.fuse_lora(); pipe.unload_lora_weights(); "
            "pipe.save_pretrained(FOLDER)."
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"policy.model must hold all weights of its {part.kind}; {place} lacks {len(missing)} "
            f"({', '.join(missing[:3])}), which would be random. Fetch the model again."
        )
    return model


def nbytes_of(module: torch.nn.Module) -> int:
    """Bytes of a network's weights that lie in memory."""
    return sum(weight.nbytes for weight in module.parameters() if weight.device.type != "meta")


def check_finite(modules: Mapping[str, torch.nn.Module]) -> None:
    """Raises ModelError for the first weight that is a NaN or an infinity."""
    for part, module in modules.items():
        for name, weight in module.named_parameters():
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    f"policy.model must have finite weights; {part}/{name} has a NaN or an infinity. Use another model."
                )

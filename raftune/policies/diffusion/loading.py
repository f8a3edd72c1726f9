"""Loads and saves pipelines: frozen parts, denoisers and prompts' conditions. Equal models give equal bytes.

The frozen parts (text encoders, tokenizers, VAE, scheduler) are loaded once and shared by all rounds. The denoiser is
loaded each time from a committed folder. A round's folder holds raftune.json, which names the kind of folder and its
base pipeline, and either

    unet/ or transformer/                  the whole denoiser, as its save_pretrained writes it
    pytorch_lora_weights.safetensors       a LoRA, for a plain pipeline's load_lora_weights
    adapter_model.safetensors, adapter_config.json     a LoRA, for peft, where diffusers' pipeline loads none
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from raftune.policies.diffusion.checks import check_options
from raftune.policies.diffusion.model_folder import (
    INDEX,
    LORA,
    PASSED_ON,
    RECORD,
    ModelRecord,
    PipelineComponent,
    PipelineSource,
    check_parts,
    denoiser_of,
    fingerprint,
    read_index,
    read_record,
    snapshot,
    source_of,
)
from raftune.policies.diffusion.pipelines import adapter_class
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall
from raftune.policies.model_files import ADAPTER, is_path, write_optimizer
from raftune.protocols import ModelUsage
from raftune.records import Prompt
from raftune.store.files import dump_json
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
    if (frozen := _SHARED.get(key)) is None:
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
    modules, optional = pipeline._get_signature_keys(pipeline)
    supported = {*modules, *optional, *PASSED_ON} - {"unet", "transformer"}
    check_options("policy.pipeline_init_kwargs", config.pipeline_init_kwargs, OURS, supported, name)
    for module, value in config.pipeline_init_kwargs.items():
        if module in modules and value is not None:
            raise ConfigError(
                f"policy.pipeline_init_kwargs may leave a part out; got {module}: {value!r}. Write {module}: null, or "
                "put the part into the pipeline's folder."
            )
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
    vae = getattr(pipe, "vae", None)
    for field, method in (("vae_slicing", "enable_slicing"), ("vae_tiling", "enable_tiling")):
        if not getattr(config, field):
            continue
        try:
            getattr(vae, method)()
        except (AttributeError, NotImplementedError):
            holder = "no VAE" if vae is None else f"a {type(vae).__name__}, which cannot do it"
            raise ConfigError(f"policy.{field} needs a VAE that can; this {name} has {holder}. Leave it out.") from None
    return pipe


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
        if missing := {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in cache}:
            with self._text_encoders():
                for key, prompt in missing.items():
                    try:
                        cache[key] = self.adapter.encode([prompt.content]).to("cpu")
                    except DataError as error:
                        raise DataError(f"prompt {prompt.id}: {error}") from error
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
    base = record.target(folder) if folder.resolve() == start.resolve() else start
    if record.kind == "adapter" and (base / RECORD).is_file():
        model = load_denoiser(config, base, base, train=False)
    else:
        source, full = source_of(folder, config), record.kind == "full"
        variant = None if full else source.variant
        model = read_denoiser(config, folder if full else source.folder, denoiser_of(source.folder), variant)
    if record.kind == "adapter":
        lora.attach(model, folder)
        if not train and model.dtype == torch.float32:
            lora.merge(model)
    return model.to(choose_device(config.device)).eval()


def read_denoiser(config: DiffusionPolicy, folder: Path, part: PipelineComponent, variant: str | None) -> Any:
    """The denoiser in a subfolder. Raises ModelError where weights are missing or do not fit."""
    subfolder = folder / part.name
    has_variant = variant is not None and any(subfolder.glob(f"*.{variant}*.safetensors"))
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
            f"policy.model must hold its denoiser; {subfolder} did not load: {why_not_loaded(error, subfolder)}"
        ) from error
    if any(".lora_" in name for name in info["unexpected_keys"]):
        raise ModelError(
            f"policy.model must have no LoRA on its denoiser; {subfolder} was saved with one. Load the pipeline "
            "without it, load the LoRA, and save that merged: pipe.fuse_lora(); pipe.unload_lora_weights(); "
            "pipe.save_pretrained(FOLDER)."
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"policy.model must hold all weights of its {part.kind}; {subfolder} lacks {len(missing)} "
            f"({', '.join(missing[:3])}), which would be random. Fetch the model again."
        )
    return model


def nbytes_of(module: torch.nn.Module) -> int:
    """Bytes of a network's weights that lie in memory."""
    return sum(weight.nbytes for weight in module.parameters() if weight.device.type != "meta")


# -- the initial model -------------------------------------------------------------------------------------------------


def write_start(config: DiffusionPolicy, out: Path, model: Any = None, *, trains: bool = True) -> None:
    """Writes the start into `out`. Raises ModelError where there is no pipeline.

    A folder or a hub name becomes a reference with a hash; a pipeline given as an object is written whole. A round's
    folder of another run becomes its denoiser on a reference to the base pipeline: a LoRA merged, so that the next one
    starts from zero; a run that trains nothing leaves it as it is.
    """
    folder = Path(config.model).expanduser()
    if model is not None:
        write_object(out, model)
    elif (folder / RECORD).is_file():
        write_start_from_round(config, out, folder.resolve(), trains)
    elif folder.is_dir():
        adapter_class(str(read_index(folder)["_class_name"]))  # refuses other architectures before weights are read
        ModelRecord("reference", str(folder.resolve()), None, fingerprint(folder)).write(out)
    elif is_path(config.model):
        raise ModelError(
            f"policy.model must be the folder or hub name of a pipeline; got {config.model!r}, and {folder.resolve()} "
            "is no folder."
        )
    else:
        subfolder = snapshot(config.model, config.revision, config)
        adapter_class(str(read_index(subfolder)["_class_name"]))
        ModelRecord("reference", config.model, subfolder.name, f"hub:{subfolder.name}").write(out)


def write_object(out: Path, model: Any) -> None:
    """Writes a pipeline that was given as an object."""
    if not isinstance(model, diffusers.DiffusionPipeline):
        raise ModelError(
            f"a model of the diffusion family must be a pipeline of diffusers; got a {type(model).__name__}. Give "
            "DiffusionPipeline.from_pretrained(…), not its denoiser alone."
        )
    adapter_class(type(model).__name__)
    if loaded := [name for name, part in model.components.items() if getattr(part, "peft_config", None)]:
        raise ModelError(
            f"a pipeline given as an object must have no LoRA on it; its {loaded[0]} has one. Merge it first: "
            "pipe.fuse_lora(); pipe.unload_lora_weights()."
        )
    with quiet():
        model.save_pretrained(out)
    ModelRecord("pipeline").write(out)


def write_start_from_round(config: DiffusionPolicy, out: Path, folder: Path, trains: bool) -> None:
    record, source = read_record(folder), source_of(folder, config)
    if record.kind == "reference":
        relative = record.model.startswith("..")
        (replace(record, model=str(source.folder)) if relative else record).write(out)
        return
    if record.kind == "pipeline":
        ModelRecord("reference", str(folder), None, fingerprint(folder)).write(out)
        return
    hub = record.fingerprint.startswith("hub:")
    base = (source.name, source.revision, record.fingerprint if hub else fingerprint(source.folder))
    part = denoiser_of(source.folder).name
    if record.kind == "full":
        shutil.copytree(folder / part, out / part)
        ModelRecord("full", *base).write(out)
    elif trains:
        exact = config.model_copy(update={"dtype": "float32", "device": "cpu"})
        merged = load_denoiser(exact, folder, folder, train=False).to(getattr(torch, config.dtype))
        with quiet():
            merged.save_pretrained(out / part)
        ModelRecord("full", *base).write(out)
    else:
        for path in (folder / name for name in (LORA, lora.PEFT_WEIGHTS, ADAPTER)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
        if record.model.startswith("..") and not ((subfolder := record.target(folder)) / INDEX).is_file():
            base = (str(subfolder), None, "")
        ModelRecord("adapter", *base).write(out)


# -- rounds ------------------------------------------------------------------------------------------------------------


def write_model(
    adapter: PipelineAdapter, out: Path, base: Mapping[str, Any], optimizer: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the denoiser of the adapter's pipeline into `out`: its LoRA alone if it has one. `base`: base_record's."""
    kind: Any = "adapter" if lora.is_adapted(adapter.denoiser) else "full"
    write_weights(adapter, out, out / adapter.denoiser_name, adapter.denoiser)
    ModelRecord(kind, **base).write(out)
    write_optimizer(out, optimizer)


def write_weights(adapter: PipelineAdapter, out: Path, folder: Path, model: Any) -> None:
    """The LoRA into `out`, for the pipeline's load_lora_weights or for peft; without a LoRA, `model` into `folder`."""
    out.mkdir(parents=True, exist_ok=True)
    if lora.is_adapted(adapter.denoiser):
        lora.write(adapter.denoiser, out, adapter.denoiser_name if adapter.lora_layers else None)
        return
    with quiet():
        model.save_pretrained(folder)
    for path in sorted(out.rglob("*.json")):  # diffusers notes from which path of this machine a part was loaded
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            dump_json(path, content)


def model_usage(
    adapter: PipelineAdapter, call: PipelineCall, negative: str | None, out: Path, base: str | None
) -> ModelUsage:
    """The model card's code for the pipeline in `out`: how plain diffusers loads it, and the call by which the run
    generated; with other options, above all the guidance, the images differ."""
    imports = "from diffusers import DiffusionPipeline\n"
    is_pipeline, denoiser = (out / INDEX).is_file(), adapter.denoiser_name
    code = f'pipe = DiffusionPipeline.from_pretrained("{"FOLDER" if is_pipeline else base}")'
    if (out / LORA).is_file():
        code += '\npipe.load_lora_weights("FOLDER")'
    elif not is_pipeline:
        imports += "from peft import PeftModel\n"
        code += f'\npipe.{denoiser} = PeftModel.from_pretrained(pipe.{denoiser}, "FOLDER")'
    prompt = {"text": ['"what it shall show"'], "label": ["class_labels=[0]"]}.get(adapter.takes, [])
    supported = inspect.signature(adapter.pipe.__call__).parameters
    shown = ("height", "width", "num_inference_steps", "guidance_scale")
    options = {name: getattr(call, name) for name in shown if name in supported} | dict(call.kwargs)
    options |= {} if negative is None else {"negative_prompt": negative}
    arguments = ", ".join([*prompt, *(f"{name}={value!r}" for name, value in options.items())])
    task = {"text": "text-to-image", "nothing": "unconditional-image-generation"}.get(adapter.takes, "")
    code = f"{imports}\n{code}\nimage = pipe({arguments}).images[0]"
    return ModelUsage("diffusers", task, code, generated="images for")

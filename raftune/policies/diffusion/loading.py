"""From a name or a folder to the frozen parts of a pipeline, and to a denoiser of some round.

The frozen parts (text encoders, tokenizers, VAE, scheduler) are read once for a start and shared by all rounds. The
denoiser is read anew each time, from a committed folder, and is nobody else's: what trained it wraps nothing here.

What a folder is stands in its raftune.json, `Record`:

    reference  the pipeline is elsewhere, at `model`, and had this fingerprint
    pipeline   the folder itself is a whole pipeline
    full       the folder holds a denoiser (unet/ or transformer/) that takes the place of the one at `model`
    adapter    the folder holds a LoRA (pytorch_lora_weights.safetensors) on the denoiser of the start
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from raftune.config.policy import DiffusionPolicy
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion.binding import Binding
from raftune.policies.diffusion.bindings import binding_class, binding_of
from raftune.policies.diffusion.parts import INDEX, LORA, Part, denoiser_of, parts_of, read_index, refuse_missing_parts
from raftune.quiet import quiet

RECORD = "raftune.json"
ADAPTER_NAME = "default"
LARGE = 64 * 2**20  # bytes: a frozen part above this leaves the accelerator once it has done its work
# What raftune tells from_pretrained itself, with the field to use.
OURS = {
    "torch_dtype": "policy.dtype",
    "dtype": "policy.dtype",
    "revision": "policy.revision",
    "variant": "policy.variant",
    "device_map": "policy.device",
    **dict.fromkeys(("use_safetensors", "trust_remote_code", "custom_pipeline", "custom_revision", "use_onnx"), ""),
}
PASSED_ON = frozenset({"cache_dir", "force_download", "local_files_only", "token", "proxies", "low_cpu_mem_usage"})


@dataclass(frozen=True)
class Record:
    """What a model folder is. `model` is a folder (one beginning with .. starts from this folder) or a hub name.

    fingerprint: SHA-256 of the files of the pipeline at `model`, or hub:COMMIT; empty where it lies in the run itself.
    """

    kind: Literal["reference", "pipeline", "full", "adapter"]
    model: str = ""
    revision: str | None = None
    fingerprint: str = ""
    adapter: Mapping[str, Any] = field(default_factory=dict)  # of an adapter: what peft's LoraConfig was told

    def write(self, folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record:
    """What the folder is. Raises ModelError where it does not say."""
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} must say in {RECORD} what it holds: {error}. Restore the folder.") from error


@dataclass(frozen=True)
class Source:
    """A whole pipeline: its name as from_pretrained takes it, its revision, and the folder where its files are."""

    name: str
    revision: str | None
    folder: Path


def source_of(folder: Path, config: DiffusionPolicy) -> Source:
    """The pipeline on which a model folder rests. Raises ModelError where it is gone."""
    record = read_record(folder)
    if record.kind == "pipeline":
        return Source(str(folder), None, folder)
    if record.fingerprint.startswith("hub:"):
        return Source(record.model, record.revision, snapshot(record.model, record.revision, config))
    place = (folder / record.model).resolve() if record.model.startswith("..") else Path(record.model)
    if not place.is_dir():
        raise ModelError(f"policy.model must still be where the run began; {place} is gone. Put it back.")
    if (place / RECORD).is_file():
        return source_of(place, config)
    return Source(str(place), None, place)


def base_record(start: Path) -> dict[str, Any]:
    """What a round's record says of the pipeline beneath it: `model`, `revision`, `fingerprint`."""
    record = read_record(start)
    if record.kind == "pipeline":
        return {"model": f"../../{start.parent.name}/{start.name}", "revision": None, "fingerprint": ""}
    return {"model": record.model, "revision": record.revision, "fingerprint": record.fingerprint}


def snapshot(name: str, revision: str | None, config: DiffusionPolicy) -> Path:
    """The folder in the hub's cache that holds the pipeline, fetched where it is not there yet."""
    try:
        with quiet():
            options = {"revision": revision, "variant": config.variant, "use_safetensors": True}
            passed = {key: value for key, value in config.pipeline_init_kwargs.items() if key in PASSED_ON}
            return Path(diffusers.DiffusionPipeline.download(name, **options, **passed))
    except Exception as error:  # the hub's client has many ways to say that there is nothing
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
        hint = (
            "HF_HUB_OFFLINE is set: unset it, or download the pipeline first." if offline else "Check name and network."
        )
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"policy.model must be the folder or hub name of a pipeline; got {name!r}{at}, and there is no folder "
            f"{Path(name).resolve()} and no pipeline of that name on the hub or in its cache "
            f"({first_line(error)}). {hint}"
        ) from error


def fingerprint(folder: Path) -> str:
    """SHA-256 over the paths, sizes and contents of the pipeline's own files: its index, and those of each part."""
    total = hashlib.sha256()
    names = {part.name for part in parts_of(read_index(folder))}
    found = [folder / INDEX, *(path for name in names for path in (folder / name).rglob("*"))]
    for path in sorted(path for path in found if path.is_file() and not path.name.startswith(".")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0{content}\n".encode())
    return total.hexdigest()


def verify(start: Path) -> None:
    """Raises ModelError if the pipeline that the start folder refers to is gone or has changed."""
    record = read_record(start)
    if not record.fingerprint or record.fingerprint.startswith("hub:"):
        return
    if not Path(record.model).is_dir():
        raise ModelError(f"policy.model must still be where the run began; {record.model} is gone. Put it back.")
    if (now := fingerprint(Path(record.model))) != record.fingerprint:
        raise ModelError(
            f"policy.model must not change during a run; {record.model} was {record.fingerprint[:12]} and is "
            f"{now[:12]}. Put the files back, or start a new run."
        )


# -- the frozen parts --------------------------------------------------------------------------------------------------


class Frozen:
    """The parts of a pipeline that no round changes, and what is remembered of them: prompts once encoded.

    `pipe` has a denoiser without weights, so that everything can be asked that its configuration answers.
    """

    def __init__(self, pipe: Any, denoiser: Part) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self.encoded: dict[Any, Any] = {}  # filled by encoding.Prompts, which bounds it

    @property
    def binding(self) -> Binding:
        """What answers without the denoiser's weights: encode, to_latents, latent_shape."""
        return binding_of(self.pipe)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The frozen networks by name."""
        found = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        return {name: part for name, part in found.items() if name != self.denoiser.name}

    @property
    def nbytes(self) -> int:
        return sum(nbytes_of(module) for module in self.modules.values())

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
_SHARED: WeakValueDictionary[tuple[str, ...], Frozen] = WeakValueDictionary()


def load_pipeline(config: DiffusionPolicy, start: Path) -> Frozen:
    """The frozen parts of the start's pipeline, on the CPU; the same object for as long as anyone holds it."""
    key = (str(start.resolve()), (start / RECORD).read_text(), config.model_dump_json())
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = read_frozen(config, source_of(start, config))
    return found


def read_frozen(config: DiffusionPolicy, source: Source) -> Frozen:
    """The pipeline without its denoiser's weights. Raises ModelError where a part is missing or does not load."""
    index = read_index(source.folder)
    left_out = frozenset(name for name, value in config.pipeline_init_kwargs.items() if value is None)
    part = denoiser_of(index)
    kind = binding_class(str(index["_class_name"]))
    assert kind.denoiser_name == part.name
    refuse_missing_parts(source.folder, index, left_out)
    refuse_init_kwargs(config.pipeline_init_kwargs, getattr(diffusers, str(index["_class_name"])))
    options = {"dtype": getattr(torch, config.dtype), "use_safetensors": True, "trust_remote_code": False}
    try:
        with quiet():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(source.folder),
                variant=config.variant,
                **{part.name: hollow(source.folder, part), **options, **config.pipeline_init_kwargs},
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"policy.model must be a pipeline that diffusers loads; {source.name!r} did not: {first_line(error)}."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    frozen = Frozen(pipe, part)
    for module in frozen.modules.values():
        module.requires_grad_(False).eval()
    return frozen


def hollow(folder: Path, part: Part) -> Any:
    """The denoiser with its configuration and no weights (they are on the meta device)."""
    kind = getattr(diffusers, part.kind)
    with init_empty_weights():
        return kind.from_config(kind.load_config(str(folder / part.name)))


def refuse_init_kwargs(given: Mapping[str, Any], pipeline: Any) -> None:
    """Raises ConfigError for options that raftune sets itself, and for those that the pipeline does not know."""
    modules, options = pipeline._get_signature_keys(pipeline)
    known = {*modules, *options, *PASSED_ON} - {"unet", "transformer"}
    for name, value in given.items():
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


# -- the denoiser ------------------------------------------------------------------------------------------------------


def load_denoiser(config: DiffusionPolicy, folder: Path, start: Path, *, train: bool) -> Any:
    """A fresh denoiser on the device, in eval mode, with the weights or the adapter of a committed folder.

    For training, a round's adapter is attached under the name "default" and trainable; where the folder has none, none
    is made. For drawing it is merged where that is exact enough (float32), else attached.
    """
    device = choose_device(config.device)
    record = read_record(folder)
    if record.kind == "adapter":
        rests_on_itself = folder.resolve() == start.resolve()
        model = _of_pipeline(config, folder) if rests_on_itself else load_denoiser(config, start, start, train=False)
        attach(model, folder, record)
        if not train:
            model.requires_grad_(False)
            if model.dtype == torch.float32:
                model.fuse_lora()
                model.unload_lora()
    elif record.kind == "full":
        source = source_of(folder, config)
        part = denoiser_of(read_index(source.folder))
        model = read_denoiser(config, folder, part, variant=None)
    else:
        model = _of_pipeline(config, folder)
    return model.to(device).eval()


def _of_pipeline(config: DiffusionPolicy, folder: Path) -> Any:
    """The denoiser of the pipeline on which a folder rests."""
    source = source_of(folder, config)
    return read_denoiser(config, source.folder, denoiser_of(read_index(source.folder)), config.variant)


def read_denoiser(config: DiffusionPolicy, folder: Path, part: Part, variant: str | None) -> Any:
    """The denoiser in a subfolder. Raises ModelError where weights are missing or do not fit."""
    kind = getattr(diffusers, part.kind)
    has_variant = variant is not None and any((folder / part.name).glob(f"*.{variant}*.safetensors"))
    options: dict[str, Any] = {"variant": variant} if has_variant else {}
    try:
        with quiet():
            model, info = kind.from_pretrained(
                str(folder),
                subfolder=part.name,
                torch_dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"policy.model must hold its denoiser; {folder / part.name} did not load: {first_line(error)}."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"policy.model must hold all weights of its {part.kind}; {folder / part.name} lacks {len(missing)} "
            f"({', '.join(missing[:3])}), which would be random. Fetch the model again."
        )
    return model


def attach(model: Any, folder: Path, record: Record) -> None:
    """Puts a folder's LoRA onto the denoiser, under the name "default". Raises ModelError where it does not fit."""
    path = folder / LORA
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        beginnings = {name.split(".", 1)[0] for name in tensors}
        if beginnings <= {"unet", "transformer"}:  # as pipelines save it; a denoiser by itself saves without
            tensors = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}
        with quiet():
            told = {"metadata": dict(record.adapter)} if record.adapter else {}
            model.load_lora_adapter(tensors, prefix=None, adapter_name=ADAPTER_NAME, **told)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path} must be a LoRA of this denoiser: {first_line(error)}. Restore the file.") from error


def choose_device(wanted: str) -> torch.device:
    """The device that `policy.device` stands for: auto takes CUDA, then MPS, then the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"policy.device must be auto, cpu, cuda or mps; got {wanted!r}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"policy.device must be auto, cpu, cuda or mps; got {wanted!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"policy.device must exist here; got {wanted!r}, and torch sees no CUDA device. Write auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"policy.device must exist here; got {wanted!r}, and torch sees no MPS device. Write auto.")
    if device.index:  # transformers' Trainer always takes the first visible device
        raise ConfigError(
            f"policy.device must be the first visible one; got {wanted!r}. Set CUDA_VISIBLE_DEVICES={device.index} and "
            "write cuda."
        )
    return device


def nbytes_of(module: torch.nn.Module) -> int:
    """Bytes of a network's weights that lie in memory."""
    return sum(weight.nbytes for weight in module.parameters() if weight.device.type != "meta")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

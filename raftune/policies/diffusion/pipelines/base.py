"""Base class of the pipeline adapters, with everything that differs between architectures.

The rest of the family (batched generation, losses, saving) uses this interface. Shapes: N images, of latents of C
channels and h x w cells (of a pipeline without a VAE: the pixels); x0 is a clean latent, in the scale in which the
denoiser sees it.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raftune.arrays import BoolArray
from raftune.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is told of N images, besides the noisy latent and the time: each tensor has a row an image."""

    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, rows: Sequence[int] | torch.Tensor) -> Conditions:
        """These rows, in this order; a row may be taken more than once."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Conditions({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def away(self, negative: Conditions | None) -> dict[str, torch.Tensor]:
        """The negative row for each of these; empty without one."""
        if negative is None:
            return {}
        return {name: negative.tensors[name].expand_as(tensor) for name, tensor in self.tensors.items()}

    @staticmethod
    def joined(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all parts, one part after another."""
        return Conditions({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class PipelineCall:
    """How the pipeline is called: the options of a sample, every one resolved."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    kwargs: Mapping[str, Any]

    def options(self, generators: list[torch.Generator]) -> dict[str, Any]:
        """What a pipeline of latents is called with besides its conditions."""
        return {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "generator": generators,
            "output_type": "np",
            **self.kwargs,
        }


@dataclass(frozen=True)
class SampledImages:
    """N images as generated, their clean latents (N, C, h, w), whether a safety checker flagged each.

    Where `finite` is False a latent or a pixel was NaN or infinite: the image means nothing.
    """

    images: Sequence[Image.Image]
    x0: torch.Tensor
    flagged: Sequence[bool]
    finite: Sequence[bool]

    @classmethod
    def of(cls, pixels: NDArray[Any], x0: torch.Tensor, flagged: Sequence[bool] | None = None) -> SampledImages:
        """From a pipeline's output_type="np": (N, H, W, 3 or 1) in [0, 1], rounded as the pipeline would."""
        count = len(pixels)
        whole = np.isfinite(pixels).reshape(count, -1).all(1) & finite_rows(x0)
        rounded = (np.where(np.isfinite(pixels), pixels, 0) * 255).round().astype(np.uint8)
        images = [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one).convert("RGB") for one in rounded]
        return cls(images, x0, list(flagged or [False] * count), whole.tolist())


class PipelineAdapter(ABC):
    """One architecture. A subclass names the pipeline classes that it drives, and says how each of these is done."""

    pipelines: tuple[str, ...]  # names of diffusers classes
    denoiser_name: str  # "unet" or "transformer"
    takes: Literal["text", "label", "nothing"]  # what a prompt is
    lora_layers: str  # the keyword of Pipeline.save_lora_weights; empty where the pipeline class has no such method
    # Options of the pipeline's call that must not be given as sampling.diffusion.pipeline_kwargs, each with the reason.
    refused: ClassVar[Mapping[str, str]] = {}
    reads: ClassVar[tuple[str, ...]] = ()  # options of the call that shape how prompts are read, not how it draws
    shifts: ClassVar[bool] = False  # whether the pipeline heeds the VAE's shift_factor; most pass it over

    def __init__(self, pipe: Any, options: Mapping[str, Any] | None = None) -> None:
        """`options` are sampling.diffusion.pipeline_kwargs: those in `reads` are used where prompts are encoded."""
        self.pipe = pipe
        self.options: Mapping[str, Any] = options or {}

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> Conditions:
        """The conditions of these prompts, a row each; the only place that needs text encoders."""

    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt (or the negative one), for guidance and for condition dropout."""
        return self.encode([negative or ""])

    def sample(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> SampledImages:
        """One image a row, by the pipeline's own loop: what the pipeline itself gives for that prompt and generator."""
        last, away = LastLatents(), conditions.away(negative)
        embeddings: dict[str, torch.Tensor | None] = {}
        for argument, name in (("prompt_embeds", "prompt_embeds"), ("pooled_prompt_embeds", "pooled")):
            if name in conditions.tensors:
                embeddings |= {argument: conditions.tensors[name], f"negative_{argument}": away.get(name)}
        drawn = self.pipe(callback_on_step_end=last, **embeddings, **call.options(generators))
        assert last.x0 is not None
        flagged = getattr(drawn, "nsfw_content_detected", None)  # by Stable Diffusion's safety checker
        return SampledImages.of(drawn.images, self.unpacked(last.x0, call), flagged)

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(N, C, h, w) the model output, unguided, as the scheduler's step gets it; t (N,) as scheduler.timesteps."""

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        """(N, C, h, w) the clean latents of images that were not generated here."""
        scaled: torch.Tensor = (self.encoded(images, generator) - self.shift) * self.pipe.vae.config.scaling_factor
        return scaled

    def encoded(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        """(N, C, h, w) what the VAE makes of images, in its own scale: a sample, or the one answer that it has."""
        vae = self.pipe.vae
        found = vae.encode(pixels_of(images, next(vae.parameters())))
        drawn: torch.Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.sample(generator)
        return drawn

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1]: the images that these clean latents stand for."""
        vae = self.pipe.vae
        found = x0.to(vae.dtype) / vae.config.scaling_factor + self.shift
        decoded: torch.Tensor = vae.decode(found, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of so many pixels."""
        return int(self.denoiser.config.in_channels), height // self.factor, width // self.factor

    def unpacked(self, latents: torch.Tensor, call: PipelineCall) -> torch.Tensor:
        """(N, C, h, w) from the layout that the pipeline's own loop and its scheduler see."""
        return latents

    def guided(self, conditions: Conditions, scale: float) -> Conditions:
        """The same, for a denoiser that is told the guidance scale as one more condition (Flux.1 [dev])."""
        return conditions

    # -- what a prompt may be ------------------------------------------------------------------------------------------

    def refuse_prompts(self, prompts: Sequence[Any]) -> None:
        """Raises DataError where a prompt is not what this architecture takes."""
        if self.takes != "text":
            return
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise DataError(
                    f"prompts of a {type(self.pipe).__name__} must be texts; got {prompt!r}. Write what the image "
                    "shows."
                )

    def require(self, *parts: str) -> None:
        """Raises ModelError where the pipeline lacks a part without which prompts cannot be read."""
        lacking = [name for name in parts if getattr(self.pipe, name, None) is None]
        if lacking:
            raise ModelError(
                f"policy.model must have all parts that read prompts; this {type(self.pipe).__name__} has no "
                f"{', '.join(lacking)}. Load it whole, without setting them to null."
            )

    def reading(self) -> dict[str, Any]:
        """How prompts are read: the options in `reads`, as given, else as the pipeline's call has them by default."""
        defaults = inspect.signature(self.pipe.__call__).parameters
        return {name: self.options.get(name, defaults[name].default) for name in self.reads}

    # -- sizes and limits, which most architectures say alike ----------------------------------------------------------

    @property
    def shift(self) -> float:
        """What lies between the VAE's latents and the denoiser's, before they are scaled."""
        return float(self.pipe.vae.config.get("shift_factor") or 0.0) if self.shifts else 0.0

    @property
    def overflows(self) -> bool:
        """Whether the VAE leaves the range of the precision it is held in: its pipeline converts it to use it."""
        vae = getattr(self.pipe, "vae", None)
        return vae is not None and vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))

    @property
    def factor(self) -> int:
        """Pixels of a side that become one latent cell: the VAE's reduction, 1 without a VAE."""
        vae = getattr(self.pipe, "vae", None)
        return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Height and width must be a multiple of so many pixels."""
        patch = getattr(self.denoiser.config, "patch_size", None) or 1
        asked = 8 if hasattr(self.pipe, "check_inputs") else 1  # what the pipelines themselves demand
        return math.lcm(asked, self.factor * int(patch))

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the pipeline draws at where it is not told. Raises ConfigError without."""
        cells = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        if cells is None:
            raise ConfigError(
                f"sampling.diffusion.height and .width must be given: this {type(self.pipe).__name__} does not say at "
                "what size it draws (its denoiser has no sample_size)."
            )
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return int(height) * self.factor, int(width) * self.factor

    def refuse_size(self, height: int, width: int) -> None:
        """Raises ConfigError where the pipeline cannot draw images of so many pixels."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.multiple:
                down = max(pixels // self.multiple, 1) * self.multiple
                raise ConfigError(
                    f"sampling.diffusion.{name} must be a multiple of {self.multiple} for a "
                    f"{type(self.pipe).__name__}; got {pixels}. Write {down} or {down + self.multiple}."
                )

    def refuse_other_size(self, height: int, width: int) -> None:
        """Raises ConfigError but for the one size at which this denoiser draws."""
        if (height, width) != self.default_size():
            only = " x ".join(str(pixels) for pixels in self.default_size())
            raise ConfigError(
                f"sampling.diffusion.height and .width must be {only}, at which alone this {type(self.pipe).__name__} "
                f"draws; got {height} x {width}. Leave them out."
            )

    def text_limits(self) -> dict[str, int]:
        """For each tokenizer of the pipeline, by attribute: the most tokens that the encoder behind it reads."""
        found = {name: getattr(self.pipe, name) for name in vars(self.pipe) if name.startswith("tokenizer")}
        asked = self.reading().get("max_sequence_length")
        limits = {}
        for name, tokenizer in found.items():
            if hasattr(tokenizer, "model_max_length"):
                long = asked is not None and "CLIP" not in type(tokenizer).__name__
                limits[name] = int(asked) if long and asked is not None else int(tokenizer.model_max_length)
        return limits


def finite_rows(x: torch.Tensor) -> BoolArray:
    """(N,) whether every number of a row is finite."""
    return np.asarray(torch.isfinite(x.float()).flatten(1).all(1).cpu().numpy(), dtype=np.bool_)


def pixels_of(images: Sequence[Image.Image], like: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1], on the device and in the dtype of `like`; all images must be of one size."""
    stacked = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    device = "cpu" if like.device.type == "meta" else like.device  # a denoiser without weights lies nowhere
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2).to(device, like.dtype)


class LastLatents:
    """The latents after the last step so far: a callback for a pipeline's callback_on_step_end."""

    def __init__(self) -> None:
        self.x0: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.x0 = tensors["latents"]
        return {}

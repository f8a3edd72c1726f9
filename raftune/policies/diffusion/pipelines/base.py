"""Base class of the pipeline adapters, with everything that differs between architectures.

Shapes: N images, latents of C channels and h x w cells (without a VAE: pixels). x0 is a clean latent, in the scale in
which the denoiser sees it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from raftune.errors import ConfigError, DataError, ModelError

ENCODED_BEFORE = "prompts are encoded once, before the pipeline is called, without it"
ONE_TEXT = "every text encoder reads the prompt"


@dataclass(frozen=True)
class Conditions:
    """The denoiser's inputs for N images besides the noisy latent and the time: each tensor has a row per image."""

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
        """The negative row, repeated for each of these; empty without one."""
        if negative is None:
            return {}
        return {name: negative.tensors[name].expand_as(tensor) for name, tensor in self.tensors.items()}

    @staticmethod
    def joined(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all parts, one part after another."""
        return Conditions({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class PipelineCall:
    """The options of a pipeline call, every one resolved."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class SampledImages:
    """N images, their clean latents (N, C, h, w), and whether a safety checker flagged each.

    `finite` is False where a latent or a pixel was NaN or infinite.
    """

    images: Sequence[Image.Image]
    x0: torch.Tensor
    flagged: Sequence[bool]
    finite: Sequence[bool]

    @classmethod
    def of(cls, pixels: Any, x0: torch.Tensor, flagged: Sequence[bool] | None = None) -> SampledImages:
        """From a pipeline's output: an array (N, H, W, 3 or 1) or a tensor (N, 3 or 1, H, W), in [0, 1]; rounded as the
        pipeline would."""
        if torch.is_tensor(pixels):
            pixels = pixels.cpu().permute(0, 2, 3, 1)
            pixels = (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()
        finite = np.isfinite(pixels).reshape(len(pixels), -1).all(1)
        finite &= torch.isfinite(x0.float()).flatten(1).all(1).cpu().numpy()
        rounded = (np.where(np.isfinite(pixels), pixels, 0) * 255).round().astype(np.uint8)
        rounded = rounded[..., 0] if rounded.shape[-1] == 1 else rounded
        images = [Image.fromarray(image).convert("RGB") for image in rounded]
        return cls(images, x0, list(flagged or [False] * len(images)), finite.tolist())


class PipelineAdapter:
    """One architecture. A subclass names the pipeline classes that it serves."""

    pipelines: tuple[str, ...]  # names of diffusers classes
    denoiser_name: str  # "unet" or "transformer"
    takes: Literal["text", "label", "nothing"]  # what a prompt is
    lora_layers: str  # the keyword of Pipeline.save_lora_weights; empty where the pipeline class has no such method
    # Options of the pipeline's call that must not be given as sampling.diffusion.pipeline_kwargs, each with the reason.
    refused: ClassVar[Mapping[str, str]] = {}
    reads: ClassVar[tuple[str, ...]] = ()  # options of the call that shape how prompts are encoded
    shifts: ClassVar[bool] = False  # whether the pipeline uses the VAE's shift_factor; most ignore it
    fixed_size: ClassVar[bool] = False  # whether it generates at the denoiser's own size alone
    # How `encode` calls the pipeline's encode_prompt: the parts that it needs (the first one gives the device), the
    # arguments, and the conditions that it returns, by position.
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_options: ClassVar[Mapping[str, Any]] = {}
    text_outputs: ClassVar[tuple[str | None, ...]] = ()
    # How `sample` calls the pipeline: arguments from conditions, each with a negative one, and fixed arguments.
    call_inputs: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds", "pooled_prompt_embeds": "pooled"}
    call_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipe: Any, options: Mapping[str, Any] | None = None) -> None:
        """`options` are sampling.diffusion.pipeline_kwargs: those in `reads` are used where prompts are encoded."""
        self.pipe = pipe
        self.options: Mapping[str, Any] = options or {}

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    # -- prompts -------------------------------------------------------------------------------------------------------

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raises DataError where a prompt is not what this architecture takes."""
        for prompt in prompts:
            if self.takes == "text" and not isinstance(prompt, str):
                raise DataError(
                    f"prompts of a {type(self.pipe).__name__} must be texts; got {prompt!r}. Write what the image "
                    "shows."
                )

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        """The conditions of these prompts, a row each; the only place that needs text encoders."""
        self.check_prompts(prompts)
        if missing := [name for name in self.text_parts if getattr(self.pipe, name, None) is None]:
            raise ModelError(
                f"policy.model must have all parts that read prompts; this {type(self.pipe).__name__} has no "
                f"{', '.join(missing)}. Load it whole, without setting them to null."
            )
        device = getattr(self.pipe, self.text_parts[0]).device
        outputs = self.pipe.encode_prompt(prompt=list(prompts), device=device, **self.text_options, **self.reading())
        return Conditions({name: tensor for name, tensor in zip(self.text_outputs, outputs, strict=False) if name})

    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt (or the negative one), for guidance and for condition dropout."""
        return self.encode([negative or ""])

    def guided(self, conditions: Conditions, scale: float) -> Conditions:
        """The conditions with the guidance scale, for a denoiser that takes it as an input (Flux.1 [dev])."""
        return conditions

    def reading(self) -> dict[str, Any]:
        """How prompts are encoded: the options in `reads`, as configured, else the defaults of the pipeline's call."""
        defaults = inspect.signature(self.pipe.__call__).parameters
        return {name: self.options.get(name, defaults[name].default) for name in self.reads}

    def text_limits(self) -> dict[str, int]:
        """For each tokenizer of the pipeline, by attribute: the most tokens that its text encoder reads."""
        longest: Any = self.reading().get("max_sequence_length")
        limits = {}
        for name, tokenizer in vars(self.pipe).items():
            if name.startswith("tokenizer") and hasattr(tokenizer, "model_max_length"):
                clip = longest is None or "CLIP" in type(tokenizer).__name__
                limits[name] = int(tokenizer.model_max_length if clip else longest)
        return limits

    # -- images --------------------------------------------------------------------------------------------------------

    def sample(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> SampledImages:
        """One image a row, by the pipeline's own loop: what the pipeline itself gives for that prompt and generator."""
        steps: deque[SchedulerStep] = deque(maxlen=1)
        with watched(self.pipe.scheduler, steps.append):
            output = self.run(conditions, negative, generators, call)
        flagged = getattr(output, "nsfw_content_detected", None)  # by Stable Diffusion's safety checker
        latents = steps[0].latents[: len(conditions)]  # a guided class-conditional loop has twice as many
        return SampledImages.of(output.images, self.unpacked(latents, call), flagged)

    def run(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> Any:
        """The output of the pipeline's call."""
        away, inputs = conditions.away(negative), dict[str, Any](self.call_options)
        for argument, name in self.call_inputs.items():
            if name in conditions.tensors:
                inputs |= {argument: conditions.tensors[name], f"negative_{argument}": away.get(name)}
        return self.pipe(
            height=call.height,
            width=call.width,
            num_inference_steps=call.num_inference_steps,
            guidance_scale=call.guidance_scale,
            generator=generators,
            output_type="np",
            **inputs,
            **call.kwargs,
        )

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(N, C, h, w) the unguided model output, as the scheduler's step gets it; t (N,) as scheduler.timesteps."""
        inputs = self.inputs(x_t, conditions.tensors)
        output: torch.Tensor = self.denoiser(x_t, timestep=t, **inputs, return_dict=False)[0]
        return output[:, : x_t.shape[1]]  # a learned variance may follow, which no loss here reads

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The denoiser's inputs besides latents and time, for architectures that take latents as they are."""
        return {}

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        """(N, C, h, w) the clean latents of images that were not generated here."""
        scaled: torch.Tensor = (self.encoded(images, generator) - self.shift) * self.pipe.vae.config.scaling_factor
        return scaled

    def encoded(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        """(N, C, h, w) the VAE's encoding in its own scale: a sample of its posterior where it has one."""
        vae = self.pipe.vae
        output = vae.encode(pixels_of(images, next(vae.parameters())))
        latents: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.sample(generator)
        return latents

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [0, 1]: the decoded images."""
        vae = self.pipe.vae
        decoded: torch.Tensor = vae.decode(
            x0.to(vae.dtype) / vae.config.scaling_factor + self.shift, return_dict=False
        )[0]
        return (decoded / 2 + 0.5).clamp(0, 1)

    def unpacked(self, latents: torch.Tensor, call: PipelineCall) -> torch.Tensor:
        """(N, C, h, w) from the layout that the pipeline's own loop and its scheduler see."""
        return latents

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of so many pixels."""
        return int(self.denoiser.config.in_channels), height // self.factor, width // self.factor

    @property
    def shift(self) -> float:
        """The offset between the VAE's latents and the denoiser's, before scaling."""
        return float(self.pipe.vae.config.get("shift_factor") or 0.0) if self.shifts else 0.0

    @property
    def overflows(self) -> bool:
        """Whether the VAE overflows in float16, so that its pipeline converts it while it is used."""
        vae = getattr(self.pipe, "vae", None)
        return vae is not None and vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))

    @property
    def factor(self) -> int:
        """Pixels of a side that become one latent cell; 1 without a VAE."""
        vae = getattr(self.pipe, "vae", None)
        return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Height and width must be a multiple of so many pixels."""
        patch = getattr(self.denoiser.config, "patch_size", None) or 1
        required = 8 if hasattr(self.pipe, "check_inputs") else 1  # by the pipelines themselves
        return math.lcm(required, self.factor * int(patch))

    def default_size(self) -> tuple[int, int]:
        """The pipeline's own height and width in pixels. Raises ConfigError where it has none."""
        cells = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        if cells is None:
            raise ConfigError(
                f"sampling.diffusion.height and .width must be given: this {type(self.pipe).__name__} does not say at "
                "what size it generates (its denoiser has no sample_size)."
            )
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return int(height) * self.factor, int(width) * self.factor

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError where the pipeline cannot generate images of so many pixels."""
        if self.fixed_size:
            if (height, width) != self.default_size():
                only = " x ".join(str(pixels) for pixels in self.default_size())
                raise ConfigError(
                    f"sampling.diffusion.height and .width must be {only}, at which alone this "
                    f"{type(self.pipe).__name__} generates; got {height} x {width}. Leave them out."
                )
            return
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.multiple:
                down = max(pixels // self.multiple, 1) * self.multiple
                raise ConfigError(
                    f"sampling.diffusion.{name} must be a multiple of {self.multiple} for a "
                    f"{type(self.pipe).__name__}; got {pixels}. Write {down} or {down + self.multiple}."
                )


def pixels_of(images: Sequence[Image.Image], like: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1], on the device and in the dtype of `like`; all images must be of one size."""
    stacked = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    device = "cpu" if like.device.type == "meta" else like.device
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2).to(device, like.dtype)


@dataclass(frozen=True)
class SchedulerStep:
    """One scheduler step in the pipeline loop's layout: `model_input` and `output` of the denoiser, and the `latents`
    that result."""

    index: int
    time: torch.Tensor
    model_input: torch.Tensor
    output: torch.Tensor
    latents: torch.Tensor


@contextmanager
def watched(scheduler: Any, seen: Callable[[SchedulerStep], object]) -> Iterator[None]:
    """Within, `seen` is called after every step of the scheduler.

    Most loops scale the denoiser's input by scale_model_input; without it the input is the sample.
    """
    names = ("step", "scale_model_input")
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)
    before = {name: value for name, value in vars(scheduler).items() if name in names}  # of an outer `watched`
    scaled: list[torch.Tensor] = []
    count = 0

    @functools.wraps(step)  # pipelines read its signature to see which options it takes
    def watched_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
        nonlocal count
        model_input = scaled.pop() if scaled else sample
        result = step(model_output, timestep, sample, *args, **kw)
        latents = result[0] if isinstance(result, tuple) else result.prev_sample
        seen(SchedulerStep(count, torch.as_tensor(timestep), model_input, model_output, latents))
        count += 1
        return result

    def watched_scale(*args: Any, **kw: Any) -> torch.Tensor:
        assert scale is not None
        scaled[:] = [scale(*args, **kw)]
        return scaled[0]

    scheduler.step = watched_step
    if scale is not None:
        scheduler.scale_model_input = watched_scale
    try:
        yield
    finally:
        for name in names:
            vars(scheduler).pop(name, None)
        vars(scheduler).update(before)

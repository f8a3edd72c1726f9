"""What ties one architecture to the family: everything that differs between SD, SDXL, SD3, Flux, PixArt, DiT and DDPM.

The rest of the family (drawing in batches, losses, saving) is written once, over this interface. Shapes: N images, of
latents of C channels and h x w cells (of a pipeline without a VAE: the pixels); x0 is a clean latent, in the scale in
which the denoiser sees it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is told of N images, besides the noisy latent and the time: each tensor has a row an image."""

    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def take(self, rows: Sequence[int] | torch.Tensor) -> Conditions:
        """These rows, in this order; a row may be taken more than once."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Conditions({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def joined(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all parts, one part after another."""
        return Conditions({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Call:
    """How the pipeline is called: the dials of a draw, every one resolved."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Pictures:
    """N images as drawn: (N, H, W, 3) bytes, their clean latents (N, C, h, w), whether a safety checker flagged each.

    `pixels` were not rounded from anything that is not finite: where `finite` is False, the image means nothing.
    """

    images: Sequence[Image.Image]
    x0: torch.Tensor
    flagged: Sequence[bool]
    finite: Sequence[bool]


class Binding(ABC):
    """One architecture. A subclass names the pipeline classes that it drives, and says how each of these is done."""

    pipelines: tuple[str, ...]  # names of diffusers classes
    denoiser_name: str  # "unet" or "transformer"
    takes: Literal["text", "label", "nothing"]  # what a prompt is
    lora_layers: str  # the keyword of Pipeline.save_lora_weights; empty where the pipeline class has no such method

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> Conditions:
        """The conditions of these prompts, a row each; the only place that needs text encoders."""

    @abstractmethod
    def empty(self, negative: str | None = None) -> Conditions:
        """One row: no prompt (or the negative one), for guidance and for condition dropout."""

    @abstractmethod
    def sample(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: Call
    ) -> Pictures:
        """One image a row, by the pipeline's own loop: what the pipeline itself gives for that prompt and generator."""

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(N, C, h, w) the model output, unguided, as the scheduler's step gets it; t (N,) as scheduler.timesteps."""

    @abstractmethod
    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        """(N, C, h, w) the clean latents of images that were not drawn here."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of so many pixels."""

"""The autoencoder that both policies share: 32 x 32 pixels to 8 x 8 latents of four channels, and back. Needs torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from raftune.starters.image.images import ANY_RADIUS, SCENES, SIZE, Pixels, paint
from tools.starters.optimizer import Optimizer, emit


class AutoencoderRecipe(NamedTuple):
    """Every number that shapes the autoencoder."""

    steps: int = 3200
    rate: float = 3e-3
    batch: int = 24
    kl: float = 1e-4
    channels: tuple[int, ...] = (16, 32, 32)


def as_tensor(pixels_NHW3: Pixels) -> torch.Tensor:
    """(N, 3, H, W) in -1…1, as pipelines have it."""
    return torch.from_numpy(pixels_NHW3).permute(0, 3, 1, 2).contiguous() * 2 - 1


def train_autoencoder(recipe: AutoencoderRecipe, seed: int) -> AutoencoderKL:
    """An AutoencoderKL of about 0.23M parameters, its latents centred and scaled channel by channel."""
    torch.manual_seed(seed)
    levels = len(recipe.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )
    emit(f"autoencoder: {sum(p.numel() for p in vae.parameters()):,} parameters, {recipe.steps} steps")
    descent = Optimizer("autoencoder", vae, recipe.rate, recipe.steps)
    noise = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    for _ in range(recipe.steps):
        x = as_tensor(random_images(rng, recipe.batch))
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample(noise)).sample - x).square().mean()
        # The divergence is summed over the 256 numbers of an image's latents: a mean of it belongs beside a mean.
        descent.advance(loss + recipe.kl * posterior.kl().mean() / 256)
    centre(vae.eval(), seed + 1)
    return vae


def random_images(rng: np.random.Generator, size: int) -> Pixels:
    """Images of scenes of all splits."""
    return paint([SCENES[i] for i in rng.integers(len(SCENES), size=size)], rng, ANY_RADIUS)


@torch.no_grad()
def centre(vae: AutoencoderKL, seed: int, images: int = 2048) -> None:
    """Folds a shift and a scale of each latent channel into the 1 x 1 convolutions: mean 0, deviation 1, same images.

    A denoiser starts from noise of mean 0 and deviation 1: raw latents (means up to 1.2, deviations .3 to 2) would
    have to be told apart from it first, and no pipeline has a place for such a shift of each channel.
    """
    pixels = random_images(np.random.default_rng(seed), images)
    latents = encode(vae, pixels)
    mean_C, sd_C = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post, c = vae.quant_conv, vae.post_quant_conv, len(mean_C)
    quant.weight[:c] /= sd_C[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean_C) / sd_C
    quant.bias[c:] -= 2 * sd_C.log()
    post.bias += post.weight[:, :, 0, 0] @ mean_C
    post.weight *= sd_C[None, :, None, None]
    emit(f"latents were of mean {mean_C.tolist()}, deviation {sd_C.tolist()}")


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels_NHW3: Pixels) -> torch.Tensor:
    """(N, 4, 8, 8): the means of the latents."""
    return torch.cat([vae.encode(as_tensor(part)).latent_dist.mean for part in batches_of(pixels_NHW3)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> Pixels:
    """(N, H, W, 3) in 0…1."""
    parts = [vae.decode(part).sample for part in torch.split(latents, 256)]
    pixels: Pixels = (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pixels


def reconstruct(vae: AutoencoderKL, pixels_NHW3: Pixels) -> Pixels:
    return decode(vae, encode(vae, pixels_NHW3))


def batches_of(pixels: Pixels, size: int = 256) -> Sequence[Pixels]:
    return [pixels[start : start + size] for start in range(0, len(pixels), size)]

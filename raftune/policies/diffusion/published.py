"""Sizes of well-known pipelines on the hub, to plan a run before download.

Parameters and operations were counted on the published architectures, without weights; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIP_L, CLIP_G, T5_XXL, SAFETY, VAE = 123_060_480, 694_659_840, 4_762_310_656, 303_980_000, 83_700_000


@dataclass(frozen=True)
class PublishedPipeline:
    """One pipeline: its class and its denoiser's, parameters of the frozen parts, and what a forward of one image at
    `size` pixels takes: floating-point operations, and numbers in all layers' outputs (which learning keeps)."""

    pipeline: str
    denoiser: str
    config: Mapping[str, Any]
    frozen: Mapping[str, int]
    size: int
    latents: tuple[int, int]  # channels, and pixels of a side that become one cell
    flops: float
    outputs: float
    guidance: float  # the pipeline's default scale; at most 1 asks the denoiser once a step
    steps: int
    extra_steps: int = 0  # forwards that the default scheduler adds to a sample


SD1 = PublishedPipeline(
    "StableDiffusionPipeline",
    "UNet2DConditionModel",
    {"sample_size": 64, "cross_attention_dim": 768},
    {"text encoder": CLIP_L, "VAE": VAE, "safety checker": SAFETY},
    512,
    (4, 8),
    0.803e12,
    0.43e9,
    7.5,
    50,
    1,
)
SDXL = PublishedPipeline(
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    {"text encoders": CLIP_L + CLIP_G, "VAE": VAE},
    1024,
    (4, 8),
    6.76e12,
    3.06e9,
    5.0,
    50,
)
SD3 = PublishedPipeline(
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    {
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 192,
    },
    {"text encoders": CLIP_L + CLIP_G + T5_XXL, "VAE": VAE},
    1024,
    (16, 8),
    8.9e12,
    2.45e9,
    7.0,
    28,
)
FLUX = PublishedPipeline(
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    {"text encoders": CLIP_L + T5_XXL, "VAE": VAE},
    1024,
    (16, 8),
    74.0e12,
    11.0e9,
    1.0,  # a guidance scale that the denoiser is told, at one forward a step
    28,
)
PUBLISHED: dict[str, PublishedPipeline] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
    "CompVis/stable-diffusion-v1-4": SD1,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3,
    "black-forest-labs/FLUX.1-dev": FLUX,
    "black-forest-labs/FLUX.1-schnell": FLUX,
}

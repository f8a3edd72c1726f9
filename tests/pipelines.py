"""Tiny diffusion pipelines of every architecture, with random weights and real tokenizers, built without a network.

A denoiser has some ten thousand parameters; images have 16 x 16 pixels; two steps take hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from raftune.training.quiet import quiet

Kind = Literal["sd", "sd-v", "sdxl", "sd3", "flux", "pixart", "dit", "ddpm", "ddim"]
SIZE = 16  # pixels of a side
CELLS = 8  # latent cells of a side: these autoencoders shrink by two
TEXT_LENGTH = 16  # tokens that the text encoders read
WORDS = ("a", "the", "red", "green", "blue", "circle", "square", "on", "black", "white", "background", "left", "right")


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and merges that make a token of every known word; the pieces of any other word stay apart."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            pieces[:2] = ["".join(merge)]
            merges += [merge] if merge not in merges else []
            vocabulary += [pieces[0]] if pieces[0] not in vocabulary else []
    ids = {token: i for i, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """The same words and letters, as a unigram model."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    words = [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=TEXT_LENGTH)


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}  # 2 would mean the old way
    ids["pad_token_id"] = tokenizer.pad_token_id
    lengths = {"max_position_embeddings": TEXT_LENGTH, "vocab_size": len(tokenizer), "projection_dim": width}
    return CLIPTextConfig(**sizes, **ids, **lengths, initializer_factor=8.0)  # texts must differ in what they say


def _clip(tokenizer: CLIPTokenizer, width: int = 16, *, projection: bool = False) -> Any:
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(_clip_config(tokenizer, width)).eval()


def _t5(tokenizer: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    return T5EncoderModel(T5Config(**sizes, dropout_rate=0.0)).eval()


def _vae(**changes: Any) -> AutoencoderKL:
    """Shrinks by two, at four latent channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(**blocks, **sizes, mid_block_add_attention=False, sample_size=SIZE, **changes).eval()


def _unet(**changes: Any) -> UNet2DConditionModel:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    given = {"sample_size": CELLS, "cross_attention_dim": 16, **changes}
    return UNet2DConditionModel(down_block_types=down, up_block_types=up, **sizes, **given).eval()


def _betas(**changes: Any) -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, **changes}


def _sd(scheduler: Any) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    parts = {"vae": _vae(scaling_factor=0.18215), "unet": _unet(), "scheduler": scheduler, "tokenizer": tokenizer}
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, text_encoder=_clip(tokenizer), requires_safety_checker=False)


def _sd_epsilon() -> StableDiffusionPipeline:
    return _sd(DDIMScheduler(**_betas(set_alpha_to_one=False, steps_offset=1)))


def _sd_v() -> StableDiffusionPipeline:
    spaced = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return _sd(DDIMScheduler(**_betas(prediction_type="v_prediction", **spaced)))


def _sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders side by side, and six numbers about the image's size beside the second one's summary."""
    tokenizer = clip_tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
    unet = _unet(cross_attention_dim=32, projection_class_embeddings_input_dim=16 + 6 * 4, **added)
    encoders = {"text_encoder": _clip(tokenizer), "text_encoder_2": _clip(tokenizer, projection=True)}
    parts = {"vae": _vae(scaling_factor=0.13025), "unet": unet, "scheduler": DDIMScheduler(**_betas(steps_offset=1))}
    both = {"tokenizer": tokenizer, "tokenizer_2": clip_tokenizer()}
    return StableDiffusionXLPipeline(**parts, **encoders, **both, add_watermarker=False)


def _sd3() -> StableDiffusion3Pipeline:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": CELLS}
    denoiser = SD3Transformer2DModel(sample_size=CELLS, patch_size=2, in_channels=4, out_channels=4, **sizes, **text)
    encoders = {"text_encoder": _clip(tokenizer, projection=True), "text_encoder_3": _t5(t5, 32)}
    return StableDiffusion3Pipeline(
        transformer=denoiser.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        **encoders,
        text_encoder_2=_clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5,
    )


def _flux() -> FluxPipeline:
    """Its denoiser is told the guidance, as Flux.1 [dev]'s is; latents of four channels travel in packs of 2 x 2."""
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    denoiser = FluxTransformer2DModel(patch_size=1, in_channels=16, guidance_embeds=True, **sizes, **text)
    return FluxPipeline(
        transformer=denoiser.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_t5(t5, 32),
        tokenizer=tokenizer,
        tokenizer_2=t5,
    )


def _learned_sigma() -> dict[str, Any]:
    """The denoiser gives twice the channels: what it predicts, and a variance that no loss here reads."""
    return {"in_channels": 4, "out_channels": 8, "patch_size": 2, "norm_type": "ada_norm_single"}


def _pixart() -> PixArtAlphaPipeline:
    t5 = t5_tokenizer()
    # A width of three parts: only a sample size of 128 makes a PixArt that is told height, width and aspect ratio.
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 24}
    denoiser = PixArtTransformer2DModel(sample_size=128, caption_channels=32, **_learned_sigma(), **sizes)
    return PixArtAlphaPipeline(
        transformer=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=_vae(scaling_factor=0.18215),
        text_encoder=_t5(t5, 32),
        tokenizer=t5,
    )


def _dit() -> DiTPipeline:
    """A thousand classes, as the pipeline's own null class is number 1000."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": CELLS}
    channels = {"in_channels": 4, "out_channels": 8, "patch_size": 2}
    denoiser = DiTTransformer2DModel(num_embeds_ada_norm=1000, **sizes, **channels)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return DiTPipeline(transformer=denoiser.eval(), vae=_vae(scaling_factor=0.18215), scheduler=scheduler)


def _pixels() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return UNet2DModel(sample_size=SIZE, in_channels=3, out_channels=3, **blocks, **sizes).eval()


KINDS: dict[Kind, Callable[[], DiffusionPipeline]] = {
    "sd": _sd_epsilon,
    "sd-v": _sd_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "dit": _dit,
    "ddpm": lambda: DDPMPipeline(unet=_pixels(), scheduler=DDPMScheduler()),
    "ddim": lambda: DDIMPipeline(unet=_pixels(), scheduler=DDIMScheduler()),
}


def tiny_pipeline(kind: Kind, seed: int = 0) -> DiffusionPipeline:
    """A pipeline of this kind on the CPU, whose weights depend on the seed alone; it draws no progress bar."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = KINDS[kind]()
        _listen(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _listen(pipe: DiffusionPipeline) -> None:
    """Random weights hardly read a text; louder, what the text says moves pixels by more than a rounding."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "attn2.to_out" in name:
                weight.mul_(16)


def save_tiny(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """A folder that `DiffusionPipeline.from_pretrained` loads."""
    with quiet():
        tiny_pipeline(kind, seed).save_pretrained(folder)
    return folder

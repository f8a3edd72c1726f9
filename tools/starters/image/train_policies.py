"""Trains the two policies, text encoders along with the denoisers, on images some of whose captions are wrong.

Needs torch. Rows of latents: (N, 4, 8, 8), which the autoencoder has centred and scaled; t is in steps of 1000.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from raftune.starters.image.images import SIZE, USUAL_RADIUS, paint, scenes
from tools.starters.image.autoencoder import encode
from tools.starters.image.captions import LENGTH, silent_encoder, silent_tokenizer, text_config, tokenizer
from tools.starters.optimizer import Optimizer, emit

CELLS = SIZE // 4
LEVELS = 1000
SHIFT = 3.0  # of the noise levels of flow matching towards noise: latents this small show through all but the most


class TrainingLeg(NamedTuple):
    """Steps with an optimizer of their own, from a warm-up down a cosine. `noisy`: see `levels`."""

    steps: int
    rate: float
    noisy: bool = False


DrawingLoss = Callable[[torch.Tensor, list[str], TrainingLeg], torch.Tensor]


class ImagePolicyRecipe(NamedTuple):
    """Every number that shapes a policy, but for its architecture's own."""

    legs: tuple[TrainingLeg, ...]
    batch: int = 32
    pictures: int = 24_000
    wrong: float = 0.3  # the share of images with another scene's caption: what there is to align
    dropout: float = 0.1  # the share of captions left out, for guidance


# In one leg of 5,000, with noisy levels from its first step, it learned where a shape belongs in 4 of 10 images only.
UNET = ImagePolicyRecipe(
    (TrainingLeg(3000, 1.5e-3), TrainingLeg(1500, 1e-3, noisy=True), TrainingLeg(1200, 1e-3, noisy=True))
)
FLOW = ImagePolicyRecipe((TrainingLeg(5500, 2e-3),))


class CaptionedLatents(NamedTuple):
    """Latents of images and the captions that they are taught with."""

    latents: torch.Tensor
    captions: list[str]

    def some(self, rng: np.random.Generator, size: int, dropout: float) -> tuple[torch.Tensor, list[str]]:
        rows, kept = rng.integers(len(self.captions), size=size), rng.random(size) >= dropout
        captions = [self.captions[row] if keep else "" for row, keep in zip(rows, kept, strict=True)]
        return self.latents[torch.from_numpy(rows)], captions


def lessons(vae: AutoencoderKL, recipe: ImagePolicyRecipe, seed: int) -> CaptionedLatents:
    """Images of the scenes of `train` alone; of each tenth, three have the caption of another of them."""
    rng, known = np.random.default_rng(seed), scenes("train")
    shown_N = rng.integers(len(known), size=recipe.pictures)
    moved_N = rng.integers(1, len(known), recipe.pictures) * (rng.random(recipe.pictures) < recipe.wrong)
    captioned_N = (shown_N + moved_N) % len(known)
    latents = [encode(vae, paint([known[i] for i in part], rng, USUAL_RADIUS)) for part in np.array_split(shown_N, 24)]
    return CaptionedLatents(torch.cat(latents), [known[i].caption for i in captioned_N])


def train_unet(vae: AutoencoderKL, recipe: ImagePolicyRecipe, seed: int) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of about 2.8M parameters: v-prediction, from a schedule that does end in pure noise.

    The usual schedule leaves some signal in its last step, and of latents this small that is the background and the
    place: a denoiser that learned with it cannot start from noise (arXiv 2305.08891).
    """
    torch.manual_seed(seed)
    pipe = untrained_unet(vae)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    noise = torch.Generator().manual_seed(seed)

    def loss(x0: torch.Tensor, captions: list[str], leg: TrainingLeg) -> torch.Tensor:
        t, e = levels(len(x0), noise, noisy=leg.noisy), torch.randn(x0.shape, generator=noise)
        embeddings, _ = pipe.encode_prompt(captions, "cpu", 1, False)
        found = pipe.unet(noising.add_noise(x0, e, t), t, encoder_hidden_states=embeddings).sample
        return functional.mse_loss(found, noising.get_velocity(x0, e, t))

    teach("unet", pipe, [pipe.unet, pipe.text_encoder], loss, recipe, seed)
    return pipe


def levels(count: int, noise: torch.Generator, *, noisy: bool) -> torch.Tensor:
    """(count,) steps of the schedule; where `noisy`, half of them among the noisiest 40 %.

    Where a shape lies shows through all but the most noise: only there must a denoiser learn to go by the caption.
    """
    t = torch.randint(LEVELS, (count,), generator=noise)
    if not noisy:
        return t
    noisiest = torch.randint(LEVELS * 6 // 10, LEVELS, (count // 2,), generator=noise)
    return torch.cat([t[: count - len(noisiest)], noisiest])


def untrained_unet(vae: AutoencoderKL) -> StableDiffusionPipeline:
    known = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=CELLS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(known, 64)),
        tokenizer=known,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_flow(vae: AutoencoderKL, recipe: ImagePolicyRecipe, seed: int) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of about 1.4M parameters: flow matching; its third text encoder is silent."""
    torch.manual_seed(seed)
    pipe = untrained_flow(vae)
    noise, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed + 1)

    def loss(x0: torch.Tensor, captions: list[str], leg: TrainingLeg) -> torch.Tensor:
        sigma = torch.sigmoid(torch.randn(len(x0), generator=noise))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)  # as the scheduler shifts the steps of sampling
        e, s = torch.randn(x0.shape, generator=noise), sigma[:, None, None, None]
        # The silent encoder gives so many zeros: 256 by default. They cost three quarters of the time, so that most
        # lessons have a caption's length; some have them all, so that a plain call works as well.
        zeros = 256 if rng.random() < 1 / 16 else LENGTH
        embeddings, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, "cpu", do_classifier_free_guidance=False, max_sequence_length=zeros
        )
        found = pipe.transformer(
            hidden_states=(1 - s) * x0 + s * e,
            timestep=sigma * LEVELS,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
        ).sample
        return functional.mse_loss(found, e - x0)

    teach("flow", pipe, [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2], loss, recipe, seed)
    return pipe


def untrained_flow(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    known = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=CELLS,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=6,
        attention_head_dim=16,
        caption_projection_dim=96,
        joint_attention_dim=80,
        pooled_projection_dim=80,
        pos_embed_max_size=2 * CELLS,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(known, 64)),
        tokenizer=known,
        text_encoder_2=CLIPTextModelWithProjection(text_config(known, 16)),  # the pipeline asks for two
        tokenizer_2=known,
        text_encoder_3=silent_encoder(80),
        tokenizer_3=silent_tokenizer(),
    )


def teach(
    name: str, pipe: Any, parts: Sequence[nn.Module], loss: DrawingLoss, recipe: ImagePolicyRecipe, seed: int
) -> None:
    """Trains these parts of the pipeline on the loss of latents and captions."""
    model, rng = nn.ModuleList(parts).train(), np.random.default_rng(seed)
    steps = " + ".join(str(leg.steps) for leg in recipe.legs)
    emit(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps")
    known = lessons(pipe.vae, recipe, seed)
    for leg in recipe.legs:
        descent = Optimizer(name, model, leg.rate, leg.steps)
        for _ in range(leg.steps):
            descent.advance(loss(*known.some(rng, recipe.batch, recipe.dropout), leg))
    model.eval()


@torch.no_grad()
def sample(pipe: Any, captions: Sequence[str], seed: int, guidance: float, steps: int = 12, **options: Any) -> Any:
    """(N, H, W, 3) in 0…1: an image of each caption, from the seeds that follow the first."""
    found = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(captions), 64):
        part = list(captions[start : start + 64])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np", **options}
        found.append(pipe(part, generator=generators, **call).images)
    return np.concatenate(found)

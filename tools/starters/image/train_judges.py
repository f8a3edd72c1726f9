"""Trains what looks at images: the judge, the reward's CLIP, the aesthetic head over its features. Needs torch."""

import math
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from raftune.arrays import IntArray
from raftune.starters.image.classifier import COUNTS, SceneClassifier
from raftune.starters.image.images import ANY_RADIUS, COLOURS, SCENES, SHAPES, SIZE, Pixels, Scene, paint
from tools.starters.image.autoencoder import as_tensor, decode, encode, reconstruct
from tools.starters.image.captions import SPOILED, text_config, tokenizer
from tools.starters.image.corruptions import spoiled
from tools.starters.optimizer import Optimizer, emit


class JudgeRecipe(NamedTuple):
    """Every number that shapes the judge."""

    steps: int = 1500
    rate: float = 3e-3
    batch: int = 96
    noise: float = 0.15
    copies: int = 40  # images of each scene


class ImageRewardRecipe(NamedTuple):
    """Every number that shapes the reward's CLIP."""

    steps: int = 2500
    rate: float = 2e-3
    groups: int = 24  # of a batch: scenes that differ in their shape alone, all four, and one of them spoiled
    width: int = 64
    layers: int = 3
    scale: float = 40.0  # of the logits, at first
    noise: float = 0.15
    copies: int = 40  # images of each scene


class AestheticRecipe(NamedTuple):
    """Every number that shapes the aesthetic head."""

    steps: int = 1000
    rate: float = 3e-3
    batch: int = 256
    hidden: int = 32
    copies: int = 16  # images of each scene, good and spoiled


class LabelledImages(NamedTuple):
    """Images in 0…1 and what they show."""

    scenes: list[Scene]
    pixels: Pixels

    @property
    def labels(self) -> torch.Tensor:
        """(N, 4) the number of each attribute's word."""
        return torch.tensor([scene.labels for scene in self.scenes])

    def some(self, rng: np.random.Generator, size: int, noise: float) -> "LabelledImages":
        """These many at random, with noise of up to this deviation on each."""
        rows = rng.integers(len(self.scenes), size=size)
        return LabelledImages([self.scenes[row] for row in rows], grained(self.pixels[rows], rng, noise))


def gallery(vae: AutoencoderKL, copies: int, seed: int) -> LabelledImages:
    """All scenes, time and again; the second half of the images through the autoencoder.

    Trained on originals alone, a model of images is soon fooled by what a decoder adds to every image it makes.
    """
    chosen = list(SCENES) * copies
    pixels = paint(chosen, np.random.default_rng(seed), ANY_RADIUS)
    half = len(chosen) // 2
    pixels[half:] = reconstruct(vae, pixels[half:])
    return LabelledImages(chosen, pixels)


def grained(pixels: Pixels, rng: np.random.Generator, noise: float) -> Pixels:
    sd = rng.uniform(0, noise, (len(pixels), 1, 1, 1)).astype(np.float32)
    found: Pixels = np.clip(pixels + sd * rng.standard_normal(pixels.shape, dtype=np.float32), 0, 1)
    return found


def marred(vae: AutoencoderKL, scenes: list[Scene], rng: np.random.Generator) -> Pixels:
    """Spoiled images of these scenes; half of them are decoded from latents, most of those with noise on them."""
    half = len(scenes) // 2
    by_hand = spoiled(scenes[half:], rng, ANY_RADIUS)
    latents = encode(vae, np.concatenate([paint(scenes[:half], rng, ANY_RADIUS), by_hand[: half // 4]]))
    sd = rng.uniform(0.5, 1.3, (half, 1, 1, 1))
    latents[:half] += torch.from_numpy((sd * rng.standard_normal(latents[:half].shape)).astype(np.float32))
    decoded = decode(vae, latents)
    by_hand[: half // 4] = decoded[half:]
    return np.concatenate([decoded[:half], by_hand])


def train_judge(vae: AutoencoderKL, recipe: JudgeRecipe, seed: int) -> SceneClassifier:
    torch.manual_seed(seed)
    judge = SceneClassifier()
    emit(f"judge: {sum(p.numel() for p in judge.parameters()):,} parameters, {recipe.steps} steps")
    descent = Optimizer("judge", judge, recipe.rate, recipe.steps)
    shown, rng = gallery(vae, recipe.copies, seed), np.random.default_rng(seed + 1)
    for _ in range(recipe.steps):
        seen = shown.some(rng, recipe.batch, recipe.noise)
        parts = judge(as_tensor(seen.pixels)).split(COUNTS, 1)
        losses = [functional.cross_entropy(part, seen.labels[:, a]) for a, part in enumerate(parts)]
        descent.advance(torch.stack(losses).mean())
    return judge.eval()


def train_reward(vae: AutoencoderKL, recipe: ImageRewardRecipe, seed: int) -> CLIPModel:
    """A CLIPModel of about 0.2M parameters; images that are spoiled have captions that say so.

    A batch holds what is hard to tell apart: the four shapes of one scene, and one of them good and spoiled.
    """
    torch.manual_seed(seed)
    known, rng = tokenizer(), np.random.default_rng(seed)
    clip = CLIPModel(clip_config(recipe))
    emit(f"reward: {clip.num_parameters():,} parameters, {recipe.steps} steps")
    descent = Optimizer("reward", clip, recipe.rate, recipe.steps)
    shown = gallery(vae, recipe.copies, seed)
    worse = marred(vae, shown.scenes, np.random.default_rng(seed + 1))
    for _ in range(recipe.steps):
        good = groups(rng, recipe.groups, recipe.copies)
        bad = rng.permuted(good.reshape(-1, len(SHAPES)), axis=1)[:, 0]
        captions = [shown.scenes[i].caption for i in good] + [SPOILED + shown.scenes[i].caption for i in bad]
        # Grain on both: on good images alone, it would be what makes an image good.
        pixels = grained(np.concatenate([shown.pixels[good], worse[bad]]), rng, recipe.noise)
        tokens = known(captions, padding=True, return_tensors="pt")
        found = clip(**tokens, pixel_values=as_tensor(pixels))
        descent.advance(contrast(found.logits_per_image, captions))
        clip.logit_scale.data.clamp_(max=math.log(100))
    return clip.eval()


def groups(rng: np.random.Generator, count: int, copies: int) -> IntArray:
    """(count·4,) numbers of images in a gallery: of so many scenes each, one image of every shape."""
    of_shape = np.arange(len(SCENES)).reshape(len(COLOURS), len(SHAPES), -1).swapaxes(1, 2).reshape(-1, len(SHAPES))
    scenes_G4 = of_shape[rng.choice(len(of_shape), count, replace=False)]
    found: IntArray = (scenes_G4 + len(SCENES) * rng.integers(copies, size=scenes_G4.shape)).ravel()
    return found


def clip_config(recipe: ImageRewardRecipe) -> CLIPConfig:
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=4,
        projection_dim=recipe.width,
    )
    text = text_config(tokenizer(), recipe.width)
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    return CLIPConfig(**parts, projection_dim=recipe.width, logit_scale_init_value=math.log(recipe.scale))


def contrast(logits_NN: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """CLIP's loss, in both directions; images with the same caption share the target."""
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    of_N = torch.tensor([numbers[caption] for caption in captions])
    same_NN = (of_N[:, None] == of_N).float()
    target_NN = same_NN / same_NN.sum(1, keepdim=True)
    parts = [functional.cross_entropy(logits, target_NN) for logits in (logits_NN, logits_NN.T)]
    return torch.stack(parts).mean()


@torch.no_grad()
def image_features(clip: CLIPModel, pixels: Pixels) -> torch.Tensor:
    """(N, d) of length 1."""
    parts = [clip.get_image_features(pixel_values=part).pooler_output for part in torch.split(as_tensor(pixels), 256)]
    return functional.normalize(torch.cat(parts), dim=-1)


def aesthetic_data(vae: AutoencoderKL, clip: CLIPModel, copies: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2N, d) features of good images and then of as many spoiled ones, and (2N,) which is good: 1."""
    rng, good = np.random.default_rng(seed), gallery(vae, copies, seed)
    pixels = grained(np.concatenate([good.pixels, marred(vae, good.scenes, rng)]), rng, 0.05)
    return image_features(clip, pixels), torch.tensor([1.0, 0.0]).repeat_interleave(len(good.scenes))


def train_aesthetic(vae: AutoencoderKL, clip: CLIPModel, recipe: AestheticRecipe, seed: int) -> nn.Sequential:
    """The log odds that an image is good rather than spoiled, whatever it shows, from CLIP's features of length 1."""
    torch.manual_seed(seed)
    width = clip.config.projection_dim
    head = nn.Sequential(nn.Linear(width, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, 1))
    features, good = aesthetic_data(vae, clip, recipe.copies, seed)
    descent, rng = Optimizer("aesthetic", head, recipe.rate, recipe.steps), np.random.default_rng(seed)
    for _ in range(recipe.steps):
        rows = torch.from_numpy(rng.integers(len(good), size=recipe.batch))
        logits = head(features[rows]).squeeze(1)
        descent.advance(functional.binary_cross_entropy_with_logits(logits, good[rows]))
    return head.eval()

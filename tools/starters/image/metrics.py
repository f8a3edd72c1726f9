"""What a build reached, on images and seeds that nothing was trained on. Needs torch."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPModel

from raftune.starters.image.classifier import SceneClassifier
from raftune.starters.image.images import ANY_RADIUS, ATTRIBUTES, SCENES, ImageSplit, Pixels, Scene, paint, scenes
from tools.starters.image.autoencoder import as_tensor, reconstruct
from tools.starters.image.captions import tokenizer
from tools.starters.image.train_judges import aesthetic_data, grained
from tools.starters.image.train_policies import sample

Numbers = dict[str, float]


def painted_images(size: int, seed: int) -> tuple[list[Scene], Pixels]:
    rng = np.random.default_rng(seed)
    chosen = [SCENES[i] for i in rng.integers(len(SCENES), size=size)]
    return chosen, paint(chosen, rng, ANY_RADIUS)


def right(judge: SceneClassifier, shown: list[Scene], pixels: Pixels) -> Numbers:
    """The share of images that show what they ought to, by attribute, and `all` of them at once."""
    hits_NA = judge.labels(pixels) == np.array([scene.labels for scene in shown])
    return rounded({**dict(zip(ATTRIBUTES, hits_NA.mean(0), strict=True)), "all": hits_NA.all(1).mean()})


def measure_autoencoder(vae: AutoencoderKL, seed: int) -> Numbers:
    """The mean square difference of images from what the autoencoder makes of them, of values in -1…1."""
    _, pixels = painted_images(1024, seed)
    return rounded({"mse": float(np.square(2 * (reconstruct(vae, pixels) - pixels)).mean())}, 5)


def measure_judge(vae: AutoencoderKL, judge: SceneClassifier, seed: int) -> dict[str, Numbers]:
    shown, pixels = painted_images(1024, seed)
    return {
        "right_on_originals": right(judge, shown, pixels),
        "right_on_reconstructions": right(judge, shown, reconstruct(vae, pixels)),
    }


@torch.no_grad()
def measure_reward(clip: CLIPModel, seed: int) -> dict[str, Any]:
    """How often an image's own caption is above one that has another word, and the mean score of the two."""
    known, rng = tokenizer(), np.random.default_rng(seed)
    shown, pixels = painted_images(1024, seed)
    own_N = scores(clip, known, pixels, shown)
    above, wrong = {}, []
    for name, words in ATTRIBUTES.items():
        others = [
            scene._replace(**{name: str(rng.choice([w for w in words if w != getattr(scene, name)]))})
            for scene in shown
        ]
        wrong.append(scores(clip, known, pixels, others))
        above[name] = float((own_N > wrong[-1]).mean())
    noisy_N = scores(clip, known, grained(pixels, rng, 0.15), shown)
    means = {"own_caption": own_N.mean(), "own_caption_with_noise": noisy_N.mean(), "one_word_wrong": np.mean(wrong)}
    return {"own_above_wrong": rounded(above), "mean_score": rounded(means, 2)}


def scores(clip: CLIPModel, known: Any, pixels: Pixels, shown: list[Scene]) -> Any:
    """(N,) CLIP's logit of each image and its caption."""
    tokens = known([scene.caption for scene in shown], padding=True, return_tensors="pt")
    image = clip.get_image_features(pixel_values=as_tensor(pixels)).pooler_output
    text = clip.get_text_features(**tokens).pooler_output
    return (clip.logit_scale.exp() * torch.cosine_similarity(image, text)).numpy()


@torch.no_grad()
def measure_aesthetic(vae: AutoencoderKL, clip: CLIPModel, head: nn.Sequential, seed: int) -> Numbers:
    """How often the sign of the log odds is right, and how often a good image is above a spoiled one."""
    features, good = aesthetic_data(vae, clip, 3, seed)
    odds = head(features).squeeze(1)
    above = (odds[good == 1][:, None] > odds[good == 0][None]).float().mean()
    return rounded({"accuracy": float(((odds > 0) == (good == 1)).float().mean()), "good_above_spoiled": float(above)})


def measure_policy(pipe: Any, judge: SceneClassifier, seed: int, **options: Any) -> dict[str, Any]:
    """What the judge sees in images of 12 steps, unguided and at guidance 2, of each split's captions."""
    found: dict[str, Any] = {}
    splits: tuple[ImageSplit, ...] = ("train", "heldout", "unseen")
    for guidance in (1.0, 2.0):
        for split in splits:
            known = scenes(split)
            shown = [known[i] for i in np.random.default_rng(seed).integers(len(known), size=192)]
            pixels = sample(pipe, [scene.caption for scene in shown], seed, guidance, **options)
            found[f"guidance_{guidance:g}_{split}"] = right(judge, shown, pixels)
    return found


def rounded(numbers: Numbers, digits: int = 4) -> Numbers:
    return {name: round(float(value), digits) for name, value in numbers.items()}

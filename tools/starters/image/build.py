"""Trains everything that raftune/starters/image/weights/ holds: `python -m tools.starters.image.build` (or `make
starters`).

In order: an autoencoder; the judge, which sees what an image shows; a gate, the judge must see it in reconstructions
as well, since a policy draws nothing better than its autoencoder can; the reward, a CLIPModel, and an aesthetic head
over its features; and two policies, one of StableDiffusionPipeline's class and one of flow matching. Each step is a
function of the seed: on one machine with one thread count, two builds give the same files. It takes half an hour on
two cores; `--only` builds some parts anew and reads the others from OUT.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from raftune.starters.image import WEIGHTS
from raftune.starters.image.classifier import SceneClassifier
from raftune.store.files import dump_json
from tools.starters.image.autoencoder import AutoencoderRecipe, train_autoencoder
from tools.starters.image.captions import LENGTH
from tools.starters.image.metrics import (
    measure_aesthetic,
    measure_autoencoder,
    measure_judge,
    measure_policy,
    measure_reward,
)
from tools.starters.image.saving import (
    load_clip,
    load_head,
    save_clip,
    save_head,
    save_judge,
    save_part,
    save_pipeline,
    size,
)
from tools.starters.image.train_judges import (
    AestheticRecipe,
    ImageRewardRecipe,
    JudgeRecipe,
    train_aesthetic,
    train_judge,
    train_reward,
)
from tools.starters.image.train_policies import FLOW, UNET, train_flow, train_unet
from tools.starters.optimizer import emit

PARTS: Final = ("autoencoder", "judge", "reward", "aesthetic", "policy", "flow")
GATE: Final = 0.98  # the least share of reconstructions of which the judge sees each attribute right
UNSEEN: Final = 1_000_000  # added to the seed of what is measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the bundled image starter.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to build; the rest lies in OUT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # vanishing gradients cost tens of cycles each otherwise
    for part in PARTS:
        if part in options.only:
            found = BUILDERS[part](options.out, options.seed)
            note(options.out, part, {"seed": options.seed, "threads": options.threads, **found})


def note(out: Path, part: str, found: dict[str, Any]) -> None:
    """Writes the part's recipe and measured numbers into `manifest.json`, beside the others'."""
    path = out / "manifest.json"
    known = json.loads(path.read_text()) if path.exists() else {"made_by": "python -m tools.starters.image.build"}
    dump_json(path, {**known, part: found}, sort_keys=False)
    emit(json.dumps({part: found["measured"]}, indent=2))


def build_autoencoder(out: Path, seed: int) -> dict[str, Any]:
    recipe = AutoencoderRecipe()
    save_part(train_autoencoder(recipe, seed), out / "policy" / "vae")
    vae = load_vae(out)
    return {**recipe._asdict(), "measured": measure_autoencoder(vae, seed + UNSEEN)}


def load_vae(out: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(out / "policy" / "vae").eval()


def build_judge(out: Path, seed: int, recipe: JudgeRecipe | None = None) -> dict[str, Any]:
    """Writes `judge/`. Ends the build where the judge does not see reconstructions as it sees originals."""
    recipe, vae = recipe or JudgeRecipe(), load_vae(out)
    save_judge(train_judge(vae, recipe, seed + 1), out / "judge")
    found = measure_judge(vae, SceneClassifier.load(out / "judge"), seed + UNSEEN)
    blind = {name: share for name, share in found["right_on_reconstructions"].items() if name != "all" and share < GATE}
    if blind:
        raise SystemExit(
            f"Of reconstructed images the judge must see each attribute right in {GATE:.0%}; got {blind}. The "
            "autoencoder loses it, and no policy over it could learn it: train the autoencoder for more steps."
        )
    return {**recipe._asdict(), "bytes": size(out / "judge"), "measured": found}


def build_reward(out: Path, seed: int) -> dict[str, Any]:
    recipe = ImageRewardRecipe()
    save_clip(train_reward(load_vae(out), recipe, seed + 2), out / "reward")
    clip = load_clip(out / "reward")
    facts = {"parameters": clip.num_parameters(), "bytes": size(out / "reward")}
    return {**recipe._asdict(), **facts, "measured": measure_reward(clip, seed + UNSEEN)}


def build_aesthetic(out: Path, seed: int) -> dict[str, Any]:
    recipe, vae, clip = AestheticRecipe(), load_vae(out), load_clip(out / "reward")
    save_head(train_aesthetic(vae, clip, recipe, seed + 3), out / "aesthetic", clip="../reward")
    found = measure_aesthetic(vae, clip, load_head(out / "aesthetic"), seed + UNSEEN)
    return {**recipe._asdict(), "bytes": size(out / "aesthetic"), "measured": found}


def build_policy(out: Path, seed: int) -> dict[str, Any]:
    save_pipeline(train_unet(load_vae(out), UNET, seed + 4), out / "policy")
    return {**UNET._asdict(), **reached(out, "policy", seed)}


def build_flow(out: Path, seed: int) -> dict[str, Any]:
    save_pipeline(train_flow(load_vae(out), FLOW, seed + 5), out / "flow")
    return {**FLOW._asdict(), **reached(out, "flow", seed, max_sequence_length=LENGTH)}


def reached(out: Path, name: str, seed: int, **options: Any) -> dict[str, Any]:
    pipe = DiffusionPipeline.from_pretrained(out / name)
    found = measure_policy(pipe, SceneClassifier.load(out / "judge"), seed + UNSEEN, **options)
    return {"bytes": size(out / name), "measured": found}


BUILDERS: Final = {
    "autoencoder": build_autoencoder,
    "judge": build_judge,
    "reward": build_reward,
    "aesthetic": build_aesthetic,
    "policy": build_policy,
    "flow": build_flow,
}

if __name__ == "__main__":
    main()

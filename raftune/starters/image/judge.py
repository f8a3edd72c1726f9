"""The held-out judge of bundled images: a classifier that neither policy nor reward was trained with.

It looks at each picture alone, names its colour, shape, position and background, and compares them with the caption.
"""

from collections.abc import Sequence
from functools import cache
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from raftune.starters.image.images import SIZE, Scene, scene_of

if TYPE_CHECKING:
    from raftune.starters.image.classifier import SceneClassifier

BICUBIC: Final = 3  # of PIL, which is not imported before there is an image
FOLDER: Final = Path(__file__).parent / "weights" / "judge"


def judge(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """The share of the caption's four attributes that each PIL picture shows, 0…1; None for another caption.

    Pictures of other sizes are brought to 32 x 32 first. Columns are ignored.
    """
    return [None if hits is None else sum(hits) / len(hits) for hits in compared(prompts, completions)]


def all_right(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where a picture shows all four attributes of its caption, else 0; None for another caption."""
    return [None if hits is None else float(all(hits)) for hits in compared(prompts, completions)]


def compared(prompts: Sequence[Any], completions: Sequence[Any]) -> list[tuple[bool, ...] | None]:
    """For each picture whether its colour, shape, position and background are those of its caption."""
    if not prompts:
        return []
    sized = [image.convert("RGB").resize((SIZE, SIZE), BICUBIC) for image in completions]
    pixels_NHW3 = np.stack([np.asarray(image, dtype=np.float32) / np.float32(255) for image in sized])
    shown = [Scene.of(row) for row in classifier().labels(pixels_NHW3)]
    scenes = [scene_of(str(prompt)) for prompt in prompts]
    return [scene and tuple(map(eq, scene, image)) for scene, image in zip(scenes, shown, strict=True)]


@cache
def classifier() -> "SceneClassifier":
    """The judge's network, read once in a process."""
    from raftune.starters.image.classifier import SceneClassifier

    return SceneClassifier.load(FOLDER)

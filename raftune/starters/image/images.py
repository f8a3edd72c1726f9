"""Generates captioned images: one coloured shape in a quarter of a plain background.

    a red circle in the top left on a white background

Eight colours x four shapes x four positions x three backgrounds are 384 captions. Some are kept away from the policy:
four pairs of colour and shape never (`unseen`), and of the others every sixth caption (`heldout`). Torch-free.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSplit = Literal["train", "heldout", "unseen"]
Pixels = npt.NDArray[np.float32]

SIZE: Final = 32
COLOURS: Final = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.95, 0.88, 0.18),
    "green": (0.16, 0.65, 0.24),
    "cyan": (0.20, 0.80, 0.85),
    "blue": (0.15, 0.27, 0.85),
    "purple": (0.52, 0.20, 0.70),
    "pink": (0.97, 0.50, 0.74),
}
SHAPES: Final = ("circle", "square", "triangle", "cross")
POSITIONS: Final = {
    "top left": (9.5, 9.5),
    "top right": (22.5, 9.5),
    "bottom left": (9.5, 22.5),
    "bottom right": (22.5, 22.5),
}
BACKGROUNDS: Final = {"white": 0.95, "grey": 0.52, "black": 0.06}

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
ANY_RADIUS: Final = (4.0, 8.5)
"""Pixels from the centre: what the autoencoder, the judge and the reward are trained on."""
USUAL_RADIUS: Final = (6.0, 8.0)
"""What the policies are trained on: drawn at 1.5 times their size and shrunk, their shapes stay in ANY_RADIUS."""


class Scene(NamedTuple):
    """What a caption says, as words of ATTRIBUTES."""

    colour: str
    shape: str
    position: str
    background: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} in the {self.position} on a {self.background} background"

    @property
    def labels(self) -> tuple[int, ...]:
        """The index of each word among its attribute's."""
        return tuple(words.index(word) for words, word in zip(ATTRIBUTES.values(), self, strict=True))

    @classmethod
    def of(cls, labels: Iterable[int]) -> "Scene":
        """The scene of these labels."""
        return cls(*(words[label] for words, label in zip(ATTRIBUTES.values(), labels, strict=True)))


SCENES: Final = tuple(Scene(*words) for words in product(*ATTRIBUTES.values()))
CAPTION: Final = re.compile(
    r"\ban? ({}) ({}) in the ({}) on a ({}) background\b".format(*map("|".join, ATTRIBUTES.values())), re.IGNORECASE
)


def scene_of(caption: str) -> Scene | None:
    """What a caption says; None where it is not one of this generator's."""
    match = CAPTION.search(caption)
    return Scene(*(word.lower() for word in match.groups())) if match else None


def split_of(scene: Scene) -> ImageSplit:
    """Which captions a scene's belongs to. Each split has every word, but of colours `unseen` has every second only."""
    colour, shape, position, background = scene.labels
    if colour == 2 * shape + 1:
        return "unseen"
    return "heldout" if (colour + 2 * shape + 3 * position + background) % 6 == 0 else "train"


def scenes(split: ImageSplit) -> tuple[Scene, ...]:
    return tuple(scene for scene in SCENES if split_of(scene) == split)


def prompts(split: ImageSplit, size: int, seed: int) -> list[str]:
    """`size` captions of a split in random order; all of them are there before one comes again."""
    rng, available = np.random.default_rng(seed), scenes(split)
    order = [int(i) for _ in range(-(-size // len(available))) for i in rng.permutation(len(available))]
    return [available[i].caption for i in order[:size]]


def paint(
    chosen: Sequence[Scene],
    rng: np.random.Generator,
    radius: tuple[float, float] = USUAL_RADIUS,
    doubled: Pixels | None = None,
) -> Pixels:
    """(N, SIZE, SIZE, 3) in 0…1: each scene with its own size, a centre moved by up to a pixel, and tints that vary.

    `doubled` (N, 2), pixels, paints every shape a second time, so far from the first.
    """
    n = len(chosen)
    labels_NA = np.array([scene.labels for scene in chosen])
    centres_N2 = np.array(list(POSITIONS.values()))[labels_NA[:, 2]] + rng.uniform(-1, 1, (n, 2))
    radii_N = rng.uniform(*radius, n)
    cover_NHW = cover(labels_NA[:, 1], centres_N2, radii_N)
    if doubled is not None:
        cover_NHW = np.maximum(cover_NHW, cover(labels_NA[:, 1], centres_N2 + doubled, radii_N))
    colours_N3 = np.array(list(COLOURS.values()))[labels_NA[:, 0]] + rng.uniform(-0.04, 0.04, (n, 3))
    grounds_N1 = np.array(list(BACKGROUNDS.values()))[labels_NA[:, 3], None] + rng.uniform(-0.04, 0.04, (n, 1))
    cover_NHW1 = cover_NHW[..., None]
    image_NHW3 = cover_NHW1 * colours_N3[:, None, None] + (1 - cover_NHW1) * grounds_N1[:, None, None]
    pixels: Pixels = np.clip(image_NHW3, 0, 1).astype(np.float32)
    return pixels


def cover(shapes_N: npt.NDArray[Any], centres_N2: npt.NDArray[Any], radii_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, SIZE, SIZE): the share of each pixel that its shape covers, from the signed distance to the outline."""
    middle = np.arange(SIZE) + 0.5
    x = middle[None, None, :] - centres_N2[:, 0, None, None]
    y = middle[None, :, None] - centres_N2[:, 1, None, None]
    r = radii_N[:, None, None]
    wide, narrow = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    outlines = (
        np.hypot(x, y) - r,
        wide - 0.86 * r,
        np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.6 * r,
        np.maximum(wide - r, narrow - 0.34 * r),
    )
    inside_NHW = np.select([shapes_N[:, None, None] == i for i in range(len(SHAPES))], outlines)
    share: npt.NDArray[Any] = np.clip(0.5 - inside_NHW, 0, 1)
    return share


def as_image(pixels_HW3: Pixels) -> "Image":
    """A PIL picture of values in 0…1."""
    from PIL import Image

    return Image.fromarray((pixels_HW3 * 255).round().astype(np.uint8))

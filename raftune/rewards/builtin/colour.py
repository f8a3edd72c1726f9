"""Reward `colour`: a statistic of an image's colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from raftune.arrays import FloatArray
from raftune.data.images import LUMA
from raftune.errors import ConfigError
from raftune.rewards.batch import images
from raftune.rewards.fingerprint import digest
from raftune.rewards.registry import BuiltInReward, builtin


@builtin("colour", media=("image",), example={"measure": "distance", "colour": [255, 0, 0]})
@dataclass
class ColourReward(BuiltInReward):
    """A statistic of an image's colours, chosen by `measure`.

    brightness: mean luma, 0 (black) to 1 (white). contrast: standard deviation of the luma, 0 to 0.5. saturation: mean
    of (max - min) / max over a pixel's channels, 0 (grey) to 1. colourfulness: Hasler and Süsstrunk 2003, their scale
    divided by 255, 0 (grey) to about 1. warmth: mean red minus mean blue, -1 to 1. distance: root mean square distance
    of the pixels to `colour`, 0 to 1; use a negative weight to approach the colour.
    """

    measure: Annotated[
        Literal["brightness", "contrast", "saturation", "colourfulness", "warmth", "distance"],
        Field(description="The statistic."),
    ] = "brightness"
    colour: Annotated[
        tuple[int, int, int] | None, Field(description="Red, green, blue, each 0 to 255; only for distance.")
    ] = None

    def __post_init__(self) -> None:
        if (self.measure == "distance") != (self.colour is not None):
            raise ConfigError(
                "colour: the option `colour` belongs to measure: distance, and that needs it; got measure: "
                f"{self.measure} with colour: {self.colour}. Write `measure: distance` and `colour: [255, 0, 0]`."
            )
        if self.colour is not None and not all(0 <= value <= 255 for value in self.colour):
            raise ConfigError(f"colour: each of red, green and blue must be from 0 to 255; got {list(self.colour)}.")

    @cached_property
    def fingerprint(self) -> str:
        return digest("colour", 1, self.measure, list(self.colour or ()))

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        arrays = [np.asarray(image, np.float64) / 255 for image in images(completions, self.name)]
        if self.colour is not None:  # root mean square over pixels and channels
            target = np.array(self.colour) / 255
            return [float(np.sqrt(((pixels - target) ** 2).mean())) for pixels in arrays]
        return [MEASURES[self.measure](pixels) for pixels in arrays]


def saturation(pixels: FloatArray) -> float:
    """Saturation of the HSV model; a black pixel has none."""
    highest = pixels.max(axis=-1)
    return float(((highest - pixels.min(axis=-1)) / np.where(highest > 0, highest, 1.0)).mean())


def colourfulness(pixels: FloatArray) -> float:
    """Spread plus 0.3 of the mean of the opponent colours red-green and yellow-blue (Hasler and Süsstrunk 2003)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    opponents = (red - green, (red + green) / 2 - blue)
    spread, mean = (np.hypot(*(of(axis) for axis in opponents)) for of in (np.std, np.mean))
    return float(spread + 0.3 * mean)


MEASURES: dict[str, Callable[[FloatArray], float]] = {
    "brightness": lambda pixels: float((pixels @ LUMA).mean()),
    "contrast": lambda pixels: float((pixels @ LUMA).std()),
    "saturation": saturation,
    "colourfulness": colourfulness,
    "warmth": lambda pixels: float(pixels[..., 0].mean() - pixels[..., 2].mean()),
}

"""The overview of image runs: the grid of rounds and the image metrics."""

from __future__ import annotations

from raftune.report import numbers
from raftune.report.charts import SHAPES
from raftune.report.collect import ReportData
from raftune.report.numbers import ReportValue
from raftune.report.panels import BEST_OF, DIVERSITY, HELD_OUT, KL, LENGTH, LINES, OTHER, Values, chart, group, line

PICTURE_GUARDED = (
    ("saturation", "Saturation", "mean, from grey 0 to pure colour 1", "saturation", LENGTH),
    ("contrast", "Contrast", "how much luminance is spread, 0 … 0.5", "contrast", KL),
    ("spread", "Variety", "how far as many images are apart, 0 … 1", "spread", DIVERSITY),
    (
        "repeated",
        "Near duplicates",
        "share that nearly repeats an image of another prompt",
        "near_duplicates",
        HELD_OUT,
    ),
)
COLOUR = (("saturation", "saturation", LENGTH), ("contrast", "contrast", KL))
APART = (("pixels", "pixel_distance", DIVERSITY), ("features", "feature_distance", OTHER))
DOUBTFUL = (
    ("at the ends", "saturated_ratio", LENGTH),
    ("near duplicates", "near_duplicates", HELD_OUT),
    ("invalid", "invalid_ratio", OTHER),
)


def gallery(found: ReportData) -> str:
    """The place of the grid, which a script draws: each image stands in the document once."""
    if not found.reader.pictured or not found.document["compare"]["items"]:
        return ""
    title = "The same prompts and seeds, round by round"
    return f'<section class="block needs-script" id="gallery"><h2>{title}</h2></section>'


def picture_charts(found: ReportData) -> str:
    """What the images of each round are like, on held-out prompts."""
    note = (
        "Measured on the held-out images of every round. Colour that rises and variety that falls are how a reward "
        "for images is gamed: the grid above says what these numbers look like."
    )
    parts = (colour_chart, brightness_chart, apart_chart, vendi_chart, drift_chart, doubtful_chart)
    return group("images", "What the images are like", note, *(part(found) for part in parts))


def lines_of(found: ReportData, named: tuple[tuple[str, str, int], ...], factor: float = 1) -> list[Values]:
    """The numbers of each name by round, scaled."""
    return [
        {round_: scaled(value, factor) for round_, value in numbers.by_round(found.reader, name).items()}
        for _, name, _ in named
    ]


def scaled(value: ReportValue, factor: float) -> ReportValue:
    low, high = (None if end is None else factor * end for end in (value.low, value.high))
    return ReportValue(factor * value.mean, low, high)


def several(
    found: ReportData, slug: str, title: str, caption: str, named: tuple[tuple[str, str, int], ...], factor: float = 1
) -> str:
    """A chart of several numbers."""
    values = lines_of(found, named, factor)
    lines = [line(name, values[i], colour, LINES[i], SHAPES[i]) for i, (name, _, colour) in enumerate(named)]
    return chart(found, slug, title, caption, *lines)


def colour_chart(found: ReportData) -> str:
    caption = "how far pixels are from grey, 0 … 1; how much luminance is spread, 0 … 0.5"
    return several(found, "colour", "Saturation and contrast", caption, COLOUR)


def brightness_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "brightness")
    return chart(found, "brightness", "Brightness", "mean luminance, 0 … 1", line("brightness", values, OTHER))


def apart_chart(found: ReportData) -> str:
    caption = "how far two images of one prompt are apart, 0 … 1"
    return several(found, "apart", "Variety of images", caption, APART)


def vendi_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "vendi")
    caption = "Vendi score: how many different images a prompt's group is worth"
    return chart(found, "vendi", "Effective number of images", caption, line("Vendi", values, DIVERSITY))


def drift_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "feature_drift")
    caption = "1 − cosine to the start's image of the same prompt and seed"
    return chart(found, "drift", "Drift from the start", caption, line("drift", values, BEST_OF, "dashed", "hollow"))


def doubtful_chart(found: ReportData) -> str:
    caption = "% of pixels that are 0 or 255; of images that repeat another; of samples without an image"
    shown = any(value.mean for values in lines_of(found, DOUBTFUL) for value in values.values())
    return several(found, "doubtful", "Worth a look", caption, DOUBTFUL, 100) if shown else ""

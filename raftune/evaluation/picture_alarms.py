"""Alarms of image rounds, one function each.

Kept images are compared with the images generated in this round and in round 1. Drifting colours, lower contrast and
lower diversity are early signs of collapse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.evaluation.alarms import FEWEST, Alarm, Measures, column, name_of, one_a_prompt, ranged
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt
from raftune.evaluation.columns import prompt_numbers
from raftune.evaluation.images import ALIKE, by_group, nearest, rms_distance, thumbnails
from raftune.results.summary import ends_of
from raftune.sanitize import percent as share

KNOWN = ("brightness", "saturation", "contrast")  # of one image, averaged over a set


def measures(drawn: pa.Table, control: pa.Table, kept: pa.Table) -> tuple[Measures, Measures]:
    """Of what was generated and of what was kept: how far images are apart, and how many nearly repeat another
    prompt's.

    pixel_distance is inside a prompt's group, over all that was generated; spread is over a whole set, that of the
    generated being the control: as many as were kept. Root mean square distances of thumbnails, 0 … 1.
    """
    rows, small_ND = thumbnails(drawn)
    apart = by_group(prompt_numbers(drawn)[rows], small_ND, rms_distance)
    finite = apart[np.isfinite(apart)]
    inside = {"pixel_distance": float(finite.mean())} if len(finite) else {}
    return inside | as_a_set(control), as_a_set(kept)


def as_a_set(samples: pa.Table) -> dict[str, Any]:
    """The measures of a set of images; nothing of a set of fewer than two."""
    rows, small_ND = thumbnails(samples)
    if len(rows) < 2:
        return {}
    apart, _ = nearest(small_ND, prompt_numbers(samples)[rows])
    return {"spread": rms_distance(small_ND), "near_duplicates": float((apart <= ALIKE).mean())}


def saturation_drifts(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, drift: float) -> Alarm | None:
    """Raised where kept images are so much more, or less, saturated than the samples of this round or of round 1.

    By the whole 95 % interval over prompts. Names the most, or the least, saturated of what was kept.
    """
    found, means = looked(kept, "saturation"), drawn_means(sets, first, "saturation")
    ends = ends_of(found) if found else None
    if found is None or ends is None or not means:
        return None
    risen = ends[0] - min(means.values()) > drift
    if not risen and not max(means.values()) - ends[1] > drift:
        return None
    values = column(kept, "saturation")
    order = np.argsort(-values if risen else values, kind="stable")
    return Alarm(
        "saturation_drifts",
        f"What was kept is much {'more' if risen else 'less'} saturated than what was generated",
        f"the mean saturation of kept images is {ranged(found)}, {against(means)}",
        {"selected": found, "generated": means.get("this round"), "first": means.get("round 1")},
        [(name_of(kept, row), f"saturation {values[row]:.2f}") for row in one_a_prompt(kept, order)],
    )


def contrast_drops(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, drop: float) -> Alarm | None:
    """Raised where kept images have lost this share of the contrast of the samples of this round or of round 1.

    By the whole 95 % interval over prompts. Names the flattest of what was kept.
    """
    found, means = looked(kept, "contrast"), drawn_means(sets, first, "contrast")
    ends = ends_of(found) if found else None
    if found is None or ends is None or not means or ends[1] >= (1 - drop) * max(means.values()):
        return None
    values = column(kept, "contrast")
    return Alarm(
        "contrast_drops",
        "What was kept has much less contrast than what was generated",
        f"the mean contrast of kept images is {ranged(found)}, {against(means)}",
        {"selected": found, "generated": means.get("this round"), "first": means.get("round 1")},
        [
            (name_of(kept, row), f"contrast {values[row]:.3f}")
            for row in one_a_prompt(kept, np.argsort(values, kind="stable"))
        ],
    )


def diversity_drops(
    sets: Mapping[str, Measures], first: Measures, drawn: pa.Table, kept: pa.Table, drop: float
) -> Alarm | None:
    """Raised where images of one prompt, or kept ones of different prompts, have lost this share of their distance.

    Those of one prompt against round 1's draws; kept ones against as many of this round's and of round 1's. Names the
    kept images of the prompts whose draws are the most alike.
    """
    if kept.num_rows < FEWEST:
        return None
    now, chosen = sets["generated"], sets["selected"]
    pairs = {
        "images generated for one prompt": (now.get("pixel_distance"), {"round 1": first.get("pixel_distance")}),
        "images kept": (
            chosen.get("spread"),
            {"as many generated in this round": now.get("spread"), "as many generated in round 1": first.get("spread")},
        ),
    }
    said, lost = [], [0.0]
    for what, (here, others) in pairs.items():
        losses = {name: 1 - here / value for name, value in others.items() if value and here is not None}
        if max(losses.values(), default=0.0) > drop:
            than = ", ".join(f"in {name} {others[name]:.3f}" for name in losses)
            said.append(f"two {what} are {here:.3f} apart; {than}")
            lost += losses.values()
    if not said:
        return None
    numbers = {"pixel_distance": now.get("pixel_distance"), "spread": chosen.get("spread"), "lost": max(lost)}
    return Alarm(
        "diversity_drops", "Images are less varied than they were", "; ".join(said), numbers, [*alike(drawn, kept)]
    )


def alike(drawn: pa.Table, kept: pa.Table) -> Iterator[tuple[str, str]]:
    """The kept images of the prompts whose draws are the most alike, a prompt each."""
    rows, small_ND = thumbnails(drawn)
    groups = prompt_numbers(drawn)
    apart = np.full(int(groups.max(initial=-1)) + 1, np.nan)
    present = np.unique(groups[rows])
    apart[present] = by_group(groups[rows], small_ND, rms_distance)
    names = pc.unique(drawn.column("prompt_id")).to_pylist()
    by_name = dict(zip(names, apart.tolist(), strict=True))
    own = np.array([by_name.get(name, np.nan) for name in kept.column("prompt_id").to_pylist()])
    for row in one_a_prompt(kept, np.argsort(np.nan_to_num(own, nan=np.inf), kind="stable")):
        yield name_of(kept, row), f"two images generated for its prompt are {own[row]:.3f} apart, on average"


def near_duplicates(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, rise: float) -> Alarm | None:
    """Raised where the share of kept images that nearly repeat another prompt's rose by this since round 1's draws.

    Names those that are the nearest to another prompt's, a prompt each.
    """
    here, there = sets["selected"].get("near_duplicates"), first.get("near_duplicates")
    if kept.num_rows < FEWEST or here is None or there is None or here - there <= rise:
        return None
    rows, small_ND = thumbnails(kept)
    apart, others = nearest(small_ND, prompt_numbers(kept)[rows])
    order = [place for place in np.argsort(apart, kind="stable") if apart[place] <= ALIKE]
    place_of = {int(rows[place]): place for place in order}
    return Alarm(
        "near_duplicates",
        "Images kept for different prompts are nearly the same",
        f"{share(here)} of the {kept.num_rows} kept images nearly repeat one of another prompt; of as many "
        f"generated in "
        f"round 1 {share(there)}",
        {"selected": here, "first": there},
        [
            (
                name_of(kept, row),
                f"{apart[place_of[row]]:.3f} from {name_of(kept, int(rows[others[place_of[row]]]))}, of another prompt",
            )
            for row in one_a_prompt(kept, [rows[place] for place in order])
        ],
    )


def looked(kept: pa.Table, name: str) -> Interval | None:
    """The mean over prompts of what was kept, with its interval; None of too few samples."""
    if kept.num_rows < FEWEST:
        return None
    return interval(mean_by_prompt(prompt_numbers(kept), column(kept, name)))


def drawn_means(sets: Mapping[str, Measures], first: Measures, name: str) -> dict[str, float]:
    """What was generated in this round and in round 1, as far as it is known."""
    means = {"this round": sets["generated"].get(name), "round 1": first.get(name)}
    return {when: value for when, value in means.items() if value is not None}


def against(means: Mapping[str, float]) -> str:
    return ", ".join(f"of those generated in {name} {value:.2f}" for name, value in means.items())

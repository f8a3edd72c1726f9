"""Each alarm of images fires where it should, is silent where nothing is odd, and names samples by its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config import GuardsConfig
from raftune.data.images import png_of, require_pillow
from raftune.evaluation.alarms import Alarm, RoundMonitor
from raftune.evaluation.images import SIDE, looked_at
from raftune.protocols import MonitorInput

P, K = 20, 4


def colours(seed: int, spread: float = 60.0) -> np.ndarray:
    """(P, K, 2, 3) the colours of halves of images."""
    return np.clip(np.random.default_rng(seed).normal(128, spread, (P, K, 2, 3)), 0, 255)


def generated(found: np.ndarray, best: int = 1) -> pa.Table:
    """A round of images in two halves, of which the one with index `best` was kept; the control is the first."""
    rows = []
    for prompt in range(P):
        for k in range(K):
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            pixels[: SIDE // 2], pixels[SIDE // 2 :] = found[prompt, k].astype(np.uint8)
            name = f"{prompt:03d}-0"
            rows.append(
                {
                    "sample_id": f"0002/{name}/{k:03d}",
                    "prompt_id": name,
                    "k": k,
                    "source": "policy",
                    "score": float(k),
                    "weight": float(k == best),
                    "control": k == 0,
                    "completion": png_of(require_pillow().fromarray(pixels)),
                }
            )
    return looked_at(pa.Table.from_pylist(rows))


def first_of(table: pa.Table) -> dict[str, Any]:
    """What round 1 would have noted of these samples."""
    return RoundMonitor(GuardsConfig()).measures(MonitorInput(1, table, {"r": 1.0}, None, [], "", None))["generated"]


def raised(table: pa.Table, first: dict[str, Any] | None = None, **limits: Any) -> dict[str, Alarm]:
    examiner = RoundMonitor(GuardsConfig(**limits))
    evidence = MonitorInput(2, table, {"r": 1.0}, None, [], "", first or first_of(generated(colours(1))))
    return {found.alarm: found for found in examiner.raised(evidence, examiner.measures(evidence))}


def test_a_round_like_the_first_raises_nothing() -> None:
    assert raised(generated(colours(0))) == {}


def test_saturation_that_rises_in_what_is_kept_is_seen_and_its_strongest_are_named() -> None:
    strong = colours(0, 20.0)
    strong[:, 1, :, 0], strong[:, 1, :, 1:] = 250, 5
    strong[7, 1] = [[255, 0, 0], [255, 0, 0]]
    found = raised(generated(strong))["saturation_drifts"]
    assert "more saturated" in found.title
    assert found.samples[0] == ("0002/007-0/001", "saturation 1.00")
    assert found.numbers["selected"]["mean"] > 0.9 > found.numbers["first"] + 0.2


def test_saturation_that_is_lost_is_seen_too() -> None:
    vivid = generated(colours(1, 200.0))
    grey = colours(0)
    grey[..., 1], grey[..., 2] = grey[..., 0], grey[..., 0]
    found = raised(generated(grey), first_of(vivid))["saturation_drifts"]
    assert "less saturated" in found.title and "of those generated in round 1" in found.evidence


def test_contrast_that_is_lost_is_seen() -> None:
    grey = colours(0)
    grey[:, :, 1] = grey[:, :, 0] + 4
    found = raised(generated(np.clip(grey, 0, 255)))["contrast_drops"]
    assert found.numbers["selected"]["mean"] < 0.05 < found.numbers["first"]


def test_samples_of_a_prompt_that_come_together_are_seen_and_the_most_alike_are_named() -> None:
    alike = colours(0)
    alike[:] = alike[:, :1] + np.arange(K)[None, :, None, None] * 5
    alike[3] = alike[3, 0]
    found = raised(generated(np.clip(alike, 0, 255)))
    assert found["diversity_drops"].samples[0][0] == "0002/003-0/001"
    assert "two images generated for one prompt are" in found["diversity_drops"].evidence
    assert "near_duplicates" not in found  # they are alike inside a prompt, not across


def test_images_kept_for_different_prompts_that_are_the_same_are_seen_and_named_with_their_twin() -> None:
    same = colours(0)
    same[: P // 2, 1] = same[0, 1]
    found = raised(generated(same))["near_duplicates"]
    assert found.numbers["selected"] == 0.5 and found.numbers["first"] == 0.0
    name, why = found.samples[0]
    assert int(name[5:8]) < P // 2 and name.endswith("/001")
    assert why.startswith("0.000 from 0002/0") and why.endswith("of another prompt")


def test_what_was_alike_from_the_beginning_raises_nothing() -> None:
    same = colours(0)
    same[:, :] = same[0, 0]
    table = generated(same)
    assert "near_duplicates" not in raised(table, first_of(table))


def test_thresholds_are_read() -> None:
    strong = colours(0, 20.0)
    strong[:, 1, :, 0], strong[:, 1, :, 1:] = 250, 5
    assert "saturation_drifts" not in raised(generated(strong), saturation_drift=0.95)
    same = colours(0)
    same[: P // 2, 1] = same[0, 1]
    assert "near_duplicates" not in raised(generated(same), duplicate_rise=0.6)


def test_few_images_raise_nothing() -> None:
    strong = colours(0, 20.0)
    strong[:, 1, :, 0], strong[:, 1, :, 1:] = 250, 5
    assert raised(generated(strong).slice(0, 15 * K)) == {}


def test_evidence_and_samples_are_plain_data() -> None:
    strong = colours(0, 20.0)
    strong[:, 1, :, 0], strong[:, 1, :, 1:] = 250, 5
    told = raised(generated(strong))["saturation_drifts"].as_json(2)
    assert told["alarm"] == "saturation_drifts" and told["round"] == 2
    assert len(told["samples"]) == 8

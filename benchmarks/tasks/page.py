"""The results of the diffusion tasks as one page of markdown, and an image of each: base, control and RAFT."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # the 97.5 % quantile of Student's t by degrees of freedom
LABELS = {"native": "base at its own size", "base": "base", "random": "control: one of K by chance", "raft": "RAFT"}
NAMES = {
    "reward": "reward",
    "held_out": "judge",
    "held_out/rewards/all_right/mean": "share with all four right",
    "feature_distance": "CLIP distance in a group",
    "vendi": "Vendi score",
    "pixel_distance": "pixel distance in a group",
    "drift": "drift from the base",
    "saturation": "saturation",
    "contrast": "contrast",
}
COLUMNS = (
    "reward",
    "held_out",
    "held_out/rewards/all_right/mean",
    "feature_distance",
    "vendi",
    "pixel_distance",
    "drift",
    "saturation",
    "contrast",
)
COLUMNS_SHOWN, SCALE, GAP = 12, 2, 6  # of the images: captions, magnification, pixels between two

Values = Mapping[tuple[str, str, int], Mapping[str, float]]  # by arm, set and seed


def write_page(tasks: Sequence[Any], seeds: int, held_out: int, draws: int, work: Path, out: Path) -> Path:
    """results.md and a PNG for each set of each task, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines = opening(seeds, held_out, draws)
    for task in tasks:
        values = read(task, seeds, work)
        lines += [f"## {task.title}", "", f"{settings_in_words(task)} {time_of_a_round(task, seeds, work)}", ""]
        for split, title in task.sets.items():
            lines += [f"### On {title}", "", *table(task.arms, split, seeds, values), ""]
            lines += [*contrasts(split, seeds, values), ""]
            name = f"{task.name}-{split}.png"
            sheet, captions = grid(task.name, task.arms, split, work)
            sheet.save(out / name, optimize=True)
            lines += [f"![{task.title}: a row an arm, as in the table; a column a caption and seed]({name})", ""]
            lines += [f"From the left: {'; '.join(captions)}.", ""]
    path = out / "results.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opening(seeds: int, held_out: int, draws: int) -> list[str]:
    return [
        "# The paper's diffusion tasks, at a size that runs on two cores",
        "",
        f"The bundled pipeline, {seeds} seeds, K = 8, twelve steps without guidance, sixty optimizer steps a "
        f"round. Each arm's last model is judged on {held_out} captions of a set with {draws} images each, the "
        "same captions and seeds for every arm. The judge is a classifier that nothing was trained on: the share "
        "of a caption's four attributes that the image has. Distances and the Vendi score (1 to the number of "
        "images) are among the images of one caption, by the reward model's CLIP features; drift is one less "
        "the cosine to the base's image of the same caption and seed. Cells are means over seeds, with each "
        "seed's value in brackets. `python benchmarks/images.py` makes this page.",
        "",
    ]


def settings_in_words(task: Any) -> str:
    return f"{task.rounds} rounds of {task.prompts} captions; reward `{task.reward}`, learning rate {task.rate:g}."


def time_of_a_round(task: Any, seeds: int, work: Path) -> str:
    """RAFT's seconds of drawing, scoring and training, as medians over all rounds of all seeds."""
    spent: dict[str, list[float]] = {}
    for seed in range(seeds):
        for line in (work / "runs" / f"{task.name}-raft-{seed}" / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "stage_end" and event["round"] > 0:
                spent.setdefault(event["stage"], []).append(event["seconds"])
    told = ", ".join(f"{statistics.median(spent[stage]):.3g} s to {stage}" for stage in ("generate", "score", "train"))
    return f"A round of RAFT takes {told} (medians, one thread, another arm beside it)."


def read(task: Any, seeds: int, work: Path) -> Values:
    """The numbers of every arm, set and seed, the drift from the base among them."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for seed in range(seeds):
        results = {
            arm: json.loads((work / "results" / f"{task.name}-{arm}-{seed}.json").read_text())["sets"]
            for arm in task.arms
        }
        for split in task.sets:
            base = features(work, task.name, "base", seed, split)
            for arm in task.arms:
                drift = float(np.nanmean(1 - np.sum(base * features(work, task.name, arm, seed, split), axis=1)))
                found[arm, split, seed] = {**results[arm][split], "drift": drift}
    return found


def chunk_paths(work: Path, task: str, arm: str, seed: int, split: str, stage: str) -> list[Path]:
    return sorted(
        (work / "judged" / f"{task}-{arm}-{seed}-{split}" / "round-0000" / "evaluate" / stage).glob("chunk-*.parquet")
    )


def features(work: Path, task: str, arm: str, seed: int, split: str) -> Any:
    """(N, d) the CLIP features of the judged images, of length 1, by their ids; NaN where there is none."""
    import pyarrow.parquet as pq

    rows = [
        row for path in chunk_paths(work, task, arm, seed, split, "features") for row in pq.read_table(path).to_pylist()
    ]
    rows.sort(key=lambda row: row["sample_id"])
    width = max(len(row["features"] or ()) for row in rows)
    return np.array([row["features"] or [math.nan] * width for row in rows], dtype=np.float64)


def table(arms: Sequence[str], split: str, seeds: int, values: Values) -> list[str]:
    shown = [name for name in COLUMNS if all(name in values[arm, split, 0] for arm in arms)]
    lines = ["| arm | " + " | ".join(NAMES[name] for name in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for arm in arms:
        cells = [cell([values[arm, split, seed][name] for seed in range(seeds)]) for name in shown]
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return lines


def cell(values: Sequence[float]) -> str:
    each = ", ".join(map(short, values))
    return f"{short(statistics.fmean(values))} ({each})" if len(values) > 1 else each


def short(value: float) -> str:
    """Three digits; what is less than half of 1e-4 is nothing but rounding."""
    return f"{round(value, 4) + 0.0:.3g}"


def contrasts(split: str, seeds: int, values: Values) -> list[str]:
    """RAFT against the base and against the control, by the reward and by the judge, with 95 % t-intervals."""
    lines = []
    for name in ("reward", "held_out", "held_out/rewards/all_right/mean"):
        for other in ("base", "random"):
            each = [values["raft", split, seed][name] - values[other, split, seed][name] for seed in range(seeds)]
            lines.append(f"- RAFT less {LABELS[other]}, by the {NAMES[name]}: {in_words(each)}.")
    return lines


def in_words(each: Sequence[float]) -> str:
    listed = ", ".join(f"{value:+.3g}" for value in each)
    if len(each) < 2:
        return listed
    half = T.get(len(each) - 1, 2.0) * statistics.stdev(each) / math.sqrt(len(each))
    return f"{statistics.fmean(each):+.3g} ± {half:.2g}; by seed {listed}"


def grid(task: str, arms: Sequence[str], split: str, work: Path) -> tuple[Any, list[str]]:
    """The first images of seed 0, a column a caption, a row an arm, base first; and the captions."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for arm in arms:
        first = {}
        for path in chunk_paths(work, task, arm, 0, split, "generate"):
            for row in pq.read_table(path, columns=["prompt_id", "k", "completion"]).to_pylist():
                if row["k"] == 0 and row["completion"] is not None:
                    first[row["prompt_id"]] = Image.open(io.BytesIO(row["completion"])).convert("RGB")
        rows.append(first)
    plan = work / "judged" / f"{task}-{arms[-1]}-0-{split}" / "round-0000" / "evaluate" / "plan" / "prompts.parquet"
    captions = {row["prompt"]: row["prompt_id"] for row in pq.read_table(plan).to_pylist()}  # each once
    shown = {told: one for told, one in captions.items() if all(one in row for row in rows)}
    told = sorted(shown, key=lambda caption: shown[caption])[:COLUMNS_SHOWN]
    shared = [shown[caption] for caption in told]
    side = max(row[shared[0]].width for row in rows) * SCALE
    sheet = Image.new("RGB", (len(shared) * (side + GAP) + GAP, len(rows) * (side + GAP) + GAP), "white")
    for y, row in enumerate(rows):
        for x, prompt in enumerate(shared):
            thumbnail = row[prompt].resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(thumbnail, (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    return sheet, captions

"""`raftune reward check`: tries a reward before a run uses it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from raftune.cli.flags import Device, Json, Options, Timeout, read_object, switch
from raftune.cli.output import echo
from raftune.errors import DataError

if TYPE_CHECKING:
    from raftune.rewards import CheckReport, RewardBatch

MOST = 256
PLACES = {"here": "this process", "thread": "a thread", "loop": "an event loop", "process": "a process of its own"}


def check(
    spec: Annotated[str, Parameter(help="As in rewards.reward_funcs: file.py:function, a model, regex, …")],
    *,
    samples: Annotated[
        str | None,
        Parameter(help="Data set with prompt and completion, or images; default: built-in examples."),
    ] = None,
    images: Annotated[bool, switch("Use image examples if no samples are given.")] = False,
    options: Options = None,
    timeout: Timeout = 120.0,
    device: Device = "auto",
    as_json: Json = False,
) -> int:
    """Try a reward on samples and report signature, values, failures, determinism and speed.

    raftune reward check rewards.py:polite --samples answers.jsonl
    raftune reward check length --options '{"target": 20}'
    raftune reward check rewards.py:tidy --images

    Other columns of the samples are passed to the reward by keyword. The exit code is 0 if every sample got a number or
    None, and the same again in any order and batch size; otherwise 3.
    """
    from raftune.config.rewards import RewardSpec
    from raftune.rewards import check_reward
    from raftune.rewards.media import is_image
    from raftune.starters.resolve import IMAGES, resolve_reward

    parsed = RewardSpec.model_validate({"spec": spec, "options": read_object("--options", options)})
    batch = read_samples(samples) if samples is not None else starter_samples(spec, images)
    are_images = images if batch is None else any(map(is_image, batch.completions))
    reward = resolve_reward(parsed, IMAGES if are_images else None)
    report = check_reward(reward, batch, timeout=timeout, device=device, pictures=are_images)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"ok": report.ok, "findings": report.findings}))
        return 0 if report.ok else 3
    show(report)
    if samples is None and not are_images and report.statuses.get("error"):
        echo(
            "  - was tried on texts of our own, without further columns: a reward that reads the data's columns is",
            "    tried with --samples FILE, one of images with --images",
        )
    return 0 if report.ok else 3


def read_samples(source: str) -> RewardBatch:
    """The first samples of a data set. Raises DataError if it lacks prompt or completion."""
    from raftune.data.tables import read_rows
    from raftune.rewards import RewardBatch
    from raftune.rewards.files import read_answers
    from raftune.rewards.picture_files import holds_picture, is_folder

    table = None if is_folder(source) else read_rows(source, field="--samples")
    if table is None or (table.num_rows and holds_picture(table.slice(0, 1).to_pylist()[0])):
        rows = read_answers(source, field="--samples")
        batch = RewardBatch(rows.prompts, cast("list[Any]", rows.completions), rows.columns)
        return batch.take(range(min(MOST, len(rows.completions))))
    if missing := [name for name in ("prompt", "completion") if name not in table.column_names]:
        raise DataError(
            f"--samples must have the columns prompt and completion; {missing[0]} is missing from "
            f"{', '.join(table.column_names)}. `raftune export --format sft` writes such a file."
        )
    columns = table.slice(0, MOST).to_pydict()
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    if not completions:
        raise DataError(f"--samples must hold at least one sample; {Path(source).name} has none.")
    return RewardBatch(prompts, completions, columns)


def starter_samples(spec: str, images: bool) -> RewardBatch | None:
    """Prompts and completions, or captions and images, for the bundled rewards; None for any other.

    The images are of the bundled generator, each under the caption of the next but one.
    """
    from raftune.rewards import RewardBatch
    from raftune.starters.resolve import JUDGE, WORD

    if images and spec.startswith(WORD):
        import numpy as np

        from raftune.starters.image.pictures import as_image, paint, scenes

        shown = scenes("heldout")[:32]
        painted = [as_image(pixels) for pixels in paint(shown, np.random.default_rng(0))]
        return RewardBatch([scene.caption for scene in (*shown[2:], *shown[:2])], painted)
    if spec not in (WORD, JUDGE):
        return None
    from raftune.starters.text.corpus import dialogues

    samples = [dialogue for dialogue, _ in zip(dialogues(32, 0), range(32), strict=False)]
    return RewardBatch([sample.prompt for sample in samples], [sample.completion for sample in samples])


def show(report: CheckReport) -> None:
    """Prints the report, a line for each fact."""

    def verdict(same: bool | None) -> str:
        return "cannot be told, since calls failed" if same is None else "the same values" if same else "other values"

    fine = "scores all samples the same" if report.constant else "fine"
    echo(f"{report.name}: {fine if report.ok else 'not fit for a run yet'}", style="bold")
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items()))
    echo(
        f"  takes          {'all columns' if report.accepts is None else ', '.join(report.accepts)}",
        f"  runs in        {PLACES[report.place]}",
        f"  samples        {report.samples}: {statuses}",
    )
    if report.statuses.get("ok", 0):
        echo(f"  values         mean {report.mean:.4g}, from {report.lowest:.4g} to {report.highest:.4g}")
    echo(
        f"  asked again    {verdict(report.deterministic)}",
        f"  other order    {verdict(report.order_independent)}",
        f"  smaller calls  {verdict(report.batch_independent)}",
    )
    if report.mixed_sizes is not None:
        echo(f"  mixed sizes    {'scored in one call' if report.mixed_sizes else 'cannot be scored in one call'}")
    echo(f"  speed          {report.samples_per_second:.3g} samples a second")
    echo(*(f"  - {finding}" for finding in report.findings))
    # a call that fails fails for all its samples: the first of each detail is shown
    for failing in {failing.detail: failing for failing in reversed(report.failing)}.values():
        echo(f"  sample {failing.index}, {failing.status}: {failing.detail}")
        echo(f"    prompt {failing.prompt!r}, completion {failing.completion!r}")

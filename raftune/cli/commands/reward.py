"""`raftune reward check`: tries a reward before a run uses it."""

from __future__ import annotations

import dataclasses
import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from raftune.cli.output import echo
from raftune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from raftune.rewards import CheckReport, RewardBatch
    from raftune.rewards.files import CompletionFile

MOST = 256
PLACES = {"here": "this process", "thread": "a thread", "loop": "an event loop", "process": "a process of its own"}


def check(
    spec: Annotated[str, Parameter(help="As in rewards.reward_funcs: file.py:function, a model, regex, …")],
    *,
    samples: Annotated[
        str | None,
        Parameter(help="Data set with prompt and completion, or images; default: built-in examples."),
    ] = None,
    images: Annotated[
        bool, Parameter(negative="", show_default=False, help="Use image examples if no samples are given.")
    ] = False,
    options: Annotated[str | None, Parameter(help="The reward's options, as JSON.")] = None,
    timeout: Annotated[float, Parameter(help="Time limit of one call, in seconds.")] = 120.0,
    device: Annotated[str, Parameter(help="Device of a reward model: auto, cpu, cuda, mps.")] = "auto",
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the report as JSON.")] = False,
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

    given = RewardSpec.model_validate({"spec": spec, "options": read_options(options)})
    batch = read_samples(samples) if samples is not None else prompts_of_starter(spec, images)
    pictures = images if batch is None else any(map(is_image, batch.completions))
    reward = resolve_reward(given, IMAGES if pictures else None)
    report = check_reward(reward, batch, timeout=timeout, device=device, pictures=pictures)
    if json:
        print(js.dumps(dataclasses.asdict(report) | {"ok": report.ok, "findings": report.findings}))
    else:
        show(report)
        if samples is None and not pictures and report.statuses.get("error"):
            echo(
                "  - was tried on texts of our own, without further columns: a reward that reads the data's columns is"
            )
            echo("    tried with --samples FILE, one of images with --images")
    return 0 if report.ok else 3


def read_options(text: str | None) -> dict[str, Any]:
    """The options. Raises ConfigError unless they are a JSON object."""
    try:
        found = js.loads(text) if text else {}
    except ValueError as error:
        raise ConfigError(f"--options must be JSON; got {text!r}: {error}. Put it in quotes.") from error
    if not isinstance(found, dict):
        raise ConfigError(f'--options must be a JSON object; got {text!r}. Write {{"name": value}}.')
    return found


def read_samples(source: str) -> RewardBatch:
    """The first samples of a data set. Raises DataError where it lacks prompt or completion."""
    from raftune.data.tables import read_rows
    from raftune.rewards import RewardBatch
    from raftune.rewards.files import read_answers
    from raftune.rewards.picture_files import holds_picture, is_folder

    if is_folder(source):
        return batch_of(read_answers(source, field="--samples"))
    table = read_rows(source, field="--samples")
    if table.num_rows and holds_picture(table.slice(0, 1).to_pylist()[0]):
        return batch_of(read_answers(source, field="--samples"))
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


def batch_of(answers: CompletionFile) -> RewardBatch:
    """The first images of a file or folder."""
    from raftune.rewards import RewardBatch

    rows = range(min(MOST, len(answers.completions)))
    return RewardBatch(answers.prompts, cast("list[Any]", answers.completions), answers.columns).take(rows)


def prompts_of_starter(spec: str, images: bool) -> RewardBatch | None:
    """Requests and replies, or captions and images, for the bundled rewards; None for any other."""
    from raftune.rewards import RewardBatch
    from raftune.starters.resolve import JUDGE, WORD
    from raftune.starters.text.corpus import dialogues

    if images and spec.startswith(WORD):
        return painted_examples()
    if spec not in (WORD, JUDGE):
        return None
    found = [dialogue for dialogue, _ in zip(dialogues(32, 0), range(32), strict=False)]
    return RewardBatch([d.prompt for d in found], [d.completion for d in found])


def painted_examples() -> RewardBatch:
    """Images of the bundled generator, each under the caption of the next but one."""
    import numpy as np

    from raftune.rewards import RewardBatch
    from raftune.starters.image.pictures import as_image, paint, scenes

    shown = scenes("heldout")[:32]
    return RewardBatch(
        [scene.caption for scene in (*shown[2:], *shown[:2])],
        [as_image(one) for one in paint(shown, np.random.default_rng(0))],
    )


def show(report: CheckReport) -> None:
    """The report, a line for each fact."""
    answered = report.statuses.get("ok", 0)
    fine = "scores all samples the same" if report.constant else "fine"
    echo(f"{report.name}: {fine if report.ok else 'not fit for a run yet'}", style="bold")
    taken = "all columns" if report.accepts is None else ", ".join(report.accepts)
    echo(f"  takes          {taken}")
    echo(f"  runs in        {PLACES[report.place]}")
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items()))
    echo(f"  samples        {report.samples}: {statuses}")
    if answered:
        echo(f"  values         mean {report.mean:.4g}, from {report.lowest:.4g} to {report.highest:.4g}")
    echo(f"  asked again    {verdict(report.deterministic, 'the same values', 'other values')}")
    echo(f"  other order    {verdict(report.order_independent, 'the same values', 'other values')}")
    echo(f"  smaller calls  {verdict(report.batch_independent, 'the same values', 'other values')}")
    if report.mixed_sizes is not None:
        echo(f"  mixed sizes    {'scored in one call' if report.mixed_sizes else 'cannot be scored in one call'}")
    echo(f"  speed          {report.samples_per_second:.3g} samples a second")
    for finding in report.findings:
        echo(f"  - {finding}")
    told: set[str] = set()
    for failing in report.failing:
        if failing.detail not in told:  # a call that fails fails for all its samples
            told.add(failing.detail)
            echo(f"  sample {failing.index}, {failing.status}: {failing.detail}")
            echo(f"    prompt {failing.prompt!r}, completion {failing.completion!r}")


def verdict(found: bool | None, good: str, bad: str) -> str:
    return "cannot be told, since calls failed" if found is None else good if found else bad
